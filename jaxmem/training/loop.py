"""The run: steps, metrics, evaluation and checkpoints, such that a run that was killed goes on bit for bit.

All that a step depends on is its state (parameters, optimizer, key), the frozen tree and its number: the batch and
the blindfolds are pure functions of (dataset, seed, step).
"""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.backbones.batch import Batch
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.data.pipeline import Pipeline, Rows, blind_rows
from jaxmem.distributed.mesh import BATCH
from jaxmem.errors import CheckpointError, ConfigError, JaxmemError
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.metrics import SHOWN, Display, MetricLog, read, truncate
from jaxmem.training.trees import Tree

SKIPPED = "skipped.jsonl"
SAMPLES, EVENTS = "samples.jsonl", "events.jsonl"
Step = Callable[[TrainState, Rows, int], tuple[TrainState, Metrics]]


class NonFiniteError(JaxmemError):
    """Loss or gradient stayed infinite or NaN for too many steps in a row."""


class Interrupted(JaxmemError):
    """A signal asked the run to stop; its last step is in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a run proceeds; nothing here says what is learnt except `batch_size`, `accumulate` and `p_block`.

    Attributes:
      steps: optimizer steps in all; 0 means `epochs`.
      epochs: passes over the dataset.
      batch_size: rows per optimizer step, over all devices and microbatches.
      accumulate: microbatches that a step's rows are cut into.
      p_block: share of rows with visual-key blocking: their text cannot attend to the image in the backbone, only
        through the memory (0 is the paper).
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      checkpoint_every: steps between checkpoints.
      keep: newest checkpoints that stay.
      max_nonfinite: steps in a row that may be skipped because loss or gradient is not finite.
      resume: "auto" goes on where an earlier start stopped, if there was one; "must" insists on one; "never" insists
        on a fresh directory.
      progress: show a progress bar.
      tensorboard: write event files.
    """

    steps: int = 0
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    p_block: float = 0.0
    log_every: int = 1
    eval_every: int = 0
    checkpoint_every: int = 500
    keep: int = 3
    max_nonfinite: int = 5
    resume: Literal["auto", "never", "must"] = "auto"
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "max_nonfinite", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"loop.batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not 0 <= self.p_block <= 1:
            raise ConfigError(f"loop.p_block is a share between 0 and 1, got {self.p_block}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.steps or self.epochs * steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop drives.

    Attributes:
      config: how the run proceeds.
      steps: steps in all.
      step: one step of whatever kind: step(state, rows, number of steps done before) -> (state, metrics).
      frozen: the tree that does not train.
      data: the training batches.
      evaluate: state -> metrics named "eval/...", or None.
      mesh: devices; None is the default device.
      evaluate_first: evaluate in front of the first step too.
    """

    config: LoopConfig
    steps: int
    step: Step
    frozen: Tree
    data: Pipeline
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    mesh: Mesh | None = None
    evaluate_first: bool = False


def supervised(
    step: Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]],
    frozen: Tree,
    config: LoopConfig,
    seed: int,
    mesh: Mesh | None = None,
) -> Step:
    """The compiled step of `sft.make_train_step` as a step of the loop: blindfolds, microbatches and placing.

    Args:
      step: step(state, frozen, batches [A, B, ...]) -> (state, metrics).
      frozen: the tree that does not train.
      config: gives the microbatches and `p_block`.
      seed: of the blindfolds.
      mesh: devices.
    """

    def one(state: TrainState, rows: Rows, done: int) -> tuple[TrainState, Metrics]:
        return step(state, frozen, place(blinded(rows.batch, config, seed, done), config.accumulate, mesh))

    return one


def run(job: Job, state: TrainState, store: CheckpointStore, folder: str | Path) -> tuple[TrainState, dict[str, float]]:
    """Trains to the last step, from the newest checkpoint if there is one.

    Args:
      job: what to do.
      state: the state in front of the first step; its arrays are donated.
      store: of the checkpoints.
      folder: output directory for metrics.

    Returns:
      The final state, and the metrics of the last step together with the last evaluation.

    Raises:
      NonFiniteError: loss or gradient stayed non-finite for `max_nonfinite` steps.
      Interrupted: SIGTERM or SIGINT; a checkpoint was written.
      DataError, CheckpointError: of the data and of the checkpoints.
    """
    state, skipped = resume(job, state, store)
    start = int(state.step)
    for name in (SKIPPED, SAMPLES, EVENTS):
        truncate(Path(folder) / name, start)
    with (
        MetricLog(folder, start, tensorboard=job.config.tensorboard) as log,
        Display(start, job.steps, job.config.progress) as display,
        _Signals() as signals,
    ):
        if start:
            display.say(f"resuming after step {start} of {job.steps}")
        recorder = _Recorder(job, log, display, Path(folder), skipped)
        if job.evaluate is not None and job.evaluate_first and not start:
            recorder.evaluated(0, job.evaluate(state))
        for done, wait, rows in _timed(job.data.steps(start, job.steps), start):
            state, metrics = job.step(state, rows, done)
            recorder.take(done + 1, rows.names, metrics, wait)
            _after_step(job, state, done + 1, store, recorder, signals)
        recorder.flush()
        store.wait()
    return state, recorder.last


def _after_step(
    job: Job, state: TrainState, step: int, store: CheckpointStore, recorder: _Recorder, signals: _Signals
) -> None:
    """Evaluation, checkpoint, and the end on a signal."""
    last, every = step == job.steps, job.config.eval_every
    if job.evaluate is not None and (last or (every and step % every == 0)):
        recorder.flush()
        recorder.evaluated(step, job.evaluate(state))
    if last or signals.caught or store.due(step):
        recorder.flush()
        store.save(step, _kept(state), {"skipped_in_a_row": recorder.skipped}, force=True)
    if signals.caught and not last:
        store.wait()
        raise Interrupted(f"stopped by {signals.caught} after step {step} of {job.steps}; the same command goes on")


def _kept(state: TrainState) -> TrainState:
    """The state as the writer in the background may keep it: on a CPU it would share memory that a step donates."""
    return jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state


def resume(job: Job, state: TrainState, store: CheckpointStore) -> tuple[TrainState, int]:
    """The newest checkpoint, or `state`, according to `job.config.resume`; and the skipped steps just before it."""
    state = _spread(state, job.mesh)
    latest = store.latest()
    if latest is None:
        if job.config.resume == "must":
            raise CheckpointError('resume is "must", and the output directory has no checkpoint')
        return state, 0
    if job.config.resume == "never":
        raise CheckpointError(f'resume is "never", and the output directory has a checkpoint of step {latest}')
    restored = store.restore(state)
    assert restored is not None  # there is a latest step
    return restored.state, int(restored.metadata.get("skipped_in_a_row", 0))


def _spread(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Leaves that are on no mesh yet (step, key, counters) on every device of it."""
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere), state
    )


def _timed(rows: Iterator[Rows], start: int) -> Iterator[tuple[int, float, Rows]]:
    """(steps done before, seconds waited for the batch, the batch)."""
    for done in range(start, 2**62):
        began = time.perf_counter()
        try:
            batch = next(rows)
        except StopIteration:
            return
        yield done, time.perf_counter() - began, batch


def blinded(batch: Batch, config: LoopConfig, seed: int, done: int) -> Batch:
    """The batch with the blindfolds of the step that follows on `done` steps."""
    if not config.p_block:
        return batch
    return dataclasses.replace(batch, blind=blind_rows(seed, done, len(batch.tokens), config.p_block))


def place(batch: Any, parts: int, mesh: Mesh | None) -> Any:
    """[G, ...] on the host -> [parts, G / parts, ...] on the devices, rows over the mesh's data axes."""
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(parts, -1, *leaf.shape[1:]), batch)
    return put(stacked, None if mesh is None else NamedSharding(mesh, P(None, *BATCH)))


def put(batch: Any, sharding: NamedSharding | None) -> Any:
    """Host arrays to the devices; every process holds the whole batch and keeps its own part."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, batch)
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), batch)


class _Recorder:
    """Reads the metrics of a step while the next one runs, and keeps account of skipped steps.

    Attributes:
      skipped: steps skipped in a row up to now.
      last: metrics of the last step read, with those of the last evaluation.
    """

    def __init__(self, job: Job, log: MetricLog, display: Display, folder: Path, skipped: int) -> None:
        self.skipped, self.last = skipped, {name: v for line in read(folder) for name, v in line.items()}
        self._job, self._log, self._display, self._skips = job, log, display, folder / SKIPPED
        self._waiting: tuple[int, tuple[str, ...], Metrics, float] | None = None
        self._clock = time.perf_counter()
        self._history: list[str] = []

    def take(self, step: int, names: tuple[str, ...], metrics: Metrics, wait: float) -> None:
        """Hands over a step that was just started; the one before it is read and written."""
        self.flush()
        self._waiting = (step, names, metrics, wait)

    def flush(self) -> None:
        """Waits for the step handed over last and writes it."""
        if self._waiting is None:
            return
        (step, names, metrics, wait), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        values |= {"seconds": seconds, "wait_seconds": wait, "tokens_per_second": values["tokens"] / seconds}
        self.last |= {"step": step, **values}
        if step % self._job.config.log_every == 0 or step == self._job.steps or values["skipped"]:
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
        with open(self._skips, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._history.append(f"step {step} ({fault}): {_few(names)}")
        self._display.say(f"step {step} skipped, nothing was updated: {fault}; rows {_few(names)}")
        if self.skipped >= self._job.config.max_nonfinite:
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


def _few(names: tuple[str, ...], count: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class _Signals:
    """Remembers the first SIGTERM or SIGINT, so that the step under way can end; a second one acts at once.

    Attributes:
      caught: name of the signal, or "".
    """

    def __init__(self) -> None:
        self.caught, self._old = "", {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        self.caught = signal.Signals(number).name
        for one, old in self._old.items():
            signal.signal(one, old)

    def __exit__(self, *_: Any) -> None:
        for one, old in self._old.items():
            signal.signal(one, old)
