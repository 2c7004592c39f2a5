"""A line per arm and seed, with the time that has passed and a rough guess of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from jaxmem.analysis.study_runs import Found, Unit, exams, units
from jaxmem.analysis.study_settings import Study, resolve
from jaxmem.evaluation.conditions import BoardTest

_TEXT, _FAR = 60, 700  # tokens of a board beside its words; length from which attention costs more than the rest


class Progress:
    """Counts what is done in units of work that are roughly proportional to time."""

    def __init__(self, study: Study, say: Callable[[str], None]) -> None:
        self._say, self._began = say, time.perf_counter()
        first = {name: next(iter(arm.variants)) for name, arm in study.arms.items() if arm.variants}
        self._left = {unit: _work(study, unit, first) for unit in units(study)}
        self.total, self._done = len(self._left), 0.0

    def there_already(self, kept: Iterable[Unit]) -> None:
        """Units that took no time now."""
        for unit in kept:
            self._left.pop(unit)

    def made(self, done: Iterable[Unit], own: tuple[Unit, Found] | None) -> None:
        """Units that are done since the last call, and a line about this process's own."""
        self._done += sum(self._left.pop(unit) for unit in done)
        if own is not None:
            self._say(self._line(*own))

    def _line(self, unit: Unit, found: Found) -> str:
        rows = [row for readings in found.readings.values() for row in readings]
        shown = " ".join(f"{row.read:.2f}@{row.condition.label.replace(' ', '')}" for row in rows)
        name = f"{unit.arm}, seed {unit.seed}" + (f", trial of {unit.variant}" if unit.variant else "")
        run = found.trained
        training = f", {run.steps} steps in {run.seconds:.0f} s" if run else ""
        elapsed = time.perf_counter() - self._began
        left = elapsed / self._done * sum(self._left.values()) if self._done else 0.0
        times = f"{_clock(elapsed)} passed, about {_clock(left)} left"
        return f"[{self.total - len(self._left)}/{self.total}] {name}{training}; read {shown} | {times}"


def _work(study: Study, unit: Unit, variants: Mapping[str, str]) -> float:
    """Of training and all tests, in tokens that a forward pass reads: a learning step costs about three, and
    completions of a group more."""
    testing = sum(_testing(test) for test in exams(study, unit).values())
    if not study.arms[unit.arm].trains:
        return testing
    variants = {**variants, unit.arm: unit.variant} if unit.variant else variants
    config = resolve(study, unit.arm, unit.seed, "", variants, study.config.selection.steps if unit.variant else 0)
    boards, rows = config.data.boards, config.loop.batch_size
    tokens = rows * (sum(boards.k) / len(boards.k) + _TEXT + 5 * sum(boards.n) / len(boards.n))
    return testing + config.loop.steps * 3 * tokens * (1 if config.grpo is None else 1 + config.grpo.group / 2)


def _testing(test: BoardTest) -> float:
    """Of a test: its boards are read once and mostly written once."""
    lengths = [condition.k + _TEXT + 5 * test.cells for condition in test.conditions]
    return test.boards * sum(2 * length * (1 + length / _FAR) for length in lengths)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
