"""What several projectors are made of. Weights keep their dtype; norms, means and softmax run in float32.

Axis letters: B tiles, T queries, S keys, W width, H and h' patches and tokens per side.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import cells
from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import WEIGHT, Linear, attend
from jaxmem.backbones.projectors.config import ACTS


class TwoLayer(nn.Module):
    """fc2(act(fc1(x))), both as wide as the result: [..., C] -> [..., D]."""

    width: int
    act: str = "gelu"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., D]."""
        hidden = ACTS[self.act](Linear(self.width, self.use_bias, name="fc1")(x))
        return Linear(self.width, self.use_bias, name="fc2")(hidden)


class Norm(nn.Module):
    """LayerNorm over the last axis in float32, returned in the dtype of x: [..., W] -> [..., W]."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., W] -> [..., W]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Depthwise(nn.Module):
    """A 3x3 convolution of every channel by itself, with zeros around: [B, h, w, W] -> the same.

    It is nine shifted products, summed in float32; XLA's own grouped convolution is many times slower on CPUs.
    """

    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, W] -> [B, h, w, W]."""
        height, channels = x.shape[1], x.shape[-1]
        kernel = self.param("kernel", WEIGHT, (3, 3, 1, channels)).astype(jnp.float32)
        wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
        above, here, below = (wide[:, i : i + height] for i in range(3))
        column = lambda j: above * kernel[0, j, 0] + here * kernel[1, j, 0] + below * kernel[2, j, 0]  # noqa: E731
        y = column(0)[:, :, :-2] + column(1)[:, :, 1:-1] + column(2)[:, :, 2:]
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (channels,)).astype(jnp.float32)
        return y.astype(x.dtype)


def look(query: Array, key: Array, value: Array, heads: int) -> Array:
    """Multi-head attention of every query to every key: [B, T, W], two of [B, S, W] -> [B, T, W]."""
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    return attend(query, key, value, jnp.ones((1, query.shape[1], key.shape[1]), bool))


def square(x: Array) -> Array:
    """[B, h^2, W] -> [B, h, h, W]."""
    side = round(x.shape[1] ** 0.5)
    return x.reshape(len(x), side, side, -1)


def flat(x: Array) -> Array:
    """[B, h, w, W] -> [B, h * w, W], row by row."""
    return x.reshape(len(x), -1, x.shape[-1])


def cell_means(features: Array, side: int, ratio: int) -> Array:
    """The mean of the patches that every cell has: average pooling in ceil mode that does not count padding.

    Args:
      features: [B, side^2, C].
      side: H.
      ratio: r.

    Returns:
      [B, ceil(H / r)^2, C].
    """
    packed, mask = cells.pack(features, side, ratio)
    return (jnp.sum(packed, axis=-2, dtype=jnp.float32) / mask.sum(1)[:, None]).astype(features.dtype)


def cell_centres(features: Array, side: int, ratio: int) -> Array:
    """What stands in the middle of every cell: the centre patch of an odd ratio, the mean of four of an even one.

    For a ratio that divides the side it is bilinear resizing without antialiasing and without aligned corners. The
    centre of a cell that reaches over the border is looked for in the tile, with the border repeated.

    Args:
      features: [B, side^2, C].
      side: H.
      ratio: r.

    Returns:
      [B, ceil(H / r)^2, C].
    """
    count = cells.per_side(side, ratio)
    over = (0, count * ratio - side)
    grown = jnp.pad(square(features).astype(jnp.float32), ((0, 0), over, over, (0, 0)), mode="edge")
    parts = grown.reshape(len(features), count, ratio, count, ratio, -1)
    low, high = (ratio - 1) // 2, ratio // 2
    rows = (parts[:, :, low] + parts[:, :, high]) / 2
    return flat((rows[:, :, :, low] + rows[:, :, :, high]) / 2).astype(features.dtype)


def adaptive_means(features: Array, side: int, grid: int) -> Array:
    """Means over the bins [floor(i H / h'), ceil((i + 1) H / h')), which overlap where h' does not divide H.

    Args:
      features: [B, side^2, C].
      side: H.
      grid: h'.

    Returns:
      [B, h'^2, C].
    """
    start, stop = np.arange(grid) * side // grid, -(-np.arange(1, grid + 1) * side // grid)
    inside = (np.arange(side) >= start[:, None]) & (np.arange(side) < stop[:, None])
    weights = (inside / (stop - start)[:, None]).astype(np.float32)
    found = jnp.einsum(
        "ri,cj,bijw->brcw", weights, weights, square(features).astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return flat(found).astype(features.dtype)
