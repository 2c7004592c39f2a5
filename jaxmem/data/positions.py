"""Positions that depend on image sizes, computed on the host: M-RoPE per token and the vision tower's tables per patch.

Axis letters: T tokens, P patches. A *grid* is (frames, rows, columns) counted in patches; a *block* is one run of
placeholder tokens: one image, one temporal patch of a video (Qwen3-VL) or a whole video (Qwen2-VL, Qwen2.5-VL).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class PatchTables:
    """What the vision tower must know about each patch, in merge-block order; frames follow each other.

    Attributes:
      segments: [P] int32, 1.. one number per frame.
      coords: [P, 2] int32 (row, column) in the frame.
      table: [P, 4] int32 rows of the learned position table, the corners in the order (top, bottom) x (left, right).
      weights: [P, 4] float32 bilinear weights of these rows.
      windows: [P] int32, 1.. one number per attention window of a frame; None without windows.
    """

    segments: np.ndarray
    coords: np.ndarray
    table: np.ndarray
    weights: np.ndarray
    windows: np.ndarray | None = None


def mrope_positions(
    length: int, blocks: Sequence[tuple[int, Grid]], merge_size: int, steps: Sequence[float] = ()
) -> np.ndarray:
    """Positions of one row for the three rotary streams.

    Text counts up equally on all axes. A block that starts at position p has (p + floor(step * frame), p + row,
    p + column) for its merged cells, and the text behind it goes on behind the largest position of the block
    (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
      length: T.
      blocks: (index of the first placeholder token, grid in patches), in the order of the tokens.
      merge_size: patches per merged cell and side.
      steps: positions between the frames of each block; 1 for all when empty.

    Returns:
      [3, T] int32 (time, height, width).

    Raises:
      ValueError: blocks overlap or reach past the row.
    """
    positions = np.empty((3, length), np.int32)
    index = start = 0
    for (first, (frames, rows, columns)), step in zip(blocks, steps or [1.0] * len(blocks), strict=True):
        rows, columns = rows // merge_size, columns // merge_size
        last = first + frames * rows * columns
        if first < index or last > length:
            raise ValueError(f"block of {last - first} tokens at {first} does not fit: {index}..{length} are free")
        positions[:, index:first] = start + np.arange(first - index)
        start += first - index
        block = np.indices((frames, rows, columns)).reshape(3, -1)
        block[0] = (block[0].astype(np.float32) * np.float32(step)).astype(np.int64)  # float32 decides, as published
        positions[:, first:last] = start + block
        start += int(block.max()) + 1
        index = last
    positions[:, index:] = start + np.arange(length - index)
    return positions


def merge_order(rows: int, columns: int, merge_size: int) -> np.ndarray:
    """(row, column) of the patches of one frame, the patches of a merged cell next to each other.

    Args:
      rows: patches down; a multiple of `merge_size`.
      columns: patches across; a multiple of `merge_size`.
      merge_size: patches per merged cell and side.

    Returns:
      [rows * columns, 2] int32.
    """
    if rows % merge_size or columns % merge_size:
        raise ValueError(f"a grid of {rows}x{columns} patches is not divisible by merge_size {merge_size}")
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    cells = grid.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
    return cells.swapaxes(1, 2).reshape(-1, 2).astype(np.int32)


def _stretch(index: np.ndarray, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours [n, 2] and weights [n, 2] of `linspace(0, side - 1, count)[index]` in a table of length `side`."""
    span = max(count - 1, 1)
    below, rest = np.divmod(index.astype(np.int64) * (side - 1), span)  # exact: no rounding decides a neighbour
    above = np.minimum(below + 1, side - 1)
    fraction = rest / span
    return np.stack([below, above], -1), np.stack([1 - fraction, fraction], -1)


def patch_tables(grids: Sequence[Grid], side: int, merge_size: int, window: int = 0) -> PatchTables:
    """Tables of all patches of one row, frame after frame.

    Args:
      grids: one per image or video, in patches.
      side: the learned position table has side * side rows; 0 without a table.
      merge_size: patches per merged cell and side.
      window: side of an attention window in merged cells; 0 without windows.

    Returns:
      PatchTables with P = sum of frames * rows * columns; P is 0 without grids.
    """
    frames = [(rows, columns) for count, rows, columns in grids for _ in range(count)]
    windows = _windows(frames, merge_size, window) if window else None
    if not frames:
        coords, table = (np.zeros((0, width), np.int32) for width in (2, 4))
        return PatchTables(np.zeros(0, np.int32), coords, table, np.zeros((0, 4), np.float32), windows)
    parts = [_frame(rows, columns, side, merge_size) for rows, columns in frames]
    return PatchTables(
        segments=np.repeat(np.arange(1, len(frames) + 1, dtype=np.int32), [rows * columns for rows, columns in frames]),
        coords=np.concatenate([coords for coords, _, _ in parts]),
        table=np.concatenate([table for _, table, _ in parts]),
        weights=np.concatenate([weights for _, _, weights in parts]),
        windows=windows,
    )


def _windows(frames: Sequence[tuple[int, int]], merge_size: int, window: int) -> np.ndarray:
    """[P] int32 number of each patch's window, counted through all frames; windows at the edges are smaller."""
    side, done, numbers = merge_size * window, 1, [np.zeros(0, np.int32)]
    for rows, columns in frames:
        across = -(-columns // side)
        down, right = (merge_order(rows, columns, merge_size) // side).T
        numbers.append((done + down * across + right).astype(np.int32))
        done += -(-rows // side) * across
    return np.concatenate(numbers)


@functools.lru_cache(maxsize=64)
def _frame(rows: int, columns: int, side: int, merge_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates [n, 2], table rows [n, 4] and weights [n, 4] of one frame; shared, so callers copy."""
    coords = merge_order(rows, columns, merge_size)
    if not side:
        return coords, np.zeros((len(coords), 4), np.int32), np.zeros((len(coords), 4), np.float32)
    vertical, down = _stretch(coords[:, 0], rows, side)
    horizontal, across = _stretch(coords[:, 1], columns, side)
    table = vertical[:, :, None] * side + horizontal[:, None, :]
    weights = down[:, :, None] * across[:, None, :]
    return coords, table.reshape(-1, 4).astype(np.int32), weights.reshape(-1, 4).astype(np.float32)
