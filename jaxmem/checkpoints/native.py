"""The checkpoints of a training run: what is trained, its optimizer and its random keys, by orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxmem.checkpoints.best import KeepBest, Score, ranked
from jaxmem.checkpoints.checksum import checksums
from jaxmem.checkpoints.identity import differences
from jaxmem.checkpoints.weights import report
from jaxmem.errors import CheckpointError

STATE, ABOUT = "state", "about"
"""The two items of a step: the arrays, and a JSON object that says what they are."""
LAST, BEST = "last.json", "best.json"
"""For people and scripts: the newest whole step, and the best one with what it was judged by."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """One restored checkpoint.

    Attributes:
      step: that was saved.
      state: arrays in the structure of the abstract tree that `restore` was given.
      metadata: what `save` was given.
    """

    step: int
    state: Any
    metadata: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run in one directory.

    A step counts once its directory has its final name, so that a crash while saving leaves the previous step as the
    latest. Each step also holds who it belongs to, which `restore` compares, and a checksum of every array, so that
    damaged files are noticed even where they can still be read. Several hosts call every method at the same place.
    """

    def __init__(
        self,
        directory: str | Path,
        run: Mapping[str, Any],
        *,
        keep: int = 3,
        keep_best: int = 1,
        every: int = 1,
        background: bool = True,
    ) -> None:
        """Opens (or makes) the directory, and removes what an interrupted save left.

        Args:
          directory: local, or a URL that orbax knows (gs://...).
          run: what the run trains, from `identity.run_identity`.
          keep: newest steps that stay.
          keep_best: steps with the best scores that stay too.
          every: steps between checkpoints; `save` ignores the others.
          background: write to disk while training goes on; `wait` or `close` before the process ends.

        Raises:
          CheckpointError: the path is a file.
        """
        self._directory = str(directory) if "://" in str(directory) else os.path.abspath(directory)
        self._path = epath.Path(self._directory)
        if self._path.is_file():
            raise CheckpointError(f"{self._directory} is a file; checkpoints need a directory")
        self._run = json.loads(json.dumps(run))
        self._every, self._keep_best, self._scores = every, keep_best, dict[int, Score]()
        policies = ocp.checkpoint_managers
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), KeepBest(keep_best, self._scores)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            enable_async_checkpointing=background,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=(STATE, ABOUT))
        for step in self._manager.all_steps():
            if score := _score(self._path, step):
                self._scores[step] = score
        self._point()

    def latest(self) -> int | None:
        """The newest step, or None; one that is still being written counts for the process that writes it."""
        return self._manager.latest_step()

    def best(self) -> Score | None:
        """The best score of all steps that are here."""
        scores = ranked(self._scores[step] for step in self._manager.all_steps() if step in self._scores)
        return scores[0] if scores and self._keep_best else None

    def due(self, step: int) -> bool:
        """Would `save` write this step?"""
        return step % self._every == 0

    def preempted(self, step: int) -> bool:
        """Has the machine said, to any host, that it will be taken away? The same on all hosts.

        Every host asks after every step. With several processes jax listens for the notice (SIGTERM, where the
        program has no handler of its own) from the moment they found one another.
        """
        return self._manager.reached_preemption(step)

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
        score: Score | None = None,
    ) -> bool:
        """Writes a step if it is due.

        Args:
          step: larger than every step saved before.
          state: any tree of arrays, such as {"trainable": ..., "optimizer": ..., "key": ...}; typed random keys too.
          metadata: JSON values, such as the position in the data.
          force: write between the regular steps, as at the end of a run.
          score: of this step, where it was evaluated; a step without one cannot become the best.

        Returns:
          Whether the step was written; False also when it is there already.

        Raises:
          CheckpointError: metadata that JSON cannot hold, or files that cannot be written, now or by an earlier call.
        """
        if step == self.latest() or not (force or self.due(step)):
            return False
        leaves = _named(state)
        about = {"run": self._run, "leaves": _describe(leaves), "metadata": dict(metadata or {})}
        try:
            json.dumps(about)
        except TypeError as error:
            raise CheckpointError(f"{self._directory}: the metadata of step {step} is not JSON ({error})") from error
        arrays = {name: _plain(leaf) for name, leaf in leaves.items()}
        about["checksums"] = checksums(arrays)
        if score is not None:
            self._scores[step] = score
            about["score"] = {"metric": score.metric, "value": score.value}
        items = {STATE: ocp.args.StandardSave(arrays), ABOUT: ocp.args.JsonSave(about)}
        self.wait()
        with self._writing():
            return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: Any, step: int | Literal["best"] | None = None) -> Restored | None:
        """Reads a step, bit for bit, onto the devices of `like`, however many they are.

        Args:
          like: tree of jax arrays or of ShapeDtypeStruct (with shardings, or for the default device) that has the
            structure, shapes and dtypes of the saved state.
          step: the latest when None; "best" the one with the best score.

        Returns:
          Restored, or None when there is no checkpoint yet.

        Raises:
          CheckpointError: no such step, the checkpoint of another memory or backbone, leaves that differ, or files
            that are damaged.
        """
        self.wait()
        step = self._chosen(step)
        if step is None:
            return None
        where = f"{self._directory}, step {step}"
        about = self._read(step, ABOUT, ocp.args.JsonRestore())
        other = differences(about["run"], self._run)
        report(where, {"written by another run": other}, "Start in another directory, or restore the settings.")
        leaves = _named(like)
        other = differences(about["leaves"], _describe(leaves))
        report(where, {"arrays that differ": other}, "The trainable tree or the optimizer is not what was saved.")
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        arrays = self._read(step, STATE, ocp.args.StandardRestore(abstract))
        stored, found = about.get("checksums", {}), checksums(arrays)
        if changed := [name for name in stored if stored[name] != found[name]]:
            raise CheckpointError(f"{where}: not the bits that were saved: {', '.join(changed)}; {_REMEDY}")
        state = [_like(arrays[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), state), about["metadata"])

    def _chosen(self, step: int | Literal["best"] | None) -> int | None:
        """The number of a step that is here; None when nothing in particular was asked for and nothing is here."""
        steps = sorted(self._manager.all_steps())
        if step == "best":
            if (best := self.best()) is None:
                raise CheckpointError(f"{self._directory}: no checkpoint has a score; there are {steps}")
            return best.step
        if step is not None and step not in steps:
            raise CheckpointError(f"{self._directory}, step {step}: no such checkpoint; there are {steps}")
        return self.latest() if step is None else step

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """One item of a step. Raises CheckpointError when its files are damaged."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(f"{self._directory}, step {step}: cannot be read ({error}); {_REMEDY}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names what went wrong on the disk."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._directory}: a checkpoint could not be written ({error}); is the disk full or read-only?"
                " The steps before it are whole; the same command goes on from the last of them"
            ) from error

    def tend(self) -> None:
        """Brings `last.json` and `best.json` up to date once the save in the background is done; never waits."""
        if self._pointed != self.latest() and not self._manager.is_saving_in_progress():
            self._point()

    def _point(self) -> None:
        """Writes `last.json` and `best.json` from the steps that have their final names."""
        self._pointed = self.latest()
        whole = [step for step in self._manager.all_steps() if (self._path / str(step)).exists()]
        best = ranked(self._scores[step] for step in whole if step in self._scores)
        last = {"step": whole[-1]} if whole else None
        if jax.process_index() == 0:
            _replace(self._path / LAST, last)
            _replace(self._path / BEST, dataclasses.asdict(best[0]) if best and self._keep_best else None)

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in the background."""
        with self._writing():
            self._manager.wait_until_finished()
        self.tend()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> CheckpointStore:
        """The store itself; leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


_REMEDY = (
    "`jaxmem doctor --checkpoint=FOLDER` says what is whole; remove this step's folder to go on from the step before"
)


def read_about(directory: epath.Path, step: int) -> dict[str, Any]:
    """What a step says about itself: "run", "leaves", "metadata", "checksums" and "score".

    Raises:
      OSError, ValueError: the file is absent or damaged.
    """
    return json.loads((directory / str(step) / ABOUT / "metadata").read_text())


def _score(directory: epath.Path, step: int) -> Score | None:
    """The stored score of a step; None where it has none (a damaged step is named when it is restored)."""
    try:
        return Score(step, **read_about(directory, step)["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(path: epath.Path, facts: Mapping[str, Any] | None) -> None:
    """Makes a file hold `facts`, in one atomic replacement where it does not yet; None removes it."""
    if facts is None:
        path.unlink(missing_ok=True)
        return
    text = json.dumps(facts) + "\n"
    if not path.exists() or path.read_text() != text:
        temporary = path.parent / f"{path.name}.tmp"
        temporary.write_text(text)
        temporary.replace(path)


def _named(tree: Any) -> dict[str, Any]:
    """Path to leaf of any tree; named tuples and dataclasses contribute their field names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    """Is it a typed random key?"""
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Shape and dtype of every leaf in words, such as "float32[3, 512]" or "key<fry>[]"."""
    return {name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" for name, leaf in leaves.items()}


def _plain(leaf: Any) -> Any:
    """A leaf as orbax stores it: random keys as their bits, numbers and numpy arrays as jax arrays."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax shall restore for a leaf, and where."""
    plain = jax.eval_shape(_plain, leaf)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _like(array: jax.Array, leaf: Any) -> jax.Array:
    """The stored bits as what the leaf was: random keys become keys again."""
    if not _is_key(leaf):
        return array
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(array, impl=kinds[0])
