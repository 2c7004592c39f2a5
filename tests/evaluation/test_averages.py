"""Averages over benchmarks against VisMem's Table 1.

Of the untrained model's printed group means (59.3, 46.6, 57.7) only the second follows from its row.
"""

import pytest

from jaxmem.errors import DataError
from jaxmem.evaluation.averages import VISMEM, averages

TABLE = {  # method: the twelve columns, the three group means, the published average
    "Vanilla": ([62.6, 66.0, 54.0, 55.4, 57.4, 56.0, 43.5, 67.8, 18.9, 52.3, 64.8, 55.4], (59.08, 46.55, 57.5), 54.5),
    "Vision-R1": ([67.1, 71.7, 60.2, 60.8, 64.0, 63.2, 53.9, 77.2, 38.7, 56.4, 72.6, 63.6], None, 62.5),
    "Mirage": ([64.5, 71.8, 56.1, 56.3, 59.0, 59.4, 50.6, 70.3, 35.4, 50.9, 66.1, 60.3], None, 58.4),
    "VisMem": ([68.9, 75.1, 62.5, 64.5, 69.8, 63.9, 55.7, 79.8, 41.4, 59.6, 77.0, 68.2], (68.16, 60.2, 68.27), 65.5),
}
COLUMNS = [name for members in VISMEM.values() for name in members]


@pytest.mark.parametrize("method", TABLE)
def test_check_51_published_averages(method):
    scores, groups, overall = TABLE[method]
    found = averages(dict(zip(COLUMNS, scores, strict=True)))
    assert found.overall == pytest.approx(overall, abs=0.0501)  # printed to a tenth
    assert found.overall == pytest.approx(sum(scores) / 12)
    assert list(found.groups) == ["understanding", "reasoning", "generation"]
    if groups is not None:
        assert tuple(found.groups.values()) == pytest.approx(groups, abs=0.005)


def test_own_groups():
    found = averages({"a": 1, "b": 2, "c": 6}, {"x": ["c", "a"], "y": ["b"]})
    assert found.groups == {"x": 3.5, "y": 2} and found.overall == 3


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        ({"a": 1}, {"x": ["a", "b"]}, "there is no score of b"),
        ({"a": 1, "Math-V": 2}, {"x": ["a"]}, "no group has Math-V"),
        ({"a": float("nan")}, {"x": ["a"]}, "not a finite number of a"),
        ({"a": 1}, {"x": ["a"], "y": ["a"]}, "several groups have a"),
        ({"a": 1}, {"x": ["a"], "y": []}, "no benchmark is in y"),
        ({}, {}, "no groups"),
    ],
)
def test_other_benchmarks_than_the_tables_are_refused(scores, groups, message):
    with pytest.raises(DataError, match=message):
        averages(scores, groups)
