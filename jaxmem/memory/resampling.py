"""The layers of Vision Remember as Flax modules: local cross-attention of tokens to features, and attention of tokens.

Both return what is added to the tokens, in front of the gate. Softmaxes and norms run in float32.
Axis letters: B rows, M visual rows, K keys of a window, C channels of a feature, D model width, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import FAN_IN, WEIGHT, Linear, attend, row_blocks

MASKED = -1e30
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """Sizes of both layers and what the cross-attention computes.

    Attributes:
      width: D.
      features: C.
      keys: K of a window; 0 for attention to whole tiles.
      inner: N * H.
      heads: N.
      impl: "direct" projects every key; "absorbed" projects the queries to the features instead, which is the same
        function with another order of products.
      positions: inside a window: a learned "bias" of the scores [N, K], an "embedding" [K, C] that is added to the
        features, or "none".
      saliency: "bias" adds a learned score per key and head that does not depend on the query; "none".
      initialiser: of maps, "normal" N(0, 0.02^2), or "fan_in" N(0, 1/in), for narrow models.
    """

    width: int
    features: int
    keys: int
    inner: int
    heads: int
    impl: Literal["direct", "absorbed"] = "direct"
    positions: Literal["bias", "embedding", "none"] = "bias"
    saliency: Literal["none", "bias"] = "none"
    initialiser: Literal["normal", "fan_in"] = "normal"

    @property
    def maps(self) -> nn.initializers.Initializer:
        """How kernels start."""
        return FAN_IN if self.initialiser == "fan_in" else WEIGHT

    @property
    def head_dim(self) -> int:
        """H."""
        return self.inner // self.heads


def norm(name: str) -> nn.LayerNorm:
    """LayerNorm with scale and bias, and a variance in two passes."""
    return nn.LayerNorm(EPS, use_fast_variance=False, name=name)


class _Map(nn.Module):
    """The kernel [in, N, H] of a map to heads, without a bias: a bias of keys changes nothing behind a softmax."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, width: int, dtype: Any) -> Array:
        s = self.settings
        kernel = self.param("kernel", s.maps, (width, s.inner)).astype(dtype)
        return kernel.reshape(width, s.heads, s.head_dim)


class CrossAttention(nn.Module):
    """Every token asks the features of its own window (SELA of v1; the Token-Feature Cross-Attention Layer of v2).

    s = (LN(x) Wq)(f Wk)^T / sqrt(H) + bias, a = softmax over the window, o = a f Wv, added: o Wo + b; f = LN(features).
    """

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array, windows: Array, mask: Array) -> Array:
        """What is added to the tokens.

        Args:
          x: [B, M, D].
          windows: [B, M, K, C].
          mask: [B, M, K] bool, keys that exist; a window without any sees all of its keys.

        Returns:
          [B, M, D] in the dtype of x.
        """
        s = self.settings
        query = jnp.einsum("bmd,dnh->bmnh", norm("norm_query")(x).astype(x.dtype), _Map(s, name="q")(s.width, x.dtype))
        seen = self._features(windows, x.dtype)
        to_key, to_value = _Map(s, name="k")(s.features, x.dtype), _Map(s, name="v")(s.features, x.dtype)
        bias = self._bias(seen)
        if s.impl == "absorbed":
            scores = jnp.einsum("bmnc,bmkc->bmnk", jnp.einsum("bmnh,cnh->bmnc", query, to_key), seen)
            mixed = jnp.einsum("bmnk,bmkc->bmnc", _weights(s, scores, bias, mask).astype(x.dtype), seen)
            found = jnp.einsum("bmnc,cnh->bmnh", mixed, to_value)
        else:
            keys, values = (jnp.einsum("bmkc,cnh->bmknh", seen, kernel) for kernel in (to_key, to_value))
            scores = jnp.einsum("bmnh,bmknh->bmnk", query, keys)
            found = jnp.einsum("bmnk,bmknh->bmnh", _weights(s, scores, bias, mask).astype(x.dtype), values)
        return Linear(s.width, use_bias=True, kernel_init=s.maps, name="o")(found.reshape(*x.shape[:2], s.inner))

    def _features(self, windows: Array, dtype: Any) -> Array:
        """Normed features, with positions in the window where they are embedded."""
        seen = norm("norm_key")(windows).astype(dtype)
        if self.settings.positions != "embedding":
            return seen
        shape = (self.settings.keys, self.settings.features)
        return seen + self.param("position", nn.initializers.zeros, shape).astype(dtype)

    def _bias(self, seen: Array) -> Array | float:
        """What is added to the scores [B, M, N, K], float32."""
        s, bias = self.settings, jnp.zeros((), jnp.float32)
        if s.positions == "bias":
            bias = bias + self.param("position", nn.initializers.zeros, (s.heads, s.keys)).astype(jnp.float32)
        if s.saliency == "bias":
            kernel = self.param("saliency", nn.initializers.zeros, (s.features, s.heads)).astype(seen.dtype)
            bias = bias + jnp.einsum("bmkc,cn->bmnk", seen, kernel).astype(jnp.float32)
        return bias


def _weights(s: LayerSettings, scores: Array, bias: Array | float, mask: Array) -> Array:
    """float32 softmax over the keys of a window: scores [B, M, N, K], mask [B, M, K]."""
    mask = mask | ~mask.any(axis=-1, keepdims=True)
    scaled = scores.astype(jnp.float32) * s.head_dim**-0.5 + bias
    return jax.nn.softmax(jnp.where(mask[:, :, None], scaled, MASKED), axis=-1)


class WholeTiles(nn.Module):
    """The same parameters asked over all features that a mask allows: for projectors without a grid of tokens."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array, features: Array, mask: Array) -> Array:
        """x [B, M, D], features [B, P, C], mask [B, M, P] bool -> [B, M, D]."""
        s = self.settings
        query = jnp.einsum("bmd,dnh->bmnh", norm("norm_query")(x).astype(x.dtype), _Map(s, name="q")(s.width, x.dtype))
        seen = norm("norm_key")(features).astype(x.dtype)
        key, value = (jnp.einsum("bpc,cnh->bpnh", seen, _Map(s, name=name)(s.features, x.dtype)) for name in ("k", "v"))
        found = row_blocks(lambda some: attend(some[0], key, value, some[1]), (query, mask))
        return Linear(s.width, use_bias=True, kernel_init=s.maps, name="o")(found)


class SelfAttention(nn.Module):
    """Tokens of an image ask each other in both directions, and a token that stands for the question (v2)."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array, text: Array | None, images: Array) -> Array:
        """What is added to the tokens.

        Args:
          x: [B, M, D].
          text: [B, 1, D] the question's token, which every token sees; None without one.
          images: [B, M] int32, the image of each row, 0 for rows that stand for no token.

        Returns:
          [B, M, D] in the dtype of x.
        """
        s = self.settings
        all_, known = x, images
        if text is not None:
            all_ = jnp.concatenate([x, text.astype(x.dtype)], axis=1)
            known = jnp.concatenate([images, jnp.full_like(images[:, :1], -1)], axis=1)
        normed = norm("norm")(all_).astype(x.dtype)
        query, key, value = (
            jnp.einsum("bmd,dnh->bmnh", normed, _Map(s, name=name)(s.width, x.dtype)) for name in "qkv"
        )

        def some(piece: Any) -> Array:
            asking, own = piece
            same = (own[:, :, None] == known[:, None]) & (own > 0)[:, :, None]
            return attend(asking, key, value, same | (known == -1)[:, None])

        found = row_blocks(some, (query[:, : x.shape[1]], images))
        return Linear(s.width, use_bias=True, kernel_init=s.maps, name="o")(found)


class FeedForward(nn.Module):
    """Behind the cross-attention, optional: D -> inner -> D with GELU; the second map starts at zero."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, M, D] -> [B, M, D]."""
        s = self.settings
        hidden = Linear(s.inner, use_bias=True, kernel_init=s.maps, name="fc1")(norm("norm")(x).astype(x.dtype))
        zeros = nn.initializers.zeros
        return Linear(s.width, use_bias=True, kernel_init=zeros, name="fc2")(jax.nn.gelu(hidden, approximate=False))
