"""What is measured on digit boards: from single boards to the result of a condition.

Axis letters: B boards, R reads of a board, L decoder layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmem.data.boards import Board, answer_reads, named_reads, score_answer
from jaxmem.data.example import Example
from jaxmem.evaluation.conditions import Condition


@dataclasses.dataclass(frozen=True)
class Reading:
    """The result of one condition.

    Attributes:
      k, blind: of the condition: words between image and question; could the backbone's text not see the image?
      boards: how many.
      read, read_error: share of digits read, and its standard error over boards.
      exact, exact_error: share of right final answers in free greedy writing, and its standard error.
      mass: per decoder layer, what `look` saw at the tokens that predict a read, averaged; () without `look`.
      answers: what the model wrote about each board.
      seconds: wall time, compilation included.
      span: of the condition: rotary positions that the words cover, or None.
      read_by_place: share read of the first, second, ... digit asked for, R.
      free_read, free_read_error, free_read_by_place: the same in free writing, where the model's own mistakes stand in
        front of what it reads next; an entry about another cell than the one asked for is not read.
      named_read, named_read_error, named_read_by_place: share of the entries written whose digit is right for the cell
        that they name, asked for or not: seeing alone. As many places as the longest answer has entries.
    """

    k: int
    blind: bool
    boards: int
    read: float
    read_error: float
    exact: float
    exact_error: float
    mass: tuple[float, ...]
    answers: tuple[str, ...]
    seconds: float
    span: int | None = None
    read_by_place: tuple[float, ...] = ()
    free_read: float = 0.0
    free_read_error: float = 0.0
    free_read_by_place: tuple[float, ...] = ()
    named_read: float = 0.0
    named_read_error: float = 0.0
    named_read_by_place: tuple[float, ...] = ()

    @property
    def condition(self) -> Condition:
        """What was measured."""
        return Condition(self.k, self.blind, self.span)


@dataclasses.dataclass
class Taken:
    """One board on its way through a test.

    Attributes:
      board: what is asked.
      row: question and answer, encoded.
      read: [R] bool, the digits read with the true text in front.
      mass: [L] of the attention, or [0].
      answer: what the model wrote; None while that is open.
    """

    board: Board
    row: Example
    read: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    mass: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    answer: str | None = None


def summarise(condition: Condition, boards: Sequence[Taken], seconds: float) -> Reading:
    """The result of all boards of one condition."""
    written = [(one.answer or "", one.board) for one in boards]
    forced = [one.read for one in boards]
    free = [answer_reads(*one) for one in written]
    named = [named_reads(*one)[: len(one[1].cells)] for one in written]
    return Reading(
        condition.k,
        condition.blind,
        len(boards),
        *_share(forced),
        *mean_and_error([score_answer(*one).exact for one in written]),
        mass=_floats(np.mean([one.mass for one in boards], axis=0)),
        answers=tuple(answer for answer, _ in written),
        seconds=seconds,
        span=condition.span,
        read_by_place=_by_place(forced),
        free_read=_share(free)[0],
        free_read_error=_share(free)[1],
        free_read_by_place=_by_place(free),
        named_read=_share(named)[0],
        named_read_error=_share(named)[1],
        named_read_by_place=_by_place(named),
    )


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n); 0 for a single value)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def _share(rows: Sequence[Any]) -> tuple[float, float]:
    """Mean and error over boards of a board's own share; boards without entries do not count, 0 when none has any."""
    return mean_and_error([float(np.mean(row)) for row in rows if len(row)] or [0.0])


def _by_place(rows: Sequence[Any]) -> tuple[float, ...]:
    """The share at each place, over the boards that have an entry there."""
    places = range(max(map(len, rows)))
    return _floats(np.mean([row[place] for row in rows if len(row) > place]) for place in places)


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
