"""MobileVLM V2's lightweight downsample projector, LDPv2 (arXiv 2402.03766).

Axis letters: B tiles, P patches, C width of the tower, N' tokens, D width of the decoder.
"""

from __future__ import annotations

import math

import flax.linen as nn

from jaxmem.backbones.batch import Array
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import Depthwise, TwoLayer, adaptive_means, flat, square


class LDPv2(nn.Module):
    """The MLP of every patch, pooled to h' x h' tokens, plus a depthwise convolution that tells their places."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, N', D]."""
        c = self.config
        x = TwoLayer(c.out_width, c.act, c.bias, name="mlp")(features)
        x = adaptive_means(x, c.side, math.isqrt(c.queries))
        return x + flat(Depthwise(use_bias=True, name="peg")(square(x)))
