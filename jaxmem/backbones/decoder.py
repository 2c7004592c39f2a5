"""One decoder for all backbones: pre-norm layers, run as one scan over stacked weights or as an unrolled loop.

Axis letters: B rows, T new tokens, S tokens that can be seen, K key heads, H head width, D model width, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import ports as port_lib
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import TextConfig
from jaxmem.backbones.layers import Attention, RMSNorm, Store, SwiGLU
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


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + (ffn(norm(x)) + branches(x)); as published, sums in this order."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, x: Array, angle: Array, mask: Array, store: Store, branches: Callable[[Array, Array, Array], Array]
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """x [B, T, D] -> [B, T, D] and the layer's (query, keys, values)."""
        c = self.config
        attention = Attention(c.heads, c.kv_heads, c.head_dim, c.norm_eps, name="attention")
        attended, seen = attention(RMSNorm(c.norm_eps, name="attention_norm")(x), angle, mask, store)
        x = x + attended
        normed = RMSNorm(c.norm_eps, name="ffn_norm")(x)
        return x + branches(SwiGLU(c.mlp_width, name="ffn")(normed), x, normed), seen


def _as_they_are(key: Array, value: Array) -> tuple[Array, Array]:
    """The Store of a pass without a cache: queries see the new keys and nothing else."""
    return key, value


def _layer(config: TextConfig, ports: Ports, angle: Array, mask: Array) -> Callable:
    """One layer with its ports as a function of (x, weights, index, store)."""

    def run(x: Array, weights: Any, index: Array | int, store: Store) -> tuple[Array, tuple[Array, Array, Array]]:
        branches = lambda ffn, residual, normed: port_lib.beside_ffn(ports.beside_ffn, index, ffn, residual, normed)  # noqa: E731
        out: Any = DecoderLayer(config).apply({"params": weights}, x, angle, mask, store, branches)
        return port_lib.after_layer(ports.after_layer, index, out[0]), out[1]

    return run


def scan_layers(
    config: TextConfig,
    layers: Any,
    x: Array,
    angle: Array,
    mask: Array,
    *,
    ports: Ports = NO_PORTS,
    remat: bool = False,
    backward_from: int = 0,
    observe: Observe | None = None,
) -> tuple[Array, Any]:
    """All layers over stacked weights in one `lax.scan`: compile time does not grow with depth.

    Args:
      config: sizes (static).
      layers: weights with leading axis L.
      x: [B, T, D] embeddings.
      angle: [B, T, H/2] rotary angles.
      mask: [B, T, T] bool.
      ports: the memories' and the backbone's own.
      remat: recompute each layer in the backward pass instead of keeping its inside.
      backward_from: no gradient is wanted below this layer, and the weights are frozen: the layers under it run
        outside differentiation, and weights are read by index instead of being split from the stack.
      observe: what to keep of each layer's attention, stacked over layers; None keeps nothing.

    Returns:
      [B, T, D] before the final norm, and the stacked observations.
    """
    run = _layer(config, ports, angle, mask)

    def body(x: Array, index: Array, weights: Any) -> tuple[Array, Any]:
        x, (query, keys, values) = run(x, weights, index, _as_they_are)
        return x, observe(query, keys, values, mask) if observe else None

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
    mask: Array,
    stores: tuple[Store, ...],
    *,
    ports: Ports = NO_PORTS,
) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """The same layers unrolled, each with a cache of its own: for decoding, where a scan would copy the cache.

    Args:
      config, x, angle, ports: as in `scan_layers`.
      layers: one weight tree per layer (`unstack`).
      mask: [B, T, S] bool.
      stores: per layer, puts the new keys and values into its cache and returns the whole cache.

    Returns:
      [B, T, D] before the final norm, and the updated (keys, values) per layer.
    """
    run, caches = _layer(config, ports, angle, mask), []
    for index, (weights, store) in enumerate(zip(layers, stores, strict=True)):
        x, (_, keys, values) = run(x, weights, index, store)
        caches.append((keys, values))
    return x, tuple(caches)
