"""Patches of a square tile in the cells of a coarser grid: entry n of the result holds the patches that token n covers.

Cell (i, j) of ratio r owns the rows [i r, (i + 1) r) and the columns [j r, (j + 1) r); cells are counted row by row,
and so are the patches of a cell. Where the ratio does not divide the side, the last cells reach over the lower and
right border (windows in ceil mode), and a mask says which patches are there. Nothing is gathered: cells are reshapes,
cells with a margin are slices.

Axis letters: N' cells, K patches of a cell, C channels; H' = ceil(side / r) cells per side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.batch import Array
from jaxmem.errors import ConfigError, DataError


def per_side(side: int, ratio: int) -> int:
    """H' = ceil(side / ratio). Raises ConfigError unless 1 <= ratio <= side."""
    if not 1 <= ratio <= side:
        raise ConfigError(f"ratio {ratio}: a tile of {side}x{side} patches has cells of 1 to {side} patches per side")
    return -(-side // ratio)


def pack(features: Array, side: int, ratio: int) -> tuple[Array, np.ndarray]:
    """The patches of every cell.

    Args:
      features: [..., side^2, C], row by row.
      side: patches per side of the tile.
      ratio: r, patches per side of a cell.

    Returns:
      [..., N', r^2, C], zeros where there is no patch, and [N', r^2] bool, True where there is one.

    Raises:
      ConfigError: a ratio that does not fit.
      DataError: features of another shape.
    """
    return _cut(_square(features, side), ratio), _mask(side, ratio, 0)


def unpack(cells: Array, side: int, ratio: int) -> Array:
    """The inverse of `pack`: [..., N', r^2, C] -> [..., side^2, C]; what lies over the border is dropped.

    Raises:
      ConfigError: a ratio that does not fit.
      DataError: cells of another shape.
    """
    count, lead = per_side(side, ratio), cells.shape[:-3]
    if cells.ndim < 3 or cells.shape[-3:-1] != (count**2, ratio**2):
        raise DataError(f"cells {cells.shape} are not [..., {count**2}, {ratio**2}, C], those of {side}x{side} patches")
    square = cells.reshape(*lead, count, count, ratio, ratio, -1).swapaxes(-4, -3)
    square = square.reshape(*lead, count * ratio, count * ratio, -1)
    return square[..., :side, :side, :].reshape(*lead, side**2, -1)


def halo(features: Array, side: int, ratio: int, margin: int) -> tuple[Array, np.ndarray]:
    """The patches of every cell and those at most `margin` around it.

    Args:
      features: [..., side^2, C], row by row.
      side: patches per side of the tile.
      ratio: r, patches per side of a cell.
      margin: m; 0 is `pack`.

    Returns:
      [..., N', (r + 2 m)^2, C], zeros where there is no patch, and [N', (r + 2 m)^2] bool, True where there is one.

    Raises:
      ConfigError: a ratio or a margin that does not fit.
      DataError: features of another shape.
    """
    if margin < 0:
        raise ConfigError(f"margin {margin}: must be at least 0")
    if margin == 0:
        return pack(features, side, ratio)
    square, mask = _square(features, side), _mask(side, ratio, margin)
    over, reach = per_side(side, ratio) * ratio - side + margin, ratio + 2 * margin
    padded = jnp.pad(square, ((0, 0),) * (square.ndim - 3) + ((margin, over), (margin, over), (0, 0)))
    rows = _every(padded, padded.ndim - 3, ratio, reach)  # [..., H', R, W, C]
    both = _every(rows, rows.ndim - 2, ratio, reach)  # [..., H', R, W', R, C]
    return both.swapaxes(-4, -3).reshape(*square.shape[:-3], *mask.shape, square.shape[-1]), mask


def _square(features: Array, side: int) -> Array:
    """[..., side^2, C] -> [..., side, side, C]; DataError for another shape."""
    if features.ndim < 2 or features.shape[-2] != side**2:
        raise DataError(f"features {features.shape} are not [..., {side**2}, C], those of {side}x{side} patches")
    return features.reshape(*features.shape[:-2], side, side, features.shape[-1])


def _cut(square: Array, ratio: int) -> Array:
    """[..., side, side, C] -> [..., N', r^2, C], padded with zeros below and to the right."""
    *lead, side, _, width = square.shape
    count = per_side(side, ratio)
    if over := count * ratio - side:
        square = jnp.pad(square, ((0, 0),) * len(lead) + ((0, over), (0, over), (0, 0)))
    parts = square.reshape(*lead, count, ratio, count, ratio, width).swapaxes(-4, -3)
    return parts.reshape(*lead, count**2, ratio**2, width)


def _mask(side: int, ratio: int, margin: int) -> np.ndarray:
    """[N', (r + 2 m)^2] bool: which places of every cell lie inside the tile."""
    places = np.arange(per_side(side, ratio))[:, None] * ratio + np.arange(-margin, ratio + margin)
    inside = (places >= 0) & (places < side)
    return (inside[:, None, :, None] & inside[None, :, None, :]).reshape(len(places) ** 2, -1)


def _every(x: Array, axis: int, step: int, reach: int) -> Array:
    """Windows of `reach` entries, `step` apart, along one axis: [..., S, ...] -> [..., H', reach, ...]."""
    span = (x.shape[axis] - reach) // step * step + 1
    cuts = [jax.lax.slice_in_dim(x, start, start + span, step, axis) for start in range(reach)]
    return jnp.stack(cuts, axis=axis + 1)
