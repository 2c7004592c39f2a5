"""Any-resolution tiling: the tiles of an image, and how the tokens of its tiles stand in the prompt.

An image is seen twice (LLaVA-NeXT, "Dynamic High Resolution"): whole, squeezed to one square (the thumbnail, tile 0),
and, with its shape kept, in the middle of a canvas of rows x columns tiles (tiles 1.., row by row; the fine grid). The
tokens of the fine grid are stitched to one map, the bars of the canvas are cut off, and a newline ends each row.

Sizes are (width, height), as PIL has them; canvases, pinpoints and grids are (height, width), as in transformers.

Axis letters: n tokens of an image, N' = h' w' tokens of a tile (its *visual rows*), h' = w' where a tile has a grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmem.errors import ConfigError, DataError

NEWLINE = -1
ROUNDINGS = ("hf", "original")
_ENLARGED = 1.1  # a stitched map this much over its budget, per side, is still left alone
_ALONE = np.eye(4, 1, dtype=np.float32)  # all weight on the first of four taps

Size = tuple[int, int]
Pinpoints = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the tokens of one image stand in the prompt.

    Attributes:
      tiles: (rows, columns) of the fine grid; (0, 0) for an image that is a single tile.
      rows: [n] int32, for each token the visual row it stands for, tile * N' + i * w' + j, or NEWLINE; where the map
        was scaled down, the heaviest of its taps.
      taps: [4, n] int32, the visual rows that a token is a weighted sum of, NEWLINE four times for a newline; None
        where the map was not scaled down.
      weights: [4, n] float32 of the taps: they add up to 1, or to 0 for a newline; None without taps.
    """

    tiles: tuple[int, int]
    rows: np.ndarray
    taps: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows)


def best_resolution(size: Size, pinpoints: Pinpoints) -> tuple[int, int]:
    """The canvas on which most of an image's own pixels are kept; among equals the smallest, then the first.

    Args:
      size: (width, height) of the image.
      pinpoints: canvases (height, width) to choose from.

    Returns:
      (height, width).

    Raises:
      ConfigError: no pinpoints.
      DataError: an image without area.
    """
    width, height = _area(size)
    if not len(pinpoints):
        raise ConfigError("no image_grid_pinpoints: give at least one canvas (height, width) in pixels")

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    best = max(pinpoints, key=merit)
    return int(best[0]), int(best[1])


def grid(size: Size, tile: int, pinpoints: Pinpoints) -> tuple[int, int]:
    """(rows, columns) of tiles of `tile` pixels on the best canvas of an image of `size` = (width, height).

    Raises:
      ConfigError: no pinpoints, or some that are no multiples of the tile.
      DataError: an image without area.
    """
    check_pinpoints(pinpoints, tile)
    height, width = best_resolution(size, pinpoints)
    return height // tile, width // tile


def check_pinpoints(pinpoints: Pinpoints, tile: int) -> None:
    """Raises ConfigError for canvases that tiles of `tile` pixels do not fill."""
    wrong = [list(canvas) for canvas in pinpoints if len(canvas) != 2 or any(s < 1 or s % tile for s in canvas)]
    if wrong:
        raise ConfigError(
            f"image_grid_pinpoints {wrong}: (height, width) must be positive multiples of the tile, {tile} pixels"
        )


def placed(size: Size, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of an image of `size` = (width, height) on its canvas (height, width).

    The resize keeps the shape (the free side is rounded up); what is left over is halved, the odd pixel to the right or
    below. Raises DataError for an image without area.
    """
    (width, height), (down, across) = _area(size), canvas
    if across / width < down / height:
        fitted = across, min(math.ceil(height * (across / width)), down)
    else:
        fitted = min(math.ceil(width * (down / height)), across), down
    return (across - fitted[0]) // 2, (down - fitted[1]) // 2, *fitted


def layout(
    size: Size,
    tile: int,
    pinpoints: Pinpoints,
    cells: int,
    *,
    max_tiles: int | None = None,
    newline: bool = True,
    unpad: bool = True,
    rounding: str = "hf",
) -> Layout:
    """The thumbnail's tokens, then those of the fine grid, row by row, each row with a newline behind it.

    With a projector that compresses, all of this acts on its coarser grid.

    Args:
      size: (width, height) of the image.
      tile: pixels per side of a tile.
      pinpoints: canvases (height, width), multiples of the tile.
      cells: h', tokens per side of a tile.
      max_tiles: k of `anyres_max_k` (LLaVA-OneVision): a map with the tokens of over 1.1^2 k tiles is scaled down to
        about those of k, bilinearly (half-pixel centres, no antialiasing, float32: torch's `interpolate`); None leaves
        every map as it is.
      newline: end the rows of the fine grid with newlines.
      unpad: cut off rows or columns that show only the canvas. What is cut is rounded down to whole tokens, and the
        same on both sides, so that up to one row or column too many may stay on each.
      rounding: of the length kept: "hf" to 7 decimals first, as transformers, "original" as LLaVA-NeXT's own code; they
        differ where the length is a whole number but for a float's error.

    Returns:
      A Layout. A very thin image may keep nothing of its fine grid, and is then its thumbnail alone.

    Raises:
      ConfigError: unsuitable pinpoints, cells, max_tiles or rounding.
      DataError: an image without area.
    """
    if cells < 1 or (max_tiles is not None and max_tiles < 1):
        raise ConfigError(f"cells={cells}, max_tiles={max_tiles}: both must be at least 1")
    tiles, each = grid(size, tile, pinpoints), cells**2
    fine = each + np.arange(math.prod(tiles) * each, dtype=np.int32).reshape(*tiles, cells, cells)
    fine = fine.swapaxes(1, 2).reshape(tiles[0] * cells, tiles[1] * cells)
    if unpad:
        fine = fine[_kept(size, fine.shape, rounding)]
    thumbnail, smaller = np.arange(each, dtype=np.int32), _smaller(fine.shape, cells, max_tiles)
    if smaller is None:
        return Layout(tiles, _joined(thumbnail, fine, newline, NEWLINE))
    taps, weights = _scaled(fine, smaller)
    taps = _joined(np.broadcast_to(thumbnail, (4, each)), taps, newline, NEWLINE)
    weights = _joined(np.broadcast_to(_ALONE, (4, each)), weights, newline, 0)
    rows = np.take_along_axis(taps, weights.argmax(0)[None], axis=0)[0]
    return Layout(tiles, rows, taps, weights)


def flat_layout(size: Size, tile: int, pinpoints: Pinpoints, tokens: int, *, newline: bool = True) -> Layout:
    """The layout for projectors without a grid, each tile `tokens` in an order of their own.

    The thumbnail comes first, then the tiles, whole, with a newline behind each row of tiles. There is nothing that an
    unpadding could cut, or a scaling scale.

    Raises:
      ConfigError: unsuitable pinpoints.
      DataError: an image without area.
    """
    rows, columns = grid(size, tile, pinpoints)
    order = np.arange((1 + rows * columns) * tokens, dtype=np.int32)
    fine = order[tokens:].reshape(rows, columns * tokens)
    return Layout((rows, columns), _joined(order[:tokens], fine, newline, NEWLINE))


def single_layout(tokens: int, *, newline: bool = True) -> Layout:
    """The layout of an image that is one tile of `tokens`: these, and one newline behind them."""
    rows = np.arange(tokens, dtype=np.int32)
    return Layout((0, 0), _joined(rows[:0], rows[None], newline, NEWLINE))


def inside(size: Size, tile: int, patch: int, pinpoints: Pinpoints) -> np.ndarray:
    """Which patches show some of the image: all of the thumbnail's, and those of the fine grid that any pixel is in.

    Args:
      size: (width, height) of the image.
      tile: pixels per side of a tile.
      patch: pixels per side of a patch; a tile has side = tile // patch of them, and what is left over is not seen.
      pinpoints: canvases (height, width), multiples of the tile.

    Returns:
      [1 + rows * columns, side^2] bool, False for patches that are all canvas.

    Raises:
      ConfigError: unsuitable pinpoints.
      DataError: an image without area.
    """
    rows, columns = grid(size, tile, pinpoints)
    left, top, width, height = placed(size, (rows * tile, columns * tile))
    down = _touched(rows, tile, patch, top, top + height)
    across = _touched(columns, tile, patch, left, left + width)
    fine = (down[:, None, :, None] & across[None, :, None, :]).reshape(rows * columns, -1)
    return np.concatenate([np.ones_like(fine[:1]), fine])


def inside_square(size: Size, tile: int, patch: int) -> np.ndarray:
    """[1, side^2] bool: the same for an image in the middle of a square that is resized to one tile."""
    longest = max(_area(size))
    starts = [(longest - length) // 2 for length in size]
    ends = [start + length for start, length in zip(starts, size, strict=True)]
    across, down = (
        _touched(1, tile, patch, start * tile / longest, end * tile / longest)
        for start, end in zip(starts, ends, strict=True)
    )
    return (down[0, :, None] & across[0]).reshape(1, -1)


def _area(size: Size) -> Size:
    """`size`, or DataError when it holds no pixel."""
    if min(size) < 1:
        raise DataError(f"an image of {size[0]}x{size[1]} pixels has no area; leave it out")
    return size


def _touched(tiles: int, tile: int, patch: int, start: float, end: float) -> np.ndarray:
    """[tiles, side] bool: the patches along one axis that reach into [start, end)."""
    first = np.arange(tiles)[:, None] * tile + np.arange(tile // patch) * patch
    return (first < end) & (first + patch > start)


def _kept(size: Size, shape: tuple[int, ...], rounding: str) -> tuple[slice, slice]:
    """The rows and the columns of a stitched map that are not cut off."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding {rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    (width, height), (rows, columns) = size, shape
    wide = width / height > columns / rows
    length, whole = (height * (columns / width), rows) if wide else (width * (rows / height), columns)
    margin = (whole - int(round(length, 7) if rounding == "hf" else length)) // 2
    cut, full = slice(margin, whole - margin), slice(None)
    return (cut, full) if wide else (full, cut)


def _smaller(shape: tuple[int, ...], cells: int, max_tiles: int | None) -> tuple[int, int] | None:
    """(rows, columns) that a map of `shape` is scaled down to, None where it stays."""
    if max_tiles is None:
        return None
    ratio = math.sqrt(math.prod(shape) / (max_tiles * cells**2))
    return (int(shape[0] // ratio), int(shape[1] // ratio)) if ratio > _ENLARGED else None


def _scaled(fine: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Taps and weights [4, *shape] of a map's bilinear reduction, (above, below) x (left, right)."""
    (rows, row_weights), (columns, column_weights) = map(_between, fine.shape, shape)
    taps = fine[rows[:, None, :, None], columns[None, :, None, :]]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    return taps.reshape(4, *shape), weights.reshape(4, *shape)


def _between(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """[2, new] neighbours of each new point along one axis and their float32 weights.

    Rounded where torch rounds: the step, and once more the centre, by a fused multiply-add.
    """
    step = np.float64(np.float32(old) / np.float32(new))
    centres = np.maximum((step * (np.arange(new) + 0.5) - 0.5).astype(np.float32), 0)
    low = np.floor(centres)
    share, first = centres - low, low.astype(np.int32)
    return np.stack([first, np.minimum(first + 1, old - 1)]), np.stack([1 - share, share])


def _joined(thumbnail: np.ndarray, fine: np.ndarray, newline: bool, end: int) -> np.ndarray:
    """[..., N'] and [..., h, w] -> [..., n]: the thumbnail, then the rows of `fine` with `end` behind each."""
    ended = np.pad(fine, [(0, 0)] * (fine.ndim - 1) + [(0, int(newline))], constant_values=end)
    return np.concatenate([thumbnail, ended.reshape(*fine.shape[:-2], ended.shape[-2] * ended.shape[-1])], axis=-1)
