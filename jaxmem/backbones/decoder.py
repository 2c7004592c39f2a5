"""One decoder for all backbones: pre-norm layers, run as one scan over stacked weights or as an unrolled loop.

Axis letters: B rows, T new tokens, S tokens that can be seen, K key heads, H head width, D model width, L layers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import ports as port_lib
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import TextConfig
from jaxmem.backbones.layers import (
    Attention,
    Look,
    RMSNorm,
    SwiGLU,
    attend,
    attend_branches,
    in_blocks,
    row_blocks,
)
from jaxmem.backbones.ports import Ports
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError

KeysValues = tuple[Array, Array]
NO_PORTS = Ports()
Observe = Callable[[Array, Array, Array, Array], Any]
"""observe(query, keys, values, mask) -> pytree, stacked over layers: how analysis looks at attention."""

Remat = bool | str
REMAT = ("full", "dots", "none", True, False)
"""What a backward pass recomputes of each decoder layer: "full" (or True) all of it, keeping its input alone; "dots"
all but the results of matrix products with weights; "none" (or False) nothing."""


@flax.struct.dataclass
class Stream:
    """What the tokens of each row are, without their content.

    Attributes:
      order: [B, T] int32 place in the row's sequence; a key is visible from its own place onwards.
      segments: [B, T] int32 document number; 0 is padding, seen by none.
      is_visual: [B, T] bool.
      blind: [B] bool; text of such a row cannot see visual keys (visual-key blocking).
    """

    order: Array
    segments: Array
    is_visual: Array
    blind: Array

    @property
    def tokens(self) -> dict[str, Array]:
        """What it says of each token, [B, T] each."""
        return {name: getattr(self, name) for name in ("order", "segments", "is_visual")}

    def some(self, tokens: dict[str, Array]) -> Stream:
        """The stream of some of the tokens, given what `tokens` says of them."""
        return dataclasses.replace(self, **tokens)


def stream_of(batch: Batch, start: Array | int = 0) -> Stream:
    """The stream of a batch whose first token stands at place `start` (scalar or [B])."""
    index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    order = jnp.broadcast_to(jnp.asarray(start, jnp.int32).reshape(-1, 1) + index, batch.tokens.shape)
    return Stream(order, jnp.asarray(batch.segments), jnp.asarray(batch.is_visual), jnp.asarray(batch.blind))


def visible(query: Stream, key: Stream) -> Array:
    """[B, T, S] bool: causal, within a document, never padding, and not past a blindfold."""

    def pairs(compare: Callable, a: Array, b: Array) -> Array:
        return compare(a[:, :, None], b[:, None, :])

    same = pairs(jnp.equal, query.segments, key.segments) & (query.segments > 0)[:, :, None]
    past = pairs(jnp.greater_equal, query.order, key.order)
    blocked = pairs(jnp.logical_and, ~query.is_visual, key.is_visual) & query.blind[:, None, None]
    return same & past & ~blocked


def among(queries: Stream, keys: Stream, observe: Observe | None = None) -> Look:
    """The tokens of `queries` look at those of `keys`; `observe` says what to keep (nothing when None)."""

    def look(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
        if observe is not None:
            mask = visible(queries, keys)
            return attend(query, key, value, mask), observe(query, key, value, mask)
        some = lambda piece: attend(piece[0], key, value, visible(queries.some(piece[1]), keys))  # noqa: E731
        return row_blocks(some, (query, queries.tokens)), None

    return look


def branching(trunk: Stream, own: Stream, group: int) -> Callable[[KeysValues], Look]:
    """The tokens of each row are `group` equally long continuations, side by side, of a prompt that was read before.

    A continuation sees the prompt and itself, never its neighbours: it computes what it would compute alone in a row
    behind the same prompt.

    Args:
      trunk: [B, S] the prompts.
      own: [B, G * N] the continuations.
      group: G.

    Returns:
      (keys, values) [B, S, K, H] of the prompt in a layer -> how the continuations look in that layer.
    """
    fork = lambda leaf: leaf.reshape(leaf.shape[0], group, -1, *leaf.shape[2:])  # noqa: E731
    tokens = jax.tree.map(fork, own.tokens)
    each = jax.vmap(visible, in_axes=(Stream(1, 1, 1, None),) * 2, out_axes=1)  # pyrefly: ignore
    to_stem = jax.vmap(visible, in_axes=(Stream(1, 1, 1, None), Stream(None, None, None, None)), out_axes=1)  # pyrefly: ignore
    leaves = own.some(tokens)

    def look_behind(past: KeysValues) -> Look:
        def look(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            shared = jnp.swapaxes(past[0], 1, 2), jnp.swapaxes(past[1], 1, 2)
            mine = jnp.swapaxes(fork(key), 2, 3), jnp.swapaxes(fork(value), 2, 3)

            def some(piece: Any) -> Array:
                stream = own.some(piece[1])
                return attend_branches(piece[0], shared, mine, to_stem(stream, trunk), each(stream, leaves))

            found = in_blocks(some, (fork(query), tokens))
            return found.reshape(found.shape[0], -1, found.shape[-1]), None

        return look

    return look_behind


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + (ffn(norm(x)) + branches(x)); as published, sums in this order."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, x: Array, angle: Array, look: Look, branches: Callable[[Array, Array, Array], tuple[Array, Any]]
    ) -> tuple[Array, Any]:
        """x [B, T, D] -> [B, T, D], and what `look` and the branches keep of the layer.

        branches(ffn, residual, normed) -> the FFN's output with the branches added, and what they keep.
        """
        c = self.config
        eps = c.norm_eps if c.qk_norm else None
        attention = Attention(c.heads, c.kv_heads, c.head_dim, eps, c.qkv_bias, name="attention")
        attended, kept = attention(RMSNorm(c.norm_eps, name="attention_norm")(x), angle, look)
        x = x + attended
        normed = RMSNorm(c.norm_eps, name="ffn_norm")(x)
        added, remembered = branches(SwiGLU(c.mlp_width, name="ffn")(normed), x, normed)
        return x + added, (kept, remembered)


def _layer(config: TextConfig, ports: Ports, angle: Array) -> Callable[..., tuple[Array, Any]]:
    """One layer with its ports as a function of (x, weights, index, look)."""

    def run(x: Array, weights: Any, index: Array | int, look: Look) -> tuple[Array, Any]:
        def branches(ffn: Array, residual: Array, normed: Array) -> tuple[Array, Any]:
            added = port_lib.beside_ffn(ports.beside_ffn, index, ffn, residual, normed)
            return added, port_lib.kept(ports.beside_ffn, index, residual)

        out: Any = DecoderLayer(config).apply({"params": weights}, x, angle, look, branches)
        return port_lib.after_layer(ports.after_layer, index, out[0]), out[1]

    return run


def scan_layers(
    config: TextConfig,
    layers: Any,
    x: Array,
    angle: Array,
    look: Any,
    *,
    past: Any = None,
    ports: Ports = NO_PORTS,
    remat: Remat = False,
    backward_from: int = 0,
    place: str = "residual",
) -> tuple[Array, Any]:
    """All layers over stacked weights in one `lax.scan`: compile time does not grow with depth.

    Args:
      config: sizes (static).
      layers: weights with leading axis L.
      x: [B, T, D] embeddings.
      angle: [B, T, H/2] rotary angles.
      look: what the tokens see: a `Look`, or with `past` a function that makes one of its entry.
      past: what each layer saw before, stacked on a leading axis L.
      ports: the memories' and the backbone's own.
      remat: what of a layer is recomputed in the backward pass, a key of `REMAT`.
      backward_from: no gradient is wanted below this layer, and the weights are frozen: the layers under it run
        outside differentiation, and weights are read by index instead of being split from the stack.
      place: where the stream lies on a mesh, a key of `mesh.ACTIVATIONS`.

    Returns:
      [B, T, D] before the final norm; and stacked over layers, what `look` keeps and what the ports keep.
    """
    run = _layer(config, ports, angle)

    def body(x: Array, index: Array, weights: Any, before: Any) -> tuple[Array, Any]:
        x, kept = run(x, weights, index, look if past is None else look(before))
        return constrain(x, place), kept

    step = rematerialised(body, remat)
    x = constrain(x, place)
    if not backward_from:
        return jax.lax.scan(lambda x, layer: step(x, *layer), x, (jnp.arange(config.layers), layers, past))

    def by_index(x: Array, index: Array) -> tuple[Array, Any]:
        return step(x, index, *jax.tree.map(lambda leaf: leaf[index], (layers, past)))

    x, below = jax.lax.scan(by_index, x, jnp.arange(backward_from))
    x, above = jax.lax.scan(by_index, jax.lax.stop_gradient(x), jnp.arange(backward_from, config.layers))
    return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, above)


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`body` with what `remat` names recomputed in its backward pass.

    Raises:
      ConfigError: `remat` is no key of `REMAT`.
    """
    if remat not in REMAT:
        raise ConfigError(f"remat {remat!r} is none of {', '.join(map(str, REMAT))}")
    if remat in ("none", False):
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy)


def unstack(layers: Any, count: int) -> tuple[Any, ...]:
    """Stacked weights as one tree per layer: once per compiled program, in front of its decode loop."""
    return tuple(jax.tree.map(operator.itemgetter(i), layers) for i in range(count))


def loop_layers(
    config: TextConfig,
    layers: tuple[Any, ...],
    x: Array,
    angle: Array,
    looks: Sequence[Look],
    *,
    ports: Ports = NO_PORTS,
    place: str = "residual",
) -> tuple[Array, tuple[Any, ...]]:
    """The same layers unrolled, each with a look of its own: for decoding, where a scan would copy the cache.

    Args:
      config, x, angle, ports: as in `scan_layers`.
      layers: one weight tree per layer (`unstack`).
      looks: one per layer: writes the new keys and values into its cache and looks at the whole.
      place: where the stream lies on a mesh, a key of `mesh.ACTIVATIONS`.

    Returns:
      [B, T, D] before the final norm, and what each look keeps. What ports keep is of no use behind a prompt.
    """
    run, kept = _layer(config, ports, angle), []
    for index, (weights, look) in enumerate(zip(layers, looks, strict=True)):
        x, (one, _) = run(constrain(x, place), weights, index, look)
        kept.append(one)
    return x, tuple(kept)
