"""Reward for digit boards (`jaxmem.data.boards`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxmem.data.boards import CELLS, Board, score_answer
from jaxmem.training.rewards.functions import BuiltIn, Case


@dataclasses.dataclass(frozen=True)
class BoardReward(BuiltIn):
    """1 for the right final sum in the right number of entries, else 0; optionally a share for reading.

    Needs the columns `cells`, `digits` and `sums`, the fields of a Board.

    Attributes:
      read: share of the reward that is given for the cells read correctly, 0..1; the rest is for the exact answer.
    """

    read: float = 0.0

    def __post_init__(self) -> None:
        """Checks the share; raises ValueError."""
        if not 0 <= self.read <= 1:
            raise ValueError(f"read is {self.read}; it is a share, 0 to 1")

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a Board."""
        return ("cells", "digits", "sums")

    def score(self, text: str, *values: Any) -> float | None:
        """`read` times the share of digits read, and the rest for the exact answer."""
        cells, digits, sums = (tuple(int(value) for value in column) for column in values)
        board = Board(np.zeros((0, 0, 3), np.uint8), grid=(), words=(), cells=cells, digits=digits, sums=sums)
        score = score_answer(text, board)
        return self.read * score.read + (1 - self.read) * score.exact

    def cases(self) -> tuple[Case, ...]:
        """A right answer, one with a wrong digit and a wrong sum, and silence."""
        row = {"cells": (2, 5), "digits": (7, 3), "sums": (7, 0)}
        first, second = CELLS[2], CELLS[5]
        return (
            Case(f"{first}7=7 {second}3=0 #0", row, 1.0),
            Case(f"{first}7=7 {second}4=1 #1", row, self.read / 2),
            Case("", row, 0.0),
        )
