"""One decoder for all backbones: pre-norm layers, run as one scan over stacked weights or as an unrolled loop.

Axis letters: B rows, T new tokens, S tokens that can be seen, K key heads, H head width, D model width, L layers.
"""

from __future__ import annotations

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
from jaxmem.backbones.layers import Attention, Look, RMSNorm, SwiGLU, attend, attend_branches
from jaxmem.backbones.ports import Ports

NO_PORTS = Ports()
Observe = Callable[[Array, Array, Array, Array], Any]
"""observe(query, keys, values, mask) -> pytree, stacked over layers: how analysis looks at attention."""


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


def dense(mask: Array, observe: Observe | None = None) -> Look:
    """New tokens look at one another: `mask` is [B, T, T] bool, and `observe` says what to keep (nothing when None)."""

    def look(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
        return attend(query, key, value, mask), observe(query, key, value, mask) if observe else None

    return look


def branching(stream: Stream, trunk: int, group: int) -> Look:
    """The tokens of each row are a prompt of `trunk` tokens and then `group` continuations of it, equally long.

    A continuation sees the prompt and itself, never its neighbours: it computes what it would compute alone in a row
    behind the same prompt, which is computed once.
    """
    part = lambda at: jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else leaf[:, at], stream)  # noqa: E731
    stem, leaves = part(slice(trunk)), part(slice(trunk, None))
    fork = lambda leaf: leaf.reshape(leaf.shape[0], group, -1, *leaf.shape[2:])  # noqa: E731
    stem_mask, trunk_mask = visible(stem, stem), fork(visible(leaves, stem))
    own = jax.tree.map(lambda leaf: fork(leaf) if leaf.ndim > 1 else leaf, leaves)
    own_mask = jax.vmap(visible, in_axes=(Stream(1, 1, 1, None),) * 2, out_axes=1)(own, own)  # pyrefly: ignore

    def look(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        first = attend(query[:, :trunk], key[:, :trunk], value[:, :trunk], stem_mask)
        shared = lambda leaf: jnp.swapaxes(leaf[:, :trunk], 1, 2)  # noqa: E731
        each = lambda leaf: jnp.swapaxes(fork(leaf[:, trunk:]), 2, 3)  # noqa: E731
        keys, values = (shared(key), shared(value)), (each(key), each(value))
        later = attend_branches(fork(query[:, trunk:]), keys, values, trunk_mask, own_mask)
        return jnp.concatenate([first, later.reshape(later.shape[0], -1, later.shape[-1])], axis=1), None

    return look


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
        attention = Attention(c.heads, c.kv_heads, c.head_dim, c.norm_eps, name="attention")
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
    look: Look,
    *,
    ports: Ports = NO_PORTS,
    remat: bool = False,
    backward_from: int = 0,
) -> tuple[Array, Any]:
    """All layers over stacked weights in one `lax.scan`: compile time does not grow with depth.

    Args:
      config: sizes (static).
      layers: weights with leading axis L.
      x: [B, T, D] embeddings.
      angle: [B, T, H/2] rotary angles.
      look: what the tokens see, the same in every layer.
      ports: the memories' and the backbone's own.
      remat: recompute each layer in the backward pass instead of keeping its inside.
      backward_from: no gradient is wanted below this layer, and the weights are frozen: the layers under it run
        outside differentiation, and weights are read by index instead of being split from the stack.

    Returns:
      [B, T, D] before the final norm; and stacked over layers, what `look` keeps and what the ports keep.
    """
    run = _layer(config, ports, angle)

    def body(x: Array, index: Array, weights: Any) -> tuple[Array, Any]:
        return run(x, weights, index, look)

    step: Callable[..., tuple[Array, Any]] = jax.checkpoint(body) if remat else body
    if not backward_from:
        return jax.lax.scan(lambda x, layer: step(x, *layer), x, (jnp.arange(config.layers), layers))

    def by_index(x: Array, index: Array) -> tuple[Array, Any]:
        return step(x, index, jax.tree.map(lambda leaf: leaf[index], layers))

    x, below = jax.lax.scan(by_index, x, jnp.arange(backward_from))
    x, above = jax.lax.scan(by_index, jax.lax.stop_gradient(x), jnp.arange(backward_from, config.layers))
    return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, above)


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
) -> tuple[Array, tuple[Any, ...]]:
    """The same layers unrolled, each with a look of its own: for decoding, where a scan would copy the cache.

    Args:
      config, x, angle, ports: as in `scan_layers`.
      layers: one weight tree per layer (`unstack`).
      looks: one per layer: writes the new keys and values into its cache and looks at the whole.

    Returns:
      [B, T, D] before the final norm, and what each look keeps. What ports keep is of no use behind a prompt.
    """
    run, kept = _layer(config, ports, angle), []
    for index, (weights, look) in enumerate(zip(layers, looks, strict=True)):
        x, (one, _) = run(x, weights, index, look)
        kept.append(one)
    return x, tuple(kept)
