"""Visual rows and the tokens that stand for them: what memories need that rewrite vision tokens between decoder layers.

Axis letters: B rows, T tokens, M visual rows behind those in front of the first cell, P patches, K patches of a region.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxmem.backbones import cells as windows
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.vision import Cells


def places(batch: Batch, rows: int, region: Cells) -> Array:
    """[B, M] the token that stands for each visual row, or -1 (rows of padding, and what unpadding dropped).

    `rows` counts those in front of the first cell (newlines) too; they are left out.
    """
    index = jnp.asarray(batch.visual_rows)
    row, place = jnp.arange(len(index))[:, None], jnp.arange(index.shape[1], dtype=jnp.int32)
    found = jnp.full((len(index), rows), -1, jnp.int32)
    found = found.at[row, jnp.where(index >= 0, index, rows)].set(place[None], mode="drop")
    return found[:, region.first :]


def taken(x: Array, tokens: Array) -> Array:
    """[B, T, D] at `places` -> [B, M, D]; anything where there is no token."""
    return jnp.take_along_axis(x, jnp.maximum(tokens, 0)[..., None], axis=1)


def put(x: Array, tokens: Array, rows: Array) -> Array:
    """[B, T, D] with the rows [B, M, D] at their `places`; every other token stays as it is."""
    row, place = jnp.arange(len(x))[:, None], jnp.where(tokens >= 0, tokens, x.shape[1])
    return x.at[row, place].set(rows, mode="drop")


def regions(region: Cells, features: Array, margin: int = 0) -> tuple[Array, Array | bool]:
    """What each visual row stands for: [B, P, C] -> [B, M, K, C], and which places exist.

    Args:
      region: of the backbone; without square tiles a row stands for neighbours on the patch axis, which all exist.
      features: of the patches.
      margin: patches around a cell.

    Returns:
      Zeros where a cell reaches over the border of its tile, and a mask that broadcasts to [B, M, K].
    """
    rows, patches, width = features.shape
    if not region.side:
        return features.reshape(rows, -1, region.ratio**2, width), True
    tiles = features.reshape(rows, patches // region.side**2, region.side**2, width)
    packed, exists = windows.halo(tiles, region.side, region.ratio, margin)
    return packed.reshape(rows, -1, *packed.shape[3:]), jnp.tile(jnp.asarray(exists), (tiles.shape[1], 1))
