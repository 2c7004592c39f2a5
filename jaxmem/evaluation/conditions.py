"""What a board test varies: the words between image and question, who may see the image, and the rotary positions.

Many words do two things to a reader: they dilute its attention among many keys, and they carry the question to
positions that training never reached. Two controls tell these apart: *stretched* boards have no words, but the
question's positions lie as far ahead as if there were some (few keys, far positions); *packed* boards have all their
words, laid over the positions of fewer (many keys, near positions).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jaxmem.data.boards import Board, BoardDataset
from jaxmem.data.example import Example
from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to ask the same boards.

    Attributes:
      k: words between image and question.
      blind: text cannot see the image in the backbone (visual-key blocking).
      span: rotary positions that the words cover; None leaves one per token.
    """

    k: int
    blind: bool = False
    span: int | None = None

    @property
    def positions(self) -> Literal["plain", "stretched", "packed"]:
        """What is done to the rotary positions."""
        if self.span is None:
            return "plain"
        return "packed" if self.k else "stretched"

    @property
    def label(self) -> str:
        """A name for tables: "128", "0, image hidden*", "0 over 128 positions"."""
        blind = ", image hidden*" if self.blind else ""
        return f"{self.k}{'' if self.span is None else f' over {self.span} positions'}{blind}"

    def place(self, row: Example, board: Board, processor: Processor, vision_end: int) -> Example:
        """An encoded board with its positions as this condition wants them."""
        if self.span is None:
            return row
        start = int(np.flatnonzero(row.visual_rows >= 0)[-1]) + 1
        start += int(row.tokens[start] == vision_end)
        return lay(row, start, filler_tokens(board, processor), self.span)


def lay(row: Example, start: int, count: int, span: int) -> Example:
    """The row with the `count` tokens from `start` on spread evenly over `span` positions, those behind following.

    Positions are whole numbers: with span < count neighbouring tokens share one.
    """
    index = np.arange(len(row))
    inside = np.clip(index - start, 0, count)
    ahead = inside * span // max(count, 1) - inside if count else np.where(index >= start, span, 0)
    return dataclasses.replace(row, positions=(row.positions + ahead).astype(np.int32))


def filler_tokens(board: Board, processor: Processor) -> int:
    """How many tokens the board's words add to its prompt."""
    length = lambda text: len(processor.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    return length(board.prompt) - length(dataclasses.replace(board, words=()).prompt)


@dataclasses.dataclass(frozen=True)
class BoardTest:
    """What is evaluated.

    Attributes:
      k: numbers of words between image and question, one result each.
      blind_k: numbers of words at which text also cannot see the image in the backbone (visual-key blocking).
      stretched: numbers of positions that are skipped between image and question, without any words there.
      packed: pairs (words, positions that they cover).
      boards: boards per result.
      cells: cells asked for, R, at most 16: the more, the longer the text of its own that the model reads behind.
      batch_size: boards that run together, B; every batch has this size.
      seed: selects the boards.
      split: "test" or "train" digits.
    """

    k: tuple[int, ...] = (0, 128, 256)
    blind_k: tuple[int, ...] = ()
    stretched: tuple[int, ...] = ()
    packed: tuple[tuple[int, int], ...] = ()
    boards: int = 256
    cells: int = 4
    batch_size: int = 64
    seed: int = 0
    split: str = "test"

    def __post_init__(self) -> None:
        if self.boards < 1 or self.batch_size < 1 or not self.conditions:
            raise ConfigError("a board test needs boards, batch_size and the number of lengths k to be at least 1")
        if min(self.stretched, default=0) < 0 or any(k < 1 or span < 1 for k, span in self.packed):
            raise ConfigError("stretched counts positions from 0 on; packed needs at least one word and one position")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of every result, in order."""
        plain = [Condition(k) for k in self.k] + [Condition(k, blind=True) for k in self.blind_k]
        controls = [Condition(0, span=span) for span in self.stretched]
        return (*plain, *controls, *(Condition(k, span=span) for k, span in self.packed))

    def dataset(self, k: int) -> BoardDataset:
        """The boards at one length."""
        return BoardDataset(self.split, self.seed, (k,), (self.cells,), size=self.boards)
