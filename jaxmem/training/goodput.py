"""Where the wall time of a run goes, over all its starts, as fractions that sum to 1."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "goodput.json"
KINDS = ("step", "input_wait", "checkpoint", "evaluation", "startup", "lost")
_PREFIX, _WALL = "goodput/", "goodput/seconds"


class Goodput:
    """A stopwatch that books every second since the program began under exactly one kind.

    The kinds, each a metric named goodput/<kind>:
      step: training steps whose result is in the run: playing, judging, forward, backward and update, and the host's
        work around them. This is the useful part.
      input_wait: the loop had no batch and the devices had nothing to do. A wait behind which a step was still
        running cost nothing and is booked under that step.
      checkpoint: the loop stood still for a checkpoint: copying to the host, waiting for the save before it, and the
        end of the last save. What the writer does in the background is not in it.
      evaluation: evaluations whose result is in the run.
      startup: from the beginning of the program to the end of the first step's call: loading, placing, compiling.
      lost: steps, waits, checkpoints and evaluations of earlier starts that were done again, because those starts ended
        after their last checkpoint.
    `goodput/seconds` is the whole. Time in which no program ran is not in it.

    Args:
      booked: seconds of each kind from earlier starts; kinds that are absent are 0.
      began: `time.monotonic()` when this start began; None is now.
    """

    def __init__(self, booked: Mapping[str, float] | None = None, began: float | None = None) -> None:
        self.seconds = {kind: float((booked or {}).get(kind, 0.0)) for kind in KINDS}
        self._last = time.monotonic() if began is None else began

    def lap(self, kind: str) -> None:
        """Books the time since the last lap (or the beginning) under a kind."""
        now = time.monotonic()
        self.seconds[kind] += now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """goodput/<kind> as fractions of all that is booked, and goodput/seconds."""
        whole = sum(self.seconds.values())
        shares = {f"{_PREFIX}{kind}": value / (whole or 1.0) for kind, value in self.seconds.items()}
        return {**shares, _WALL: whole}

    def save(self, folder: str | Path) -> None:
        """Writes `goodput.json`: seconds by kind, over all starts up to now."""
        path = Path(folder) / FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def known(folder: str | Path, lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The latest that earlier starts wrote down: `goodput.json` or a line of metrics, whichever reached further.

    Args:
      folder: the run's.
      lines: of metrics, before those that will be done again are removed.
    """
    told = [{kind: line[_PREFIX + kind] * line[_WALL] for kind in KINDS} for line in lines if line.get(_WALL)]
    try:
        told.append(json.loads((Path(folder) / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass  # the first start, or a file that somebody damaged: the lines are there
    return max(told, key=lambda seconds: sum(seconds.values()), default={})


def resumed(latest: Mapping[str, float], at_checkpoint: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind for a start that goes on from a checkpoint.

    Args:
      latest: from `known`.
      at_checkpoint: what was booked when the checkpoint was written; all zero for a start from the beginning.

    Returns:
      What was booked later is lost; but starting up stays starting up, and what was lost before stays lost.
    """
    later = {kind: max(0.0, latest.get(kind, 0.0) - at_checkpoint.get(kind, 0.0)) for kind in KINDS}
    booked = {kind: at_checkpoint.get(kind, 0.0) for kind in KINDS}
    booked["startup"] += later.pop("startup")
    booked["lost"] += sum(later.values())
    return booked
