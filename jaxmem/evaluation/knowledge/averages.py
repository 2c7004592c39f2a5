"""CoMEM's average over six benchmarks in eight columns (arXiv 2505.17670, table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation import averages
from jaxmem.evaluation.knowledge.strict import harmonic_mean

COLUMNS = ("infoseek_query", "infoseek_entity", "oven_query", "oven_entity", "mrag", "okvqa", "aokvqa", "viquae")
"""Of table 3, in its order; "query" is InfoSeek's unseen questions and OVEN's query set."""


def average(scores: Mapping[str, float]) -> float:
    """The mean of the eight columns; InfoSeek and OVEN therefore count twice as much as the others.

    Args:
      scores: percentages by column.

    Raises:
      DataError: a column is missing, or is not in the table.
    """
    return averages.averages(scores, {"table 3": COLUMNS}).overall


def columns(benchmark: str, scores: Mapping[str, Any]) -> dict[str, float]:
    """The columns of table 3 that a benchmark's summary fills.

    Args:
      benchmark: its name.
      scores: of one metric: "splits" in percent, as `summary.summarise` gives them.

    Raises:
      DataError: the table has no such benchmark, or a split is missing in the summary.
    """
    splits = scores["splits"]
    needed = {
        "infoseek": {"infoseek_query": ("unseen_question",), "infoseek_entity": ("unseen_entity",)},
        "oven": {f"oven_{one}": (f"{one}_seen", f"{one}_unseen") for one in ("query", "entity")},
    }.get(benchmark)
    if needed is None and benchmark in COLUMNS:
        return {benchmark: scores["all"]}
    if needed is None:
        raise DataError(f"table 3 has no benchmark {benchmark!r}; it has {', '.join(COLUMNS)}")
    if missing := [split for names in needed.values() for split in names if split not in splits]:
        raise DataError(f"{benchmark}: the summary has no split {', '.join(missing)}, which table 3 needs")
    return {column: harmonic_mean([splits[name] for name in names]) for column, names in needed.items()}
