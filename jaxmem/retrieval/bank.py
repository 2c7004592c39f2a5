"""A memory bank: a folder that holds the embeddings of every knowledge item, made once and read by many.

An item's memory does not depend on the question (arXiv 2505.17670, section 3), so that it can be kept. See
`jaxmem.retrieval.shards` for the files and `jaxmem.retrieval.build` for how a bank is made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxmem.data.items import Item, some
from jaxmem.errors import DataError
from jaxmem.retrieval import files, shards
from jaxmem.retrieval.shards import Layout, Rejected, Shard

_MAPPED = 1024  # shards that are mapped at once; a process may have some 65,000 maps


class Encoder(Protocol):
    """What makes embeddings of items.

    A method `size(item) -> int`, if there is one, says how long an item is: items of a shard are encoded in the
    order of their sizes. What is wrong with an item is a DataError; any other error ends the build.
    """

    @property
    def digest(self) -> str:
        """Of everything that the embeddings depend on but the template: weights and settings."""
        ...

    @property
    def template(self) -> str:
        """Digest of how an item is written as tokens."""
        ...

    @property
    def latents(self) -> int:
        """M."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    def encode(self, items: Sequence[Item]) -> np.ndarray:
        """[n, M, D] float32 or bfloat16, one row per item."""
        ...


class Bank:
    """A bank that is open for reading. Arrays are mapped, not loaded; all indexes are in memory.

    Attributes:
      folder: where it lies.
      layout: what its shards share.
      shards: the complete ones.
    """

    def __init__(self, folder: Path, layout: Layout, complete: Sequence[Shard]) -> None:
        self.folder, self.layout, self.shards = folder, layout, tuple(complete)
        self._places = {name: (shard.number, row) for shard in self.shards for row, name in enumerate(shard.ids)}
        self._by_number = {shard.number: shard for shard in self.shards}
        self._arrays = functools.lru_cache(_MAPPED)(self._mapped)

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder | None = None) -> Bank:
        """Opens a bank; shards that a killed build left half-written are not part of it.

        Args:
          folder: of the bank.
          encoder: refuse the bank unless this made it; None accepts any.

        Raises:
          DataError: no bank, one of another encoder or template, or a shard that is missing, damaged or truncated.
        """
        folder = Path(folder)
        layout = shards.read_layout(folder)
        if encoder is not None:
            check_encoder(folder, layout, encoder)
        complete = tuple(shards.read_shards(folder, layout))
        if absent := sorted(set(range(len(complete))) - {shard.number for shard in complete}):
            names = some([shards.path(folder, number, "json").name for number in absent])
            raise DataError(f"{folder}: {names} is missing though later shards exist; run the same build again")
        return cls(folder, layout, complete)

    def __len__(self) -> int:
        """Number of items."""
        return len(self._places)

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all items, in their order."""
        return tuple(self._places)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """What could not be encoded and is not in the bank."""
        return missing(self.shards)

    def __contains__(self, name: object) -> bool:
        """Is there an item of this id?"""
        return name in self._places

    def where(self, name: str) -> tuple[int, int]:
        """Number of the shard of an item and its row there; DataError for an unknown id."""
        return self._found([name])[0]

    def get(self, ids: Sequence[str]) -> np.ndarray:
        """The embeddings of items, in the order of `ids`: [n, M, D] bfloat16; int8 comes back dequantised.

        Raises:
          DataError: ids that the bank does not have.
        """
        found = np.zeros((len(ids), self.layout.latents, self.layout.width), ml_dtypes.bfloat16)
        for at, (number, row) in enumerate(self._found(ids)):
            rows = {suffix: array[row : row + 1] for suffix, array in self._arrays(number).items()}
            found[at] = shards.unpack(self.layout, rows)[0]
        return found

    def _found(self, ids: Sequence[str]) -> list[tuple[int, int]]:
        """Shard and row of every id."""
        if unknown := [repr(name) for name in dict.fromkeys(ids) if name not in self._places]:
            raise DataError(
                f"{self.folder}: no item with the id {some(unknown)}; add it to the bank (jaxmem bank add), or build "
                "the index from the items of the bank"
            )
        return [self._places[name] for name in ids]

    def _mapped(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard by suffix."""
        count = len(self._by_number[number].ids)
        return {
            suffix: np.memmap(shards.path(self.folder, number, suffix), dtype, "r", shape=(count, *shape))
            for suffix, (dtype, shape) in self.layout.parts.items()
        }

    def faults(self) -> tuple[str, ...]:
        """Reads all arrays and names those whose checksum differs from the one that was written."""
        wrong = []
        for shard in self.shards:
            for suffix in self.layout.parts:
                file = shards.path(self.folder, shard.number, suffix)
                found = files.sha256(file) if file.is_file() else None
                if found != shard.sha256[suffix]:
                    wrong.append(f"{file} " + ("is missing" if found is None else "has other bytes than were written"))
        return tuple(wrong)

    def verify(self) -> None:
        """Raises DataError that names the shards that are not as they were written; see `faults`."""
        if wrong := self.faults():
            raise DataError(f"{self.folder}: {some(wrong)}; {shards.ADVICE}")


def missing(complete: Sequence[Shard]) -> tuple[Rejected, ...]:
    """The rejected items of shards, each once, without those that were put right and added later."""
    held = {name for shard in complete for name in shard.ids}
    latest = {(one.id or "", "" if one.id else one.record): one for shard in complete for one in shard.rejected}
    return tuple(one for one in latest.values() if one.id not in held)


def check_encoder(folder: Path, layout: Layout, encoder: Encoder) -> None:
    """Raises DataError when a bank was not made by this encoder with this template and these sizes."""
    pairs = [("encoder", layout.encoder, encoder.digest), ("template", layout.template, encoder.template)]
    for kind, stored, ours in pairs:
        if stored != ours:
            raise DataError(
                f"bank {folder} was made by {kind} {stored[:16]}, this one is {ours[:16]}; build another folder, or "
                f"load the model and memory that made it"
            )
    if (layout.latents, layout.width) != (encoder.latents, encoder.width):
        raise DataError(
            f"bank {folder} holds {layout.latents} embeddings of width {layout.width} per item, this encoder makes "
            f"{encoder.latents} of width {encoder.width}; build another folder"
        )
