"""The results of a study, and how to ask for a number of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxmem.analysis.study_store import Trained
from jaxmem.evaluation.conditions import Condition
from jaxmem.evaluation.pooling import Pooled, pool, pool_each
from jaxmem.evaluation.reading import Reading


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which variant was chosen, and what each had on how many validation boards, by which share."""

    variant: str
    scores: Mapping[str, float]
    boards: int
    by: str


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """An arm's title, seeds, readings {test: {seed: one per condition}} and runs {seed: Trained}."""

    title: str
    seeds: tuple[int, ...]
    tests: Mapping[str, Mapping[int, tuple[Reading, ...]]]
    trained: Mapping[int, Trained]

    def readings(self, condition: Condition, cells: int) -> list[Reading]:
        """Of a condition with so many cells, one per seed that has it."""
        rows = (row for by_seed in self.tests.values() for readings in by_seed.values() for row in readings)
        return [row for row in rows if row.condition == condition and len(row.read_by_place) == cells]


@dataclasses.dataclass(frozen=True)
class Results:
    """Arms by name, and the choices among variants."""

    arms: Mapping[str, ArmResult]
    choices: Mapping[str, Choice]

    def share(self, arm: str, name: str, condition: Condition, cells: int = 4) -> Pooled | None:
        """A share ("read", "exact", ...) pooled over an arm's seeds; None where it was not measured."""
        found = self.arms[arm].readings(condition, cells) if arm in self.arms else []
        return pool(found, name) if found else None

    def each(self, arm: str, name: str, condition: Condition, cells: int = 4) -> tuple[Pooled, ...]:
        """A field with several entries ("mass", "named_read_by_place") pooled over an arm's seeds; () without any."""
        found = self.arms[arm].readings(condition, cells) if arm in self.arms else []
        return pool_each(found, name)

    def conditions(self, cells: int = 4) -> tuple[Condition, ...]:
        """All that were measured with so many cells, plain ones by length first."""
        found = {
            row.condition
            for arm in self.arms.values()
            for by_seed in arm.tests.values()
            for readings in by_seed.values()
            for row in readings
            if len(row.read_by_place) == cells
        }
        kinds = {"plain": 0, "stretched": 2, "packed": 3}
        return tuple(sorted(found, key=lambda c: (kinds[c.positions] + c.blind, c.k, c.span or 0)))
