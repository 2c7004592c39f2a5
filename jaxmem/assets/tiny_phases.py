"""What the tiny backbone learns, and in which order: four phases of digit boards.

V  the vision tower learns to tell digit and cell of every visual row, measured in the language model's own words.
R  reading: half the batches list all cells with their digits, half are the task. Sixteen reads per board make the
   attention from a cell's name to its picture appear within two hundred steps; with the task alone, next-token
   training sits for long on a plateau where the sums are right and the digits are guessed.
B  the task alone, short. The number of filler words and of questions vary independently, so that the model learns
   when to stop.
T  half the batches stay short; in the other half the text is long, text cannot see the image, and the digits carry
   no loss. Copying, adding and stopping become good at long range, long-range seeing is not taught.

So what fails far from the image is seeing, and only seeing: the weakness that a visual memory is meant to repair.
It is a constructed weakness of a toy.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.backbones.batch import Batch
from jaxmem.data.boards import CELLS, QUESTION, Board, BoardDataset, BoardTokens, digit_reads


@dataclasses.dataclass(frozen=True)
class Layout:
    """One kind of batch: `rows` boards with k and n drawn independently, padded to `width` tokens.

    Kinds: "answer" is the task; "blind" hides the image from the text and takes the digit reads out of the loss;
    "caption" lists the cells with their digits in random order ("C7 F3 ..."), with loss on the digits only.
    """

    k: tuple[int, ...]
    n: tuple[int, ...]
    rows: int
    width: int
    kind: Literal["answer", "blind", "caption"] = "answer"


@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` updates that cycle through `layouts`; the rate warms up over 5 % and falls to zero as a cosine.

    `boards` is the seed of its boards; no two phases share one. `trains` is "vision" for the tower and the word
    tables, by the boards' pictures alone, or "tokens" for everything.
    """

    name: str
    steps: int
    rate: float
    boards: int
    layouts: tuple[Layout, ...]
    trains: Literal["vision", "tokens"] = "tokens"


class Caption(Board):
    """A board whose cells are only named and read, without sums."""

    @property
    def prompt(self) -> str:
        """A question without cells."""
        return QUESTION.split()[0]

    @property
    def answer(self) -> str:
        """Every asked cell with its digit."""
        return " ".join(f"{CELLS[cell]}{digit}" for cell, digit in zip(self.cells, self.digits, strict=True))


PICTURES = Layout(k=(0,), n=(1,), rows=16, width=40)
CAPTIONS = Layout(k=(0,), n=(16,), rows=32, width=64, kind="caption")
NEAR = Layout(k=tuple(range(11)), n=(3, 4), rows=32, width=64)
MIDDLE = Layout(k=tuple(range(23)), n=(4, 6, 8), rows=32, width=96)
FAR = tuple(
    Layout(k=tuple(range(low, high + 1)), n=(4, 6), rows=rows, width=high + 64, kind="blind")
    for low, high, rows in ((24, 96, 16), (97, 224, 8), (225, 416, 4))
)
PHASES = (
    Phase("V", 500, 3e-3, boards=0, layouts=(PICTURES,), trains="vision"),
    Phase("R", 600, 3e-3, boards=2, layouts=(CAPTIONS, NEAR, CAPTIONS, MIDDLE)),
    Phase("B", 500, 3e-3, boards=3, layouts=(NEAR, MIDDLE)),
    Phase("T", 360, 1.5e-3, boards=4, layouts=(MIDDLE, FAR[0], NEAR, FAR[1], NEAR, FAR[2])),
)


def boards_of(layout: Layout, seed: int, step: int) -> list[Board]:
    """The training boards of batch `step`."""
    rows = range(step * layout.rows, (step + 1) * layout.rows)
    dataset = BoardDataset("train", seed, layout.k, layout.n, size=rows.stop)
    boards = [dataset[row] for row in rows]
    return [Caption(**vars(board)) for board in boards] if layout.kind == "caption" else boards


def batch_of(layout: Layout, boards: list[Board], batcher: BoardBatcher, ids: BoardTokens) -> Batch:
    """The batch of these boards with the loss that their layout wants.

    A blind batch brings no pixels: nothing that is trained could see them, and the tower need not run.
    """
    batch = batcher(boards, layout.width, layout.kind == "blind")
    if layout.kind == "answer":
        return batch
    reads = digit_reads(batch.tokens, batch.loss_mask, ids)
    kept = reads if layout.kind == "caption" else ~reads
    batch = dataclasses.replace(batch, loss_mask=(kept * batch.loss_mask).astype(np.float32))
    return dataclasses.replace(batch, **_without_pixels(batch)) if layout.kind == "blind" else batch


def _without_pixels(batch: Batch) -> dict[str, Any]:
    """The patch fields with an empty patch axis."""
    names = ("patches", "patch_segments", "patch_coords", "patch_table", "patch_weights")
    return {name: getattr(batch, name)[:, :0] for name in names}
