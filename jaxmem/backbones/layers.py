"""The Flax modules that the towers are made of. Weights keep the dtype they were loaded in; norms run in float32."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.rope import rotate

WEIGHT = nn.initializers.normal(0.02)


class Linear(nn.Module):
    """x @ kernel (+ bias) in the dtype of x, whatever dtype the weights are kept in: [..., in] -> [..., features]."""

    features: int
    use_bias: bool = False
    kernel_init: Callable = WEIGHT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., features]."""
        y = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


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
    """down(silu(gate(x)) * up(x)), bias-free: [..., D] -> [..., D]."""

    width: int
    kernel_init: Callable = WEIGHT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        linear = lambda features, name: Linear(features, kernel_init=self.kernel_init, name=name)  # noqa: E731
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
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    return out.reshape(*query.shape[:2], -1)


Store = Callable[[Array, Array], tuple[Array, Array]]
"""Takes the new keys and values [B, T, K, H]; returns all that the queries may look at, [B, S, K, H]."""


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys (Qwen3)."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, angle: Array, mask: Array, store: Store) -> tuple[Array, tuple[Array, Array, Array]]:
        """x [B, T, D], angle [B, T, H/2], mask [B, T, S] -> output [B, T, D] and (query, keys, values)."""

        def split(name: str, heads: int) -> Array:
            return Linear(heads * self.head_dim, name=name)(x).reshape(*x.shape[:2], heads, self.head_dim)

        query = rotate(RMSNorm(self.eps, name="q_norm")(split("q", self.heads)), angle)
        key = rotate(RMSNorm(self.eps, name="k_norm")(split("k", self.kv_heads)), angle)
        keys, values = store(key, split("v", self.kv_heads))
        out = Linear(x.shape[-1], name="o")(attend(query, keys, values, mask))
        return out, (query, keys, values)
