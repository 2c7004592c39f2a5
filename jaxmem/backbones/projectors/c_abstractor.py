"""Honeybee's C-Abstractor (arXiv 2312.06742): convolutional blocks before and after pooling to a square of tokens.

Its blocks are RegNet's bottlenecks with a bottleneck ratio of 1, depthwise 3x3 convolutions, squeeze-and-excitation
behind them, SiLU, and LayerNorm over the channels.

Axis letters: B tiles, P patches, C width of the tower, W inner width, N' tokens, D width of the decoder.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import WEIGHT, Linear
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import Depthwise, Norm, TwoLayer, adaptive_means, flat, square

SQUEEZE = 0.25
"""Hidden width of squeeze-and-excitation, in the width that enters the block."""


class CAbstractor(nn.Module):
    """Learned positions, blocks, adaptive average pooling, blocks, and a two-layer MLP with SiLU."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, N', D]."""
        c = self.config
        x = features + self.param("pos_emb", WEIGHT, features.shape[1:]).astype(features.dtype)
        x = flat(Stage(c, name="before")(square(x)))
        x = adaptive_means(x, c.side, math.isqrt(c.queries))
        x = flat(Stage(c, name="after")(square(x)))
        return TwoLayer(c.out_width, "silu", c.bias, name="readout")(x)


class Stage(nn.Module):
    """Blocks one after the other: [B, h, w, C] -> [B, h, w, W]."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, C] -> [B, h, w, W]."""
        for number in range(self.config.depth):
            x = Block(self.config, name=f"b{number + 1}")(x)
        return x


class Block(nn.Module):
    """silu(bottleneck(x) + x); where the width changes, x goes through a map of its own."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, C] -> [B, h, w, W]."""
        width = self.config.width
        norm = lambda name, x: Norm(self.config.norm_eps, name=f"{name}_norm")(x)  # noqa: E731
        y = jax.nn.silu(norm("conv1", Linear(width, name="conv1")(x)))
        y = jax.nn.silu(norm("conv2", Depthwise(name="conv2")(y)))
        y = Excite(round(SQUEEZE * x.shape[-1]), name="se")(y)
        y = norm("conv3", Linear(width, name="conv3")(y))
        if x.shape[-1] != width:
            x = norm("shortcut", Linear(width, name="shortcut")(x))
        return jax.nn.silu(x + y)


class Excite(nn.Module):
    """Squeeze-and-excitation: x * sigmoid(fc2(silu(fc1(mean over places)))), [B, h, w, W] -> the same."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, W] -> [B, h, w, W]."""
        mean = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        hidden = jax.nn.silu(Linear(self.width, True, name="fc1")(mean))
        return x * jax.nn.sigmoid(Linear(x.shape[-1], True, name="fc2")(hidden))
