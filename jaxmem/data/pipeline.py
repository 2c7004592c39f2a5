"""Records to training batches: one grain pipeline whose whole position is the number of steps done.

Every batch is a pure function of (dataset, seed, step): a run that starts again at step n sees what it would have
seen. Rows that cannot be used are named, counted and written down; past a threshold they stop the run.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.backbones.batch import Batch
from jaxmem.data.records import name_of
from jaxmem.errors import DataError


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one step reads.

    Attributes:
      batch: [G, ...] numpy arrays, or the rows that this host reads. Rows that only fill it up have no supervised
        token.
      names: of the records of all G rows, without those that this host could not use.
      examples: the records that this host could use, encoded.
    """

    batch: Batch
    names: tuple[str, ...]
    examples: tuple[Any, ...] = ()


class Rejections:
    """Counts records that cannot be used, each once, and raises when they are too many.

    Args:
      records: size of the dataset.
      max_fraction: share of the dataset that may be rejected; 0 stops at the first.
      path: JSON-lines file for {"record", "error"}; None writes none. A file of an earlier start counts.
    """

    def __init__(self, records: int, max_fraction: float = 0.0, path: str | Path | None = None) -> None:
        self._limit, self._records, self._lock = max_fraction * records, records, threading.Lock()
        self._path = None if path is None else Path(path)
        self.errors: dict[str, str] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                self._recall(line)

    def _recall(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # a line cut short by a kill
            return
        self.errors[entry["record"]] = entry["error"]

    def add(self, name: str, error: Exception | str) -> None:
        """Takes note of a record; DataError when more than the allowed share has been rejected."""
        with self._lock:
            if name not in self.errors:
                self.errors[name] = str(error)
                if self._path is not None:
                    with open(self._path, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"record": name, "error": str(error)}) + "\n")
            if len(self.errors) > self._limit:
                where = "" if self._path is None else f"; all are in {self._path}"
                raise DataError(
                    f"{len(self.errors)} of {self._records} records cannot be used, the last is {name}: {error}"
                    f" (data.max_rejected_fraction allows {self._limit:g} records{where})"
                )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A dataset as a sequence of batches.

    Attributes:
      source: records, anything with a length and an index.
      encode: record -> example; whatever it raises rejects the record.
      assemble: examples -> Batch of numpy arrays, padded to one of few shapes.
      batch_size: rows G of a batch; the last one of an epoch is filled up with rows that carry no loss.
      shuffle: a new order for every epoch, from `seed`.
      seed: of the order.
      rejections: keeps the account of unusable records; None stops at the first.
      threads: that encode ahead; 0 encodes in the loop.
      prefetch: batches that may wait, encoded.
      supervised: reject rows without any supervised token; False for prompts.
      share: which of the G rows of every batch this host reads; None reads all.
    """

    source: Sequence[Any]
    encode: Callable[[Any], Any]
    assemble: Callable[[Sequence[Any]], Batch]
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    rejections: Rejections | None = None
    threads: int = 2
    prefetch: int = 8
    supervised: bool = True
    share: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.source):
            raise DataError("the dataset is empty; there is nothing to train or evaluate on")
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.rejections is None:
            object.__setattr__(self, "rejections", Rejections(len(self.source)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the records."""
        return -(-len(self.source) // self.batch_size)

    def steps(self, start: int, stop: int) -> Iterator[Rows]:
        """The batches of steps start..stop-1; every epoch holds each record once.

        Raises:
          DataError: too many records were rejected, or none of a batch can be used.
        """
        import grain

        if start >= stop:
            return iter(())
        order = grain.MapDataset.range(len(self.source))
        if self.shuffle:
            order = order.shuffle(seed=self.seed)
        batches = order.batch(self.batch_size, drop_remainder=False, batch_fn=list)
        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.prefetch if self.threads else 0)
        batches = batches.repeat(-(-stop // self.steps_per_epoch)).slice(slice(start, stop)).map(self._rows)
        return iter(batches.to_iter_dataset(ahead))

    def epoch(self) -> Iterator[Rows]:
        """The batches of the first epoch."""
        return self.steps(0, self.steps_per_epoch)

    def pick(self, indices: Sequence[int]) -> Rows:
        """The batch of chosen records, which may be fewer; those that cannot be used are rejected as in `steps`."""
        return self._rows(list(dict.fromkeys(indices)))

    def _rows(self, indices: Sequence[int]) -> Rows:
        """Encodes, assembles and fills up one batch, or this host's share of it."""
        mine = indices if self.share is None else [indices[row] for row in self.share if row < len(indices)]
        usable = self._encoded(mine)
        batch = self._assembled(usable) if usable else self._filler(indices)
        supervised = np.sum(np.asarray(batch.loss_mask)[:, 1:], axis=1)
        supervised = supervised if self.supervised else np.ones(len(supervised))
        for index, weight in zip(list(usable), supervised.tolist(), strict=False):
            if not weight:
                self._reject(index, "no token of it is supervised (it needs an assistant message with text)")
        named = [index for index in indices if index in usable or index not in mine]
        return Rows(batch, tuple(name_of(self.source, index) for index in named), tuple(usable.values()))

    def _encoded(self, indices: Sequence[int]) -> dict[int, Any]:
        """The examples of the records that can be encoded, by index; the others are rejected."""
        usable = {}
        for index in indices:
            try:
                usable[index] = self.encode(self.source[index])
            except Exception as error:  # any fault of a record is reported with its name
                self._reject(index, error)
        return usable

    def _filler(self, indices: Sequence[int]) -> Batch:
        """A share without a usable record: rows of the batch's first usable one, without loss."""
        for index in indices:
            if found := self._encoded([index]):
                batch = self._filled(found)
                return dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
        return self._filled({})

    def _assembled(self, usable: dict[int, Any]) -> Batch:
        """The batch of the usable examples; those that cannot be assembled are rejected and leave `usable`."""
        try:
            return self._filled(usable)
        except ValueError:
            for index, example in list(usable.items()):
                try:
                    self.assemble([example])
                except ValueError as error:
                    self._reject(index, error)
                    del usable[index]
            return self._filled(usable)

    def _filled(self, usable: dict[int, Any]) -> Batch:
        """As many rows as this host reads: the usable ones, then copies of the first without loss."""
        if not usable:
            raise DataError(f"no record of a batch can be used; the last fault was: {self._last_fault()}")
        examples = list(usable.values())
        rows = self.batch_size if self.share is None else len(self.share)
        batch = self.assemble(examples + examples[:1] * (rows - len(examples)))
        weights = np.array(batch.loss_mask)
        weights[len(examples) :] = 0
        return dataclasses.replace(batch, loss_mask=weights)

    def _reject(self, index: int, error: Exception | str) -> None:
        assert self.rejections is not None
        self.rejections.add(name_of(self.source, index), error)

    def _last_fault(self) -> str:
        assert self.rejections is not None
        return next(reversed(self.rejections.errors.values()), "none")


def blind_rows(seed: int, step: int, rows: int, share: float) -> np.ndarray:
    """[rows] bool, the rows of a step that train with visual-key blocking.

    A pure function of its arguments. The number of rows is `share * rows`, rounded up or down at random so that the
    expected share is exact.
    """
    draw = np.random.default_rng((seed, step, 0xB11D))
    count = int(share * rows + draw.random())
    return draw.permutation(rows) < count
