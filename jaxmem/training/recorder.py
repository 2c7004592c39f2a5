"""Reads the metrics of each step while the next one runs, writes them down, and watches for steps that fail."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmem.distributed import hosts
from jaxmem.errors import JaxmemError
from jaxmem.training.descent import Metrics
from jaxmem.training.goodput import Goodput
from jaxmem.training.metrics import SHOWN, SKIPPED, Display, MetricLog


class NonFiniteError(JaxmemError):
    """Loss or gradient stayed infinite or NaN for too many steps in a row."""


class Recorder:
    """Reads the metrics of a step while the next one runs, and keeps account of skipped steps.

    All hosts read the same metrics and end at the same step; only host 0 writes.

    Args:
      log, display: where metrics go; quiet on all hosts but the first.
      folder: for the account of skipped steps.
      goodput: booked up to each step that is read.
      steps: of the whole run; the last one is always written.
      log_every: steps between lines.
      max_nonfinite: skipped steps in a row that end the run.
      skipped: steps skipped in a row before this start.
      last: metrics that earlier starts wrote last.

    Attributes:
      skipped: steps skipped in a row up to now.
      last: metrics of the last step read, with those of the last evaluation.
    """

    def __init__(
        self,
        log: MetricLog,
        display: Display,
        folder: Path,
        goodput: Goodput,
        *,
        steps: int,
        log_every: int,
        max_nonfinite: int,
        skipped: int = 0,
        last: Mapping[str, float] | None = None,
    ) -> None:
        self.skipped, self.last = skipped, dict(last or {})
        self._log, self._display, self._skips, self._goodput = log, display, folder / SKIPPED, goodput
        self._steps, self._every, self._limit = steps, log_every, max_nonfinite
        self._waiting: tuple[int, tuple[str, ...], Metrics, float] | None = None
        self._clock = time.perf_counter()
        self._history: list[str] = []

    def take(self, step: int, names: tuple[str, ...], metrics: Metrics, wait: float) -> None:
        """Hands over a step that was just started; the one before it is read and written."""
        self.flush()
        self._waiting = (step, names, metrics, wait)

    def busy(self) -> bool:
        """Are devices still at work on the step handed over last?"""
        leaves = jax.tree.leaves(self._waiting[2]) if self._waiting else []
        return not all(leaf.is_ready() for leaf in leaves if hasattr(leaf, "is_ready"))

    def flush(self) -> None:
        """Waits for the step handed over last and writes it."""
        if self._waiting is None:
            return
        (step, names, metrics, wait), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in hosts.fetch(jax.tree.map(_started, metrics)).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._goodput.lap("step")
        values |= {"seconds": seconds, "wait_seconds": wait, "tokens_per_second": values["tokens"] / seconds}
        values |= self._goodput.metrics()
        self.last |= {"step": step, **values}
        if step % self._every == 0 or step == self._steps or values["skipped"]:
            self._log.write(step, values)
        self._display.step(step, values)
        self._account(step, names, values)

    def _account(self, step: int, names: tuple[str, ...], values: dict[str, float]) -> None:
        """Counts skipped steps; NonFiniteError at too many in a row."""
        if not values["skipped"]:
            self.skipped, self._history = 0, []
            return
        self.skipped += 1
        fault = f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
        line = {"step": step, "loss": repr(values["loss"]), "grad_norm": repr(values["grad_norm"]), "rows": list(names)}
        if hosts.first():
            with open(self._skips, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._history.append(f"step {step} ({fault}): {_few(names)}")
        self._display.say(f"step {step} skipped, nothing was updated: {fault}; rows {_few(names)}")
        if self.skipped >= self._limit:
            raise NonFiniteError(
                f"{self.skipped} steps in a row had no finite loss and gradient; the parameters are those before them."
                f" Look at these rows, or lower the learning rate: {'; '.join(self._history)} (all in {self._skips})"
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self._log.write(step, values)
        shown = {name: value for name, value in values.items() if name.removeprefix("eval/") in SHOWN}
        self._display.say(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        self.last |= values
        self._clock = time.perf_counter()

    def secure(self) -> None:
        """Returns when all lines up to the step handed over last are on the disk itself."""
        self.flush()
        self._log.sync()


def _started(leaf: Any) -> Any:
    """The same metric, on its way to the host, so that the first wait is the only one."""
    if isinstance(leaf, jax.Array):
        leaf.copy_to_host_async()
    return leaf


def _few(names: tuple[str, ...], count: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
