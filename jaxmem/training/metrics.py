"""What a run writes down: one JSON line per step, the same for TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LINES = "metrics.jsonl"
BOARD = "tensorboard"
SKIPPED, SAMPLES, EVENTS = "skipped.jsonl", "samples.jsonl", "events.jsonl"
"""Further files with one JSON object per line, each with its "step"."""
SHOWN = ("reward", "reward_std", "completions/mean_length", "loss", "accuracy")
"""Metrics that a line of progress has room for, where a run has them."""


class MetricLog:
    """Appends metrics to `metrics.jsonl` and to TensorBoard, each step once.

    Args:
      folder: the run's output directory.
      after: step that the run goes on from (-1 for a run from the beginning); what an earlier start wrote about later
        steps is removed, because those steps are done again.
      tensorboard: write event files too.
      quiet: write nothing, on the hosts that are not the first.
    """

    def __init__(self, folder: str | Path, after: int = -1, *, tensorboard: bool = True, quiet: bool = False) -> None:
        self._file = self._board = None
        if quiet:
            return
        path = Path(folder) / LINES
        truncate(path, after)
        self._file = open(path, "a", encoding="utf-8")
        if tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(Path(folder) / BOARD), purge_step=max(after, 0) + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of a step; a value that is not finite is null in the file (JSON has no NaN)."""
        if self._file is None:
            return
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def sync(self) -> None:
        """Returns when all lines are on the disk itself, so that they outlive the machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes both."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def read(folder: str | Path, name: str = LINES) -> list[dict[str, Any]]:
    """All whole lines of a run's `metrics.jsonl`, or of another such file; none when there is no file."""
    path = Path(folder) / name
    return (
        [line for line in map(_parsed, path.read_text(encoding="utf-8").splitlines()) if line] if path.exists() else []
    )


def truncate(path: Path, after: int) -> None:
    """Removes the lines of steps later than `after`, and a line that was cut short, in one atomic replacement."""
    if not path.exists():
        return
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if (_parsed(line) or {"step": after + 1})["step"] <= after
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Display:
    """A progress bar on a terminal; elsewhere (a log file, a notebook's pipe) about twenty lines in all.

    Args:
      start, steps: where the run begins and ends.
      enabled: False shows nothing.
    """

    def __init__(self, start: int, steps: int, enabled: bool = True) -> None:
        from rich import console, progress

        self._console = console.Console(stderr=True, quiet=not enabled)
        self._steps, self._every, self._bar = steps, max(1, (steps - start) // 20), None
        if self._console.is_terminal and enabled:
            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(
                progress.TextColumn("training"),
                *columns,
                progress.TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=start, text="")
            self._bar.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        shown = {name: values[name] for name in SHOWN if name in values}
        text = "  ".join(f"{name} {value:.3f}" for name, value in shown.items()) + f"  lr {values['lr']:.2e}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._every == 0 or step == self._steps:
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
