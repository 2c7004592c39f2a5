"""From the scores of single questions to a benchmark's numbers, in percent; and two conditions side by side."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge import oven
from jaxmem.evaluation.knowledge.infoseek import SPLITS
from jaxmem.evaluation.knowledge.strict import harmonic_mean

Row = Mapping[str, Any]
"""One line of a result file: id, split, kind, answer, how, flags, metrics."""


def summarise(benchmark: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Every metric by split, over all, and as the benchmark's final score.

    Args:
      benchmark: its name.
      rows: of one result file.

    Returns:
      {"questions", "split_sizes", "unanswered", "found", "flags", "metrics": {name: {"splits", "kinds", "all",
      "final"}}}. "all" is the mean over all questions, whatever their split. "final" is InfoSeek's harmonic mean of its
      two splits and OVEN's of its two sets, each that of seen and unseen entities, or else "all"; None where a split
      that it needs has no question. Percentages are rounded to two places before harmonic means, as by InfoSeek's and
      OVEN's scripts.

    Raises:
      DataError: there is no row.
    """
    if not rows:
        raise DataError(f"{benchmark}: there is no answer to summarise")
    return {
        "questions": len(rows),
        "split_sizes": dict(collections.Counter(row["split"] for row in rows)),
        "unanswered": sum(row["answer"] is None for row in rows),
        "found": dict(collections.Counter(row["how"] for row in rows)),
        "flags": dict(collections.Counter(flag for row in rows for flag in row["flags"])),
        "metrics": {name: _metric(benchmark, rows, name) for name in rows[0]["metrics"]},
    }


def _metric(benchmark: str, rows: Sequence[Row], name: str) -> dict[str, Any]:
    splits = _means(rows, name, lambda row: row["split"])
    total = percent(row["metrics"][name] for row in rows)
    found = {"splits": splits, "kinds": _means(rows, name, lambda row: row["kind"]), "all": total}
    if benchmark == "infoseek":
        return found | {"final": _harmonic([splits.get(split) for split in SPLITS])}
    if benchmark == "oven":
        sets = {one: _harmonic([splits.get(f"{one}_{sight}") for sight in oven.SIGHT]) for one in oven.SETS}
        every = [splits.get(split) for split in oven.SPLITS]
        return found | {"sets": sets, "final": _harmonic(every)}
    return found | {"final": total}


def _means(rows: Sequence[Row], name: str, group: Callable[[Row], str]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(group(row), []).append(row["metrics"][name])
    return {key: percent(some) for key, some in values.items()}


def percent(values: Iterable[float]) -> float:
    """The mean of scores in percent, to two places."""
    some = list(values)
    return round(100 * math.fsum(some) / len(some), 2)


def _harmonic(values: Sequence[float | None]) -> float | None:
    """The harmonic mean to two places, None when a value is missing."""
    known = [value for value in values if value is not None]
    return round(harmonic_mean(known), 2) if known and len(known) == len(values) else None


@dataclasses.dataclass(frozen=True)
class Pair:
    """One condition minus another over the same questions.

    Attributes:
      questions: how many.
      first, second: means in percent.
      difference: first minus second, in percentage points.
      error: its standard error, from the differences of single questions; None for a single one.
      better, worse: questions where the first scores higher, lower.
    """

    questions: int
    first: float
    second: float
    difference: float
    error: float | None
    better: int
    worse: int


def pair(first: Sequence[Row], second: Sequence[Row], metric: str) -> dict[str, Pair]:
    """`Pair` by split, and "all", of one metric.

    Raises:
      DataError: the two have not the same questions.
    """
    theirs = {row["id"]: row for row in second}
    if theirs.keys() != {row["id"] for row in first}:
        odd = sorted(theirs.keys() ^ {row["id"] for row in first})
        raise DataError(f"two conditions are compared on the same questions; only one of them has {', '.join(odd[:8])}")
    both = [(row["split"], row["metrics"][metric], theirs[row["id"]]["metrics"][metric]) for row in first]
    splits = dict.fromkeys(split for split, _, _ in both)
    found = {split: _pair([(a, b) for one, a, b in both if one == split]) for split in splits}
    return found | {"all": _pair([(a, b) for _, a, b in both])}


def _pair(values: Sequence[tuple[float, float]]) -> Pair:
    gaps = [100 * (a - b) for a, b in values]
    mean = math.fsum(gaps) / len(gaps)
    squares = math.fsum((gap - mean) ** 2 for gap in gaps)
    return Pair(
        len(values),
        percent(a for a, _ in values),
        percent(b for _, b in values),
        round(mean, 2),
        round(math.sqrt(squares / (len(gaps) - 1) / len(gaps)), 2) if len(gaps) > 1 else None,
        sum(gap > 0 for gap in gaps),
        sum(gap < 0 for gap in gaps),
    )
