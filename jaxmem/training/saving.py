"""What happens at the end of a step: the hosts agree whether to save and whether to stop, and one of them says when."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.checkpoints.best import Score, score_of
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.distributed import hosts
from jaxmem.training.descent import TrainState
from jaxmem.training.goodput import Goodput
from jaxmem.training.recorder import Recorder
from jaxmem.training.signals import Signals


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all hosts do after a step.

    Attributes:
      stop: what asked for the end of the run, or "".
      save: is there a checkpoint?
      score: of the step, where it was evaluated.
    """

    stop: str
    save: bool
    score: Score | None


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves when it is time, and keeps account of what that costs.

    Attributes:
      store: of the checkpoints.
      folder: the run's, for `goodput.json`.
      recorder: of the metrics; its lines are on the disk before the checkpoint that covers them.
      clock: of the whole run.
      signals: that ask for the end.
      seconds: between checkpoints; 0 goes by steps alone.
      keep_best: best checkpoints that stay; 0 makes none for an evaluation's sake.
    """

    store: CheckpointStore
    folder: Path
    recorder: Recorder
    clock: Goodput
    signals: Signals
    seconds: float
    keep_best: int
    _began: list[float] = dataclasses.field(default_factory=lambda: [time.monotonic()])

    def agree(self, step: int, values: Mapping[str, float] | None, metric: str) -> Agreed:
        """The one meeting of the hosts after a step; every host calls it after every step.

        Args:
          step: that was just started.
          values: metrics of its evaluation, or None.
          metric: that decides which step is best, "" for the usual ones.

        Returns:
          The same on all hosts: a signal on any host stops all; host 0's clock and evaluation count.
        """
        self.store.tend()
        score = score_of(metric, step, values) if values and self.keep_best else None
        better = score is not None and score.beats(self.store.best())
        elapsed = bool(self.seconds) and time.monotonic() - self._began[-1] >= self.seconds
        taken = "a notice that a machine will be taken away" if self.store.preempted(step) else ""
        mine = (self.signals.caught or taken, self.store.due(step) or elapsed or better, score)
        return hosts.share(f"the end of step {step}", mine, _combined)

    def save(self, step: int, state: TrainState, score: Score | None, position: Mapping[str, Any]) -> None:
        """Starts the checkpoint of a step, whose lines of metrics are then on the disk."""
        self.recorder.flush()
        self.clock.lap("step")
        self.recorder.secure()
        self._began[-1] = time.monotonic()
        about = {
            "skipped_in_a_row": self.recorder.skipped,
            "position": position,
            "goodput": dict(self.clock.seconds),
        }
        self.store.save(step, _kept(state), about, force=True, score=score)
        self._booked()

    def finish(self) -> None:
        """Returns when everything is on the disk."""
        self.recorder.flush()
        self.clock.lap("step")
        self.recorder.secure()
        self.store.wait()
        self._booked()

    def _booked(self) -> None:
        """Books the time since the last lap under checkpoints and writes the account down."""
        self.clock.lap("checkpoint")
        if hosts.first():
            self.clock.save(self.folder)


def _combined(all_hosts: Sequence[tuple[str, bool, Score | None]]) -> Agreed:
    """Any host's wish to stop, host 0's for the rest."""
    asked = [
        f"{why} on host {host}" if len(all_hosts) > 1 else why for host, (why, _, _) in enumerate(all_hosts) if why
    ]
    _, save, score = all_hosts[0]
    return Agreed(" and ".join(asked), save, score)


def _kept(state: TrainState) -> TrainState:
    """The state as the writer in the background may keep it: on a CPU it would share memory that a step donates."""
    return jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state
