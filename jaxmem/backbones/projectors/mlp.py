"""LLaVA's two-layer MLP, alone and behind average pooling (DeCo).

Axis letters: B tiles, P patches, C width of the tower, N' tokens, D width of the decoder.
"""

from __future__ import annotations

import flax.linen as nn

from jaxmem.backbones.batch import Array
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import TwoLayer, cell_means


class MLP(nn.Module):
    """Every patch by itself: W2 act(W1 x) (LLaVA-1.5)."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, P, D]."""
        return TwoLayer(self.config.out_width, self.config.act, self.config.bias, name="mlp")(features)


class AveragePool(nn.Module):
    """The mean of every cell, then the MLP (DeCo, arXiv 2405.20985)."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, N', D]."""
        c = self.config
        return TwoLayer(c.out_width, c.act, c.bias, name="mlp")(cell_means(features, c.side, c.ratio))
