"""What reward functions gave for a batch of completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmem.training.rewards.functions import Outcome

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of n completions by F functions.

    Attributes:
      values: [n, F] float64, NaN where a function does not apply or failed.
      labels: names of the functions.
      errors: label -> rows that failed by an exception or a wrong result.
      timeouts: label -> rows that were cut off.
      messages: the first few failures, each with label and row.
      seconds: wall time.
    """

    values: np.ndarray
    labels: tuple[str, ...]
    errors: Mapping[str, int]
    timeouts: Mapping[str, int]
    messages: tuple[str, ...]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """`rewards/<label>/` mean, std (n - 1), none_rate, error_rate, timeout_rate; no mean where nothing applies."""
        found, rows = means(self.labels, self.values), max(1, len(self.values))
        for label, column in zip(self.labels, self.values.T, strict=True):
            given = column[~np.isnan(column)]
            failed = self.errors[label] + self.timeouts[label]
            found[f"rewards/{label}/none_rate"] = (len(column) - len(given) - failed) / rows
            found[f"rewards/{label}/error_rate"] = self.errors[label] / rows
            found[f"rewards/{label}/timeout_rate"] = self.timeouts[label] / rows
        return found


def collect(labels: tuple[str, ...], found: Sequence[Sequence[Outcome]], count: int, seconds: float) -> Scored:
    """F lists of `count` outcomes as one result."""
    values = np.array([[outcome.value for outcome in column] for column in found], np.float64)
    failures = [
        f"{label}, row {row}: {outcome.text}"
        for label, column in zip(labels, found, strict=True)
        for row, outcome in enumerate(column)
        if outcome.kind
    ]

    def counts(kind: str) -> dict[str, int]:
        return {label: sum(o.kind == kind for o in column) for label, column in zip(labels, found, strict=True)}

    return Scored(
        values=values.reshape(len(labels), count).T,
        labels=labels,
        errors=counts("error"),
        timeouts=counts("timeout"),
        messages=tuple(failures[:_SHOWN]),
        seconds=seconds,
    )


def means(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """rewards/<label>/mean and std (n - 1) of values [n, F], of what applies; nothing where nothing does."""
    found = {}
    for label, column in zip(labels, values.T, strict=True):
        given = column[~np.isnan(column)]
        if len(given):
            found[f"rewards/{label}/mean"] = float(given.mean())
            found[f"rewards/{label}/std"] = float(given.std(ddof=1)) if len(given) > 1 else 0.0
    return found
