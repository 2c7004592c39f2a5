"""Pooling by hand."""

import dataclasses

import pytest

from jaxmem.evaluation.pooling import pool, pool_each
from jaxmem.evaluation.reading import Reading

ROW = Reading(128, False, 100, 0.5, 0.05, 0.2, 0.04, (0.5, 0.1), (), 1.0, read_by_place=(0.6, 0.4))
ROWS = [
    ROW,
    dataclasses.replace(ROW, read=0.8, read_by_place=(1.0, 0.6)),
    dataclasses.replace(ROW, boards=200, read=0.9),
]


def test_means_count_boards_and_spreads_count_seeds():
    found = pool(ROWS, "read")
    assert (found.seeds, found.boards, found.low, found.high) == (3, 400, 0.5, 0.9)
    assert found.mean == pytest.approx((100 * 0.5 + 100 * 0.8 + 200 * 0.9) / 400)
    around = (0.5 + 0.8 + 0.9) / 3
    wanted = (((0.5 - around) ** 2 + (0.8 - around) ** 2 + (0.9 - around) ** 2) / 2) ** 0.5
    assert found.spread == pytest.approx(wanted)
    assert str(found) == "0.775 ± 0.208"
    assert (pool([ROW], "exact").mean, pool([ROW], "exact").spread) == (0.2, 0.0)
    early, late = pool_each(ROWS[:2], "read_by_place")
    assert (early.mean, late.mean) == pytest.approx((0.8, 0.5))
    short = dataclasses.replace(ROW, read_by_place=(0.2,))
    early, late = pool_each([ROW, short], "read_by_place")
    assert (early.seeds, early.mean, late.seeds, late.mean) == (2, pytest.approx(0.4), 1, 0.4)


def test_other_conditions_do_not_mix():
    with pytest.raises(ValueError, match=r"of \['128', '128 over 9 positions'\]"):
        pool([ROW, dataclasses.replace(ROW, span=9)], "read")
    with pytest.raises(ValueError, match="none"):
        pool([], "read")
