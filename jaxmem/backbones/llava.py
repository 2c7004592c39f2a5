"""LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower over tiles, a projector, and a decoder of its own.

A row's tiles lie side by side on its patch axis, side^2 patches each. The visual rows are one row of `image_newline`,
which stands behind every line of an image's grid, and the N' tokens of every tile; how they stand in the prompt
(thumbnail, stitched and unpadded lines) is an index made on the host (`jaxmem.data.anyres`).

Parameters: those of a decoder, visual (`vit.init`), projector (`projectors.init`) and newline [D].
Axis letters: B rows, L tiles of a row, P = L side^2 patches, M = 1 + L N' visual rows, W tower width, D decoder width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import projectors, qwen, vit
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.llava_config import MODEL_TYPES, TileVision, config_from_hf
from jaxmem.backbones.ports import Ports
from jaxmem.backbones.qwen import embed, rotary_angles
from jaxmem.backbones.vision import Cells, Visual
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError

__all__ = [
    "MODEL_TYPES", "cells", "config_from_hf", "embed", "init", "own_ports", "rotary_angles", "see", "shapes"
]  # fmt: skip


def init(key: Array, config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """Random weights in the layout of `base`; the newline is N(0, 1/D), as published."""
    *keys, tower, between = jax.random.split(key, 5)
    base = qwen.init_decoder(keys, config.text) | {"visual": vit.init(tower, config.vision.tower)}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base | fresh(between, config))


def fresh(key: Array, config: BackboneConfig) -> dict[str, Any]:
    """What joins a tower and a decoder, in float32: a random projector and newline."""
    projector, line = jax.random.split(key)
    width = config.text.width
    return {
        "projector": projectors.init(projector, config.vision.projector),
        "newline": jax.random.normal(line, (width,)) * width**-0.5,
    }


def shapes(config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of `base` as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, dtype))


def see(
    config: BackboneConfig, base: Any, batch: Batch, *, remat: bool = False, levels: tuple[int, ...] = ()
) -> Visual | None:
    """The tiles of every row through tower and projector, once per prompt.

    Args:
      config: static.
      base: its weights.
      batch: P a multiple of a tile's patches; None comes back for a batch whose patch axis is empty.
      remat: a backward pass computes the tower's blocks once more.
      levels: hidden states of the tower that a memory reads (`vit.forward`).

    Returns:
      Visual with M = 1 + L N' rows, and its levels [B, P, W].
    """
    vision: TileVision = config.vision
    rows, count = batch.patches.shape[:2]
    if not count:
        return None
    if count % vision.tile_patches:
        raise ConfigError(f"{count} patches of a row are no whole tiles of {vision.tile_patches}")
    patches = jnp.asarray(batch.patches).reshape(-1, vision.tile_patches, vision.patch_dim)
    own, further = len(vision.feature_layers), vision.projector.layers
    wanted = (*vision.feature_layers, *further, *levels)
    states = [_patches(vision, x) for x in vit.forward(vision.tower, base["visual"], patches, wanted, remat=remat)]
    features = jnp.concatenate(states[:own], axis=-1)
    tokens = projectors.project(vision.projector, base["projector"], features, tuple(states[own : own + len(further)]))
    tokens = tokens.reshape(rows, -1, tokens.shape[-1])
    line = jnp.broadcast_to(base["newline"].astype(tokens.dtype), (rows, 1, tokens.shape[-1]))
    return Visual(
        rows=constrain(jnp.concatenate([line, tokens], axis=1), "visual"),
        deepstack=jnp.zeros((0, *tokens.shape), tokens.dtype),
        levels={
            level: x.reshape(rows, count, -1) for level, x in zip(levels, states[own + len(further) :], strict=True)
        },
    )


def _patches(vision: TileVision, states: Array) -> Array:
    """Hidden states without the class token."""
    return states[:, 1:] if vision.tower.class_token else states


def cells(config: BackboneConfig) -> Cells:
    """Which patches each visual row stands for.

    Raises:
      ConfigError: the projector has no grid.
    """
    projector = config.vision.projector
    if projector.cell is None:
        raise ConfigError(
            f"the projector {projector.name!r} has no grid of tokens that stand for a region of their own; use one with"
            " such a grid (avgpool, tokenpacker, pixel_shuffle), or attention to whole tiles (local=False)"
        )
    return Cells(projector.side, projector.cell, first=1)


def own_ports(visual: Visual | None, batch: Batch) -> Ports:
    """None."""
    return Ports()
