"""Averages over benchmarks, by group and over all: every benchmark counts the same, whatever its size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxmem.errors import DataError

VISMEM: Mapping[str, tuple[str, ...]] = {
    "understanding": ("MMStar", "MMVet", "MMT-Bench", "BLINK", "MuirBench"),
    "reasoning": ("MMMU", "LogicVista", "MathVista", "MV-Math"),
    "generation": ("HallusionBench", "MultiTrust", "MMVU"),
}
"""The twelve benchmarks of VisMem's Table 1 (arXiv 2511.11007, second version) in its order and groups."""


@dataclasses.dataclass(frozen=True)
class Averages:
    """Means of benchmark scores, in the scores' unit.

    Attributes:
      groups: by the group's name.
      overall: over all benchmarks of all groups; larger groups weigh more.
    """

    groups: Mapping[str, float]
    overall: float


def averages(scores: Mapping[str, float], groups: Mapping[str, Sequence[str]] = VISMEM) -> Averages:
    """Unweighted means over the benchmarks of each group, and over all benchmarks.

    Args:
      scores: benchmark -> score.
      groups: group -> its benchmarks; one of them belongs to one group.

    Returns:
      Averages, not rounded.

    Raises:
      DataError: a benchmark without a finite score, a score of no group, a group without benchmarks, or a benchmark in
        two groups; a mean over something else than the table's benchmarks would not be comparable with the table's.
    """
    _check(scores, groups)
    names = [name for members in groups.values() for name in members]
    mean = lambda members: math.fsum(scores[name] for name in members) / len(members)  # noqa: E731
    return Averages({group: mean(members) for group, members in groups.items()}, mean(names))


def _check(scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> None:
    names = [name for members in groups.values() for name in members]
    faults = {
        "there is no score of": [name for name in names if name not in scores],
        "the score is not a finite number of": [name for name in names if not math.isfinite(scores.get(name, 0))],
        "no group has": [name for name in scores if name not in names],
        "several groups have": sorted({name for name in names if names.count(name) > 1}),
        "no benchmark is in": [group for group, members in groups.items() if not members],
    }
    wrong = [f"{what} {', '.join(which)}" for what, which in faults.items() if which]
    if wrong or not groups:
        raise DataError(f"averages: {'; '.join(wrong) or 'there are no groups of benchmarks'}")
