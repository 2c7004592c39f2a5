"""The checkpoints of a training run: what is trained, its optimizer and its random keys, by orbax."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmem.checkpoints.identity import differences
from jaxmem.checkpoints.weights import report
from jaxmem.errors import CheckpointError

_STATE, _ABOUT = "state", "about"


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
    latest. Each step also holds who it belongs to; `restore` refuses the checkpoint of another memory or backbone.
    """

    def __init__(
        self, directory: str | Path, run: Mapping[str, Any], *, keep: int = 3, every: int = 1, background: bool = True
    ) -> None:
        """Opens (or makes) the directory.

        Args:
          directory: local, or a URL that orbax knows (gs://...).
          run: what the run trains, from `identity.run_identity`.
          keep: newest steps that stay.
          every: steps between checkpoints; `save` ignores the others.
          background: write to disk while training goes on; `wait` or `close` before the process ends.
        """
        self._directory = str(directory) if "://" in str(directory) else os.path.abspath(directory)
        self._run = json.loads(json.dumps(run))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=background,
            cleanup_tmp_directories=True,
        )
        self._every = every
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=(_STATE, _ABOUT))

    def latest(self) -> int | None:
        """The newest step, or None; one that is still being written counts for the process that writes it."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Would `save` write this step: a multiple of `every`, or any when the machine is about to be taken away?"""
        return step % self._every == 0 or self._manager.reached_preemption(step)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None, *, force: bool = False) -> bool:
        """Writes a step if it is due.

        Args:
          step: larger than every step saved before.
          state: any tree of arrays, such as {"trainable": ..., "optimizer": ..., "key": ...}; typed random keys too.
          metadata: JSON values, such as the position in the data.
          force: write between the regular steps, as at the end of a run.

        Returns:
          Whether the step was written; False also when it is there already.

        Raises:
          CheckpointError: metadata that JSON cannot hold.
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
        items = {_STATE: ocp.args.StandardSave(arrays), _ABOUT: ocp.args.JsonSave(about)}
        return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """Reads a step, bit for bit, onto the devices of `like`.

        Args:
          like: tree of jax arrays or of ShapeDtypeStruct (with shardings, or for the default device) that has the
            structure, shapes and dtypes of the saved state.
          step: the latest when None.

        Returns:
          Restored, or None when there is no checkpoint yet.

        Raises:
          CheckpointError: no such step, the checkpoint of another memory or backbone, or leaves that differ.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None:
            return None
        where = f"{self._directory}, step {step}"
        if step not in self._manager.all_steps():
            raise CheckpointError(f"{where}: no such checkpoint; there are {sorted(self._manager.all_steps())}")
        about = self._read(step, _ABOUT, ocp.args.JsonRestore())
        other = differences(about["run"], self._run)
        report(where, {"written by another run": other}, "Start in another directory, or restore the settings.")
        leaves = _named(like)
        other = differences(about["leaves"], _describe(leaves))
        report(where, {"arrays that differ": other}, "The trainable tree or the optimizer is not what was saved.")
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        arrays = self._read(step, _STATE, ocp.args.StandardRestore(abstract))
        state = [_like(arrays[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), state), about["metadata"])

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """One item of a step. Raises CheckpointError when its files are damaged."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"{self._directory}, step {step}: cannot be read ({error}); "
                "remove this step's folder to go on from the step before"
            ) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> CheckpointStore:
        """The store itself; leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


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
    """A leaf as orbax stores it: random keys as their bits, python numbers as arrays."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


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
