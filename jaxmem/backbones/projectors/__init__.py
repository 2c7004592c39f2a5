"""The projectors of LLaVA-style backbones: from the features of a tile to vectors that the decoder reads as tokens.

Tokens of a projector with a grid are counted row by row. `jaxmem.checkpoints.projector_names` knows their tensors'
names.

Axis letters: B tiles, P = side^2 patches, C width of the tower, N' tokens, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.projectors.c_abstractor import CAbstractor
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.honeybee import Honeybee
from jaxmem.backbones.projectors.ldpv2 import LDPv2
from jaxmem.backbones.projectors.mlp import MLP, AveragePool
from jaxmem.backbones.projectors.perceiver import Perceiver
from jaxmem.backbones.projectors.pixel_shuffle import PixelShuffle
from jaxmem.backbones.projectors.q_former import QFormer
from jaxmem.backbones.projectors.tokenpacker import TokenPacker
from jaxmem.errors import DataError

PROJECTORS: Mapping[str, Any] = {
    "mlp": MLP,
    "avgpool": AveragePool,
    "ldpv2": LDPv2,
    "tokenpacker": TokenPacker,
    "pixel_shuffle": PixelShuffle,
    "c_abstractor": CAbstractor,
}
"""By name; each is a module of a ProjectorConfig that takes (features, levels)."""
RESAMPLERS: Mapping[str, Any] = {"perceiver": Perceiver, "honeybee": Honeybee, "q_former": QFormer}
"""By kind."""

__all__ = ["PROJECTORS", "RESAMPLERS", "ProjectorConfig", "init", "project", "shapes"]


def init(key: Array, config: ProjectorConfig) -> Any:
    """Random float32 weights: maps, positions and queries N(0, 0.02^2), a perceiver's latents N(0, 1), biases 0."""
    tile = jnp.zeros((1, config.side**2, config.in_width))
    return _module(config).init(key, tile, (tile,) * len(config.layers))["params"]


def shapes(config: ProjectorConfig) -> Any:
    """The tree of `init` as ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def project(config: ProjectorConfig, params: Any, features: Array, levels: Sequence[Array] = ()) -> Array:
    """The tokens of tiles.

    Args:
      config: static.
      params: from `init`; their dtype is the compute dtype, norms, means and softmax run in float32.
      features: [B, P, C] of the tower's main feature layer, row by row, without a class token.
      levels: the same of each of `config.layers`, in their order.

    Returns:
      [B, N', D] in the dtype of the weights.

    Raises:
      DataError: features or levels of another shape or number.
    """
    tile, names = (config.side**2, config.in_width), ", ".join(map(str, config.layers)) or "none"
    if features.ndim != 3 or features.shape[1:] != tile:
        raise DataError(f"projector {config.name!r}: features {features.shape} are not [B, {tile[0]}, {tile[1]}]")
    found = [level.shape for level in levels]
    if found != [features.shape] * len(config.layers):
        raise DataError(
            f"projector {config.name!r}: levels {found} are not one {features.shape} for each of the hidden states"
            f" {names}"
        )
    dtype = jax.tree.leaves(params)[0].dtype
    cast = [x.astype(dtype) for x in (features, *levels)]
    return _module(config).apply({"params": params}, cast[0], tuple(cast[1:]))


def _module(config: ProjectorConfig) -> nn.Module:
    """The module of a projector."""
    return (RESAMPLERS[config.kind] if config.kind else PROJECTORS[config.name])(config)
