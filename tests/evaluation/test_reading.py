"""From boards to results, by hand."""

import numpy as np
import pytest

from jaxmem.data.boards import CELLS, Board
from jaxmem.evaluation.conditions import Condition
from jaxmem.evaluation.reading import Taken, summarise

GRID = tuple(range(10)) + (0, 0, 0, 0, 0, 0)  # cell A shows 0, B 1, ...


def taken(answer, read, mass):
    """A board that asks for B, C and D: B1=1 C2=3 D3=6 #6."""
    board = Board(np.zeros(0), GRID, (), (1, 2, 3), (1, 2, 3), (1, 3, 6))
    return Taken(board, None, np.array(read), np.array(mass), answer)


def test_reading_seeing_and_answering_are_apart():
    boards = [
        taken("B1=1 C2=3 D3=6 #6", [1, 1, 1], [0.5, 0.1]),
        taken("B1=1 E4=5 D9=4 #6", [1, 0, 1], [0.3, 0.1]),  # another cell, a wrong digit, a right sum by luck
        taken("B7=7 #7", [0, 0, 1], [0.1, 0.1]),
        taken("", [0, 0, 0], [0.1, 0.1]),
    ]
    found = summarise(Condition(5, span=9), boards, 2.0)
    assert (found.condition, found.boards, found.seconds) == (Condition(5, span=9), 4, 2.0)
    assert found.mass == pytest.approx((0.25, 0.1))
    per_board = np.array([1, 2 / 3, 1 / 3, 0])
    assert (found.read, found.read_error) == pytest.approx((per_board.mean(), per_board.std(ddof=1) / 2))
    assert found.read_by_place == pytest.approx((0.5, 0.25, 0.75))
    assert found.exact == 0.5
    assert found.free_read == pytest.approx((1 + 1 / 3) / 4)
    assert found.free_read_by_place == pytest.approx((0.5, 0.25, 0.25))
    assert found.named_read == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found.named_read_by_place == pytest.approx((2 / 3, 1, 1 / 2))
    assert CELLS[4] == "E"


def test_a_model_that_writes_nothing_has_read_nothing():
    found = summarise(Condition(0), [taken("", [0, 0, 0], [])], 1.0)
    assert (found.named_read, found.named_read_by_place, found.mass) == (0.0, (), ())
