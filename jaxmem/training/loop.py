"""The run: steps, metrics, evaluation and checkpoints, such that a run that was killed goes on bit for bit.

All that a step depends on is its state (parameters, optimizer, key), the frozen tree and its number: the batch and
the blindfolds are pure functions of (dataset, seed, step).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.backbones.batch import Batch
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.data.pipeline import Pipeline, Rows, blind_rows
from jaxmem.distributed import hosts
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.training import goodput, position
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.goodput import Goodput
from jaxmem.training.metrics import EVENTS, SAMPLES, SKIPPED, Display, MetricLog, read, truncate
from jaxmem.training.placing import level, place, share_of
from jaxmem.training.recorder import NonFiniteError as NonFiniteError
from jaxmem.training.recorder import Recorder
from jaxmem.training.saving import Saver
from jaxmem.training.signals import Interrupted, Signals
from jaxmem.training.trees import Tree

Step = Callable[[TrainState, Rows, int], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a run proceeds; nothing here says what is learnt except `batch_size`, `accumulate` and `p_block`.

    Attributes:
      steps: optimizer steps in all; 0 means `epochs`.
      epochs: passes over the dataset.
      batch_size: rows per optimizer step, over all devices and microbatches.
      accumulate: microbatches that a step's rows are cut into; 0 makes as many as leave one row for each of the mesh's
        data x fsdp ways.
      p_block: share of rows with visual-key blocking: their text cannot attend to the image in the backbone, only
        through the memory (0 is the paper).
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      checkpoint_every: steps between checkpoints.
      checkpoint_seconds: seconds after which there is a checkpoint whatever the step; counted from the beginning of
        the last one, by the clock of host 0; 0 goes by steps alone.
      keep: newest checkpoints that stay.
      keep_best: checkpoints with the best evaluations that stay besides; an evaluation that is better than all before
        it makes a checkpoint. 0 keeps none.
      best_metric: metric of the evaluation that decides; "" is the first of eval/reward, eval/accuracy and eval/loss
        that there is. Lower is better for names that end in "loss", higher for all others.
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
    checkpoint_seconds: float = 60.0
    keep: int = 3
    keep_best: int = 1
    best_metric: str = ""
    max_nonfinite: int = 5
    resume: Literal["auto", "never", "must"] = "auto"
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "checkpoint_every", "keep", "max_nonfinite", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("accumulate", "checkpoint_seconds", "keep_best"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name} must not be negative, got {getattr(self, name)}")
        if self.accumulate and self.batch_size % self.accumulate:
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
      began: `time.monotonic()` when the program began, for its start-up time; None is when the loop begins.
    """

    config: LoopConfig
    steps: int
    step: Step
    frozen: Tree
    data: Pipeline
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    mesh: Mesh | None = None
    evaluate_first: bool = False
    began: float | None = None


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

    share = share_of(mesh, config.batch_size, config.accumulate)

    def one(state: TrainState, rows: Rows, done: int) -> tuple[TrainState, Metrics]:
        batch = level(blinded(rows.batch, config, seed, done, share), "a batch of the training")
        return step(state, frozen, place(batch, config.accumulate, mesh, config.batch_size))

    return one


def run(job: Job, state: TrainState, store: CheckpointStore, folder: str | Path) -> tuple[TrainState, dict[str, float]]:
    """Trains to the last step, from the newest checkpoint if there is one.

    `metrics.jsonl` holds every step once and in order, whatever ended the starts before: lines are written before
    the checkpoint that covers them, and those later than the checkpoint are removed before their steps are done again.

    Args:
      job: what to do.
      state: the state in front of the first step; its arrays are donated.
      store: of the checkpoints.
      folder: output directory for metrics.

    Returns:
      The final state, and the metrics of the last step together with the last evaluation.

    Raises:
      NonFiniteError: loss or gradient stayed non-finite for `max_nonfinite` steps.
      Interrupted: SIGTERM, SIGINT or a notice that the machine is taken away, on any host; all hosts ended after the
        same step, and it is in a checkpoint.
      DataError, CheckpointError: of the data and of the checkpoints.
    """
    config, folder = job.config, Path(folder)
    with Signals() as signals:
        state, about = resume(job, state, store)
        start, first = int(state.step), hosts.first()
        clock, last = hosts.once("what earlier starts wrote", lambda: _go_on(job, folder, start, about))
        clock = Goodput(clock, job.began)
        with (
            MetricLog(folder, start or -1, tensorboard=config.tensorboard, quiet=not first) as log,
            Display(start, job.steps, config.progress and first) as display,
        ):
            if start:
                display.say(f"resuming after step {start} of {job.steps}")
            recorder = Recorder(
                log,
                display,
                folder,
                clock,
                steps=job.steps,
                log_every=config.log_every,
                max_nonfinite=config.max_nonfinite,
                skipped=about.get("skipped_in_a_row", 0),
                last=last,
            )
            saver = Saver(store, folder, recorder, clock, signals, config.checkpoint_seconds, config.keep_best)
            state = _steps(job, state, start, recorder, saver)
    return state, recorder.last


def _steps(job: Job, state: TrainState, start: int, recorder: Recorder, saver: Saver) -> TrainState:
    """The steps after `start`, each with what follows it."""
    if job.evaluate is not None and job.evaluate_first and not start:
        saver.clock.lap("startup")
        recorder.evaluated(0, job.evaluate(state))
        saver.clock.lap("evaluation")
    for done, wait, rows in _timed(job, start, recorder, saver.clock):
        state, metrics = job.step(state, rows, done)
        saver.clock.lap("step" if done > start else "startup")
        recorder.take(done + 1, rows.names, metrics, wait)
        _after_step(job, state, done + 1, recorder, saver)
    if start < job.steps:
        saver.finish()
    return state


def _after_step(job: Job, state: TrainState, step: int, recorder: Recorder, saver: Saver) -> None:
    """Evaluation, checkpoint, and the end when somebody asked for it."""
    last, every = step == job.steps, job.config.eval_every
    values = None
    if job.evaluate is not None and (last or (every and step % every == 0)):
        recorder.flush()
        values = job.evaluate(state)
        saver.clock.lap("evaluation")
        recorder.evaluated(step, values)
    agreed = saver.agree(step, values, job.config.best_metric)
    if last or agreed.stop or agreed.save:
        saver.save(step, state, agreed.score, position.position(job.data, step))
    if agreed.stop and not last:
        saver.finish()
        raise Interrupted(f"stopped by {agreed.stop} after step {step} of {job.steps}; the same command goes on")


def _go_on(job: Job, folder: Path, start: int, about: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Host 0 at the beginning of a start: (seconds booked by kind, metrics of the steps up to `start`).

    What was written about later steps is removed; that their time is lost is written first.
    """
    lines, latest = read(folder), about.get("goodput", {})
    if start < job.steps:
        latest = goodput.known(folder, lines)
        latest = goodput.resumed(latest, about.get("goodput", latest if start else {}))
        Goodput(latest).save(folder)
    for name in (SKIPPED, SAMPLES, EVENTS):
        truncate(folder / name, start)
    return latest, {name: v for line in lines if line["step"] <= start for name, v in line.items()}


def resume(job: Job, state: TrainState, store: CheckpointStore) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, or `state`, according to `job.config.resume`; and the metadata of the checkpoint.

    Raises:
      CheckpointError: `job.config.resume` does not allow it, the checkpoint is another run's or damaged, or the data
        are not what the run read before.
      HostError: the hosts do not see the same checkpoints.
    """
    state = _spread(state, job.mesh)
    latest = store.latest()
    hosts.agree("state of the run", {"newest checkpoint (all hosts must share the output directory)": latest})
    if latest is None:
        if job.config.resume == "must":
            raise CheckpointError('resume is "must", and the output directory has no checkpoint')
        return state, {}
    if job.config.resume == "never":
        raise CheckpointError(f'resume is "never", and the output directory has a checkpoint of step {latest}')
    restored = store.restore(state)
    assert restored is not None  # there is a latest step
    position.verify(restored.metadata.get("position"), job.data, latest)
    return restored.state, restored.metadata


def _spread(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Leaves that are on no mesh yet (step, key, counters) on every device of it."""
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere), state
    )


def _timed(job: Job, start: int, recorder: Recorder, clock: Goodput) -> Iterator[tuple[int, float, Rows]]:
    """(steps done before, seconds waited for the batch, the batch)."""
    rows = job.data.steps(start, job.steps)
    for done in range(start, job.steps):
        if done > start:
            clock.lap("step")
        began = time.perf_counter()
        batch = next(rows)
        wait = time.perf_counter() - began
        if done > start:
            clock.lap("step" if recorder.busy() else "input_wait")
        yield done, wait, batch


def blinded(batch: Batch, config: LoopConfig, seed: int, done: int, share: tuple[int, ...] | None = None) -> Batch:
    """The batch, or this host's share of it, with the blindfolds of the step that follows on `done` steps."""
    if not config.p_block:
        return batch
    blind = blind_rows(seed, done, config.batch_size, config.p_block)
    return dataclasses.replace(batch, blind=blind if share is None else blind[list(share)])
