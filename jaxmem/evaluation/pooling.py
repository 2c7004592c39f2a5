"""Results of several seeds as one: the share over all boards, and how far the seeds lie apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmem.evaluation.reading import Reading


@dataclasses.dataclass(frozen=True)
class Pooled:
    """One share over several trained models.

    Attributes:
      seeds: models.
      boards: of all of them together, n.
      mean: share over all boards; models count by their boards.
      spread: sample standard deviation between the models' shares; 0 for one model. A model is the unit here: boards
        of one model share its luck in training, so that more boards make no more evidence about the method.
      low, high: the lowest and the highest model.
    """

    seeds: int
    boards: int
    mean: float
    spread: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


def pool(readings: Sequence[Reading], name: str) -> Pooled:
    """A share ("read", "exact", "free_read") of the same condition, one Reading per seed.

    Raises:
      ValueError: no readings, or readings of different conditions.
    """
    return _pooled(readings, [getattr(reading, name) for reading in readings])


def pool_each(readings: Sequence[Reading], name: str) -> tuple[Pooled, ...]:
    """`pool` of every entry of a field with several ("read_by_place", "free_read_by_place", "mass"), over the seeds
    that have such an entry."""
    places = range(max((len(getattr(reading, name)) for reading in readings), default=0))
    having = ([reading for reading in readings if len(getattr(reading, name)) > place] for place in places)
    return tuple(
        _pooled(rows, [getattr(row, name)[place] for row in rows]) for place, rows in zip(places, having, strict=True)
    )


def _pooled(readings: Sequence[Reading], values: Sequence[float]) -> Pooled:
    conditions = {reading.condition.label for reading in readings}
    if len(conditions) != 1:
        raise ValueError(f"seeds of one condition can be pooled, these are of {sorted(conditions) or 'none'}")
    boards, shares = np.array([reading.boards for reading in readings]), np.asarray(values, np.float64)
    spread = shares.std(ddof=1) if len(shares) > 1 else 0.0
    mean = float(np.average(shares, weights=boards))
    return Pooled(len(shares), int(boards.sum()), mean, float(spread), float(shares.min()), float(shares.max()))
