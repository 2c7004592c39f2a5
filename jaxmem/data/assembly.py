"""Tokens and read pictures to an `Example`: placeholders are repeated, and positions and tables are added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmem.backbones.config import VisionConfig
from jaxmem.data.example import Example
from jaxmem.data.positions import Grid, mrope_positions, patch_tables
from jaxmem.data.tiles import Tiled

Placeholders = Sequence[int]
"""Indices among a prompt's tokens, in order: one per block of a picture."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A read image or video of the Qwen-VL family.

    Attributes:
      kind: "image" or "video".
      patches: [P, C].
      grid: of all of them.
      text: what stands for it in the prompt, one placeholder per block.
      blocks: the grids of its placeholders: one, or one per temporal patch.
      step: rotary positions from one temporal patch of a block to the next.
    """

    kind: str
    patches: np.ndarray
    grid: Grid
    text: str
    blocks: tuple[Grid, ...]
    step: float = 1.0


@dataclasses.dataclass(frozen=True)
class Written:
    """A prompt before its placeholders are repeated.

    Attributes:
      tokens: [T] int32.
      mask: [T] float32, the loss mask.
      question: [T] bool, the tokens of the first user turn's text; None where nobody asks.
    """

    tokens: np.ndarray
    mask: np.ndarray
    question: np.ndarray | None = None

    def repeated(self, repeats: np.ndarray) -> dict[str, Any]:
        """The per-token fields of an Example, token i `repeats[i]` times."""
        again = {"tokens": np.repeat(self.tokens, repeats), "loss_mask": np.repeat(self.mask, repeats)}
        return again if self.question is None else again | {"question": np.repeat(self.question, repeats)}


def join_grids(prompt: Written, places: Placeholders, pictures: Sequence[Picture], vision: VisionConfig) -> Example:
    """A prompt with images of the Qwen-VL family: one token per merged visual row, in the order of the rows."""
    blocks = [(grid, picture.step) for picture in pictures for grid in picture.blocks]
    counts = [frames * rows * columns // vision.merge_unit for (frames, rows, columns), _ in blocks]
    repeats, visual, starts = _spread(len(prompt.tokens), places, counts)
    placed = [(start, grid) for start, (grid, _) in zip(starts, blocks, strict=True)]
    shapes = [(rows // vision.merge_size, columns // vision.merge_size) for (_, rows, columns), _ in blocks]
    grids = [picture.grid for picture in pictures]
    tables = patch_tables(grids, vision.table_side, vision.merge_size, vision.window)
    return Example(
        **prompt.repeated(repeats),
        positions=mrope_positions(int(repeats.sum()), placed, vision.merge_size, [step for _, step in blocks]),
        visual_rows=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
        patches=_joined([picture.patches for picture in pictures], vision.patch_dim),
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
        images=tuple(shape for shape, (grid, _) in zip(shapes, blocks, strict=True) for _ in range(grid[0])),
        patch_windows=tables.windows,
        unit=vision.merge_unit,
    )


def join_tiles(prompt: Written, places: Placeholders, pictures: Sequence[Tiled], patch_dim: int, unit: int) -> Example:
    """A prompt with tiled images of a LLaVA-style backbone.

    Visual row 0 is the backbone's `image_newline`, which many tokens stand for; the rows of the first tile follow.

    Args:
      prompt: with one placeholder per image.
      places: of the placeholders.
      pictures: the images.
      patch_dim: C.
      unit: patches of a tile.
    """
    repeats, visual, starts = _spread(len(prompt.tokens), places, [picture.layout.count for picture in pictures])
    rows, before = np.full(int(repeats.sum()), -1, np.int32), 1
    blended = any(picture.layout.taps is not None for picture in pictures)
    taps, weights = np.zeros((4, len(rows)), np.int32), np.zeros((4, len(rows)), np.float32)
    for start, picture in zip(starts, pictures, strict=True):
        span = slice(start, start + picture.layout.count)
        rows[span] = np.where(picture.layout.rows < 0, 0, picture.layout.rows + before)
        found = picture.layout.rows[None] if picture.layout.taps is None else picture.layout.taps
        share = np.eye(4, 1, dtype=np.float32) if picture.layout.weights is None else picture.layout.weights
        taps[:, span] = np.where(found < 0, 0, found + before)
        weights[:, span] = np.where(picture.layout.rows < 0, np.eye(4, 1, dtype=np.float32), share)
        before += picture.rows
    count = sum(len(picture.patches) for picture in pictures)
    inside = np.concatenate([np.zeros(0, bool), *(picture.inside for picture in pictures)])
    order = np.arange(len(rows), dtype=np.int32)
    return Example(
        **prompt.repeated(repeats),
        positions=np.broadcast_to(order, (3, len(rows))).copy(),
        visual_rows=rows,
        patches=_joined([picture.patches for picture in pictures], patch_dim),
        patch_segments=np.where(inside, np.arange(count) // unit + 1, 0).astype(np.int32),
        patch_coords=np.zeros((count, 2), np.int32),
        patch_table=np.zeros((count, 4), np.int32),
        patch_weights=np.zeros((count, 4), np.float32),
        images=tuple((1, picture.layout.count) for picture in pictures),
        patch_images=np.concatenate(
            [np.zeros(0, np.int32), *(np.full(len(one.patches), i, np.int32) for i, one in enumerate(pictures, 1))]
        ),
        visual_taps=taps if blended else None,
        visual_weights=weights if blended else None,
        unit=unit,
    )


def join_text(prompt: Written) -> Example:
    """A prompt of a decoder without a vision tower."""
    return join_tiles(prompt, (), (), 0, 1)


def _spread(count: int, places: Placeholders, repeats_of: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """How often each of `count` tokens stands in the row, which of the row's are visual [T], and where blocks start."""
    repeats, marked = np.ones(count, np.int64), np.zeros(count, bool)
    repeats[list(places)], marked[list(places)] = repeats_of, True
    starts = np.cumsum(repeats) - repeats
    return repeats, np.repeat(marked, repeats), [int(starts[place]) for place in places]


def _joined(patches: Sequence[np.ndarray], width: int) -> np.ndarray:
    """[P, C] of all pictures."""
    return np.concatenate([np.zeros((0, width), np.float32), *patches])
