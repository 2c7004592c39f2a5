"""The Flax modules that the towers are made of. Weights keep the dtype they were loaded in; norms run in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.rope import rotate
from jaxmem.distributed.mesh import constrain, ways

WEIGHT = nn.initializers.normal(0.02)
FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
BLOCK = 1024
"""Queries of a row (on each device of a sequence mesh) whose attention scores exist at the same time."""


class Linear(nn.Module):
    """x @ kernel (+ bias) in the dtype of x, whatever dtype the weights are kept in: [..., in] -> [..., features].

    Beside the kernel may lie a low-rank update of it (`jaxmem.adapters.lora`): lora_a, lora_b and lora_scale. Where the
    update is not to see all of its inputs, there are also lora_key, the data of a random key, and lora_rate, the share
    that it misses.
    """

    features: int
    use_bias: bool = False
    kernel_init: Callable = WEIGHT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., features]."""
        y = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b, scale = (self.get_variable("params", f"lora_{name}").astype(x.dtype) for name in ("a", "b", "scale"))
            y = y + (self._seen(x) @ a * jax.lax.stop_gradient(scale)) @ b
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y

    def _seen(self, x: Array) -> Array:
        """What of x the low-rank update sees."""
        if not self.has_variable("params", "lora_key"):
            return x
        key, rate = self.get_variable("params", "lora_key"), self.get_variable("params", "lora_rate")
        kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


def rms_normalise(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale: [..., D] -> [..., D]."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_normalise(x, self.eps) * scale.astype(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., D] -> [..., D]."""

    width: int
    kernel_init: Callable = WEIGHT
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        linear = lambda features, name: Linear(features, self.use_bias, self.kernel_init, name=name)  # noqa: E731
        gate, up = linear(self.width, "gate")(x), linear(self.width, "up")(x)
        return linear(x.shape[-1], "down")(jax.nn.silu(gate) * up)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Grouped-query attention with a float32 softmax and scale 1/sqrt(H).

    Args:
      query: [B, T, N, H]; N is a multiple of K.
      key, value: [B, S, K, H].
      mask: [B, T, S] bool, True where the query may see the key. A row without any key gives a finite value.

    Returns:
      [B, T, N * H] in the dtype of the query.
    """
    query, key, value = constrain(query, "queries"), constrain(key, "keys"), constrain(value, "keys")
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    return out.reshape(*query.shape[:2], -1)


def in_blocks(attend: Callable[[Any], Array], queries: Any, block: int | None = None) -> Array:
    """`attend(queries)`, a few queries at a time where there are many, and once more in the backward pass.

    Scores of T queries with S keys take T x S numbers; of long prompts only a block of them ever exists.

    Args:
      attend: queries with leaves [B, P, N, ...] -> [B, P, N, ...]; treats the N alike.
      queries: leaves [B, P, T, ...]; the P parts (pieces of a row, completions of a group) may lie on other devices.
      block: largest N; `BLOCK` when None.

    Returns:
      [B, P, T, ...].
    """
    parts, length = jax.tree.leaves(queries)[0].shape[1:3]
    block = block or BLOCK
    if length <= block:
        return attend(queries)
    count = -(-length // block)
    size = -(-length // count)
    pad = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, count * size - length), *((0, 0),) * (leaf.ndim - 3)))  # noqa: E731
    cut = lambda leaf: jnp.moveaxis(pad(leaf).reshape(-1, parts, count, size, *leaf.shape[3:]), 2, 0)  # noqa: E731
    found = jax.lax.map(jax.checkpoint(attend), jax.tree.map(cut, queries))
    found = jnp.moveaxis(found, 0, 2)
    return found.reshape(*found.shape[:2], count * size, *found.shape[4:])[:, :, :length]


def row_blocks(attend: Callable[[Any], Array], queries: Any) -> Array:
    """`in_blocks` for queries with leaves [B, T, ...]: every device of a sequence mesh walks through its own tokens.

    attend: leaves [B, N, ...] -> [B, N, ...], any N of the T at once.
    """
    length, parts = jax.tree.leaves(queries)[0].shape[1], ways("sequence")
    if length <= BLOCK:
        return attend(queries)
    parts = parts if length % parts == 0 else 1
    fold = lambda leaf: leaf.reshape(leaf.shape[0], parts, -1, *leaf.shape[2:])  # noqa: E731
    flat = lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])  # noqa: E731

    def some(piece: Any) -> Array:
        found = attend(jax.tree.map(flat, piece))
        return found.reshape(found.shape[0], parts, -1, *found.shape[2:])

    return flat(in_blocks(some, jax.tree.map(fold, queries)))


def attend_branches(
    query: Array, trunk: tuple[Array, Array], own: tuple[Array, Array], trunk_mask: Array, own_mask: Array
) -> Array:
    """Attention of G continuations of one prompt: one softmax over the keys they share and those of their own.

    The shared keys exist once, whatever G is.

    Args:
      query: [B, G, Q, N, H].
      trunk: keys and values [B, K, S, H] of the prompt.
      own: keys and values [B, G, K, U, H] of the continuation.
      trunk_mask: [B, G, Q, S] bool.
      own_mask: [B, G, Q, U] bool.

    Returns:
      [B, G, Q, N * H] in the dtype of the query.
    """
    heads, width = query.shape[3:]
    kv_heads, shared = trunk[0].shape[1:3]
    query = constrain(query, "branch_queries")
    trunk, own = (
        tuple(constrain(a, name) for a in pair) for pair, name in ((trunk, "trunk_keys"), (own, "branch_keys"))
    )
    parted = query.reshape(*query.shape[:3], kv_heads, heads // kv_heads, width)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = [product("bgqkrh,bksh->bkgqrs", parted, trunk[0]), product("bgqkrh,bgkuh->bkgqru", parted, own[0])]
    mask = jnp.concatenate([trunk_mask, own_mask], axis=-1)[:, None, :, :, None]
    scores = jnp.where(mask, jnp.concatenate(scores, axis=-1) * width**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = product("bkgqrs,bksh->bgqkrh", weights[..., :shared], trunk[1])
    out = out + product("bkgqru,bgkuh->bgqkrh", weights[..., shared:], own[1])
    return out.astype(query.dtype).reshape(*query.shape[:3], heads * width)


Look = Callable[[Array, Array, Array], tuple[Array, Any]]
"""How a layer's new tokens look at what there is: look(query [B, T, N, H], key, value [B, T, K, H]) -> what was found
[B, T, N * H], and what to keep of this layer (a cache, an observation, None)."""


class Attention(nn.Module):
    """Grouped-query attention, with normalised queries and keys (Qwen3) or biased queries, keys and values (Qwen2).

    Attributes:
      eps: of the norms of queries and keys; None leaves them as they are.
      use_bias: of the maps to queries, keys and values; the map back has none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float | None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array, angle: Array, look: Look) -> tuple[Array, Any]:
        """x [B, T, D], angle [B, T, H/2] -> output [B, T, D] and what `look` keeps."""

        def split(name: str, heads: int) -> Array:
            features = Linear(heads * self.head_dim, self.use_bias, name=name)(x)
            return features.reshape(*x.shape[:2], heads, self.head_dim)

        def turned(name: str, heads: int) -> Array:
            found = split(name, heads)
            return rotate(found if self.eps is None else RMSNorm(self.eps, name=f"{name}_norm")(found), angle)

        query, key = turned("q", self.heads), turned("k", self.kv_heads)
        found, kept = look(query, key, split("v", self.kv_heads))
        return Linear(x.shape[-1], name="o")(found), kept
