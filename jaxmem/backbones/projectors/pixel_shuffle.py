"""InternVL's pixel shuffle: the patches of a cell side by side on the channel axis, then LayerNorm and MLP.

Axis letters: B tiles, P patches, C width of the tower, N' tokens, D width of the decoder.
"""

from __future__ import annotations

import flax.linen as nn

from jaxmem.backbones import cells
from jaxmem.backbones.batch import Array
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import Norm, TwoLayer


class PixelShuffle(nn.Module):
    """Channels in the order (row in the cell, column in the cell, C), InternVL's second version; zeros over the border.

    What lies over the border counts in the LayerNorm, as a patch of zeros.
    """

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, N', D]."""
        c = self.config
        packed, _ = cells.pack(features, c.side, c.ratio)
        x = Norm(c.norm_eps, name="norm")(packed.reshape(*packed.shape[:2], -1))
        return TwoLayer(c.out_width, c.act, c.bias, name="mlp")(x)
