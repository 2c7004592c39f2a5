"""The index that compares a query with every item: no approximation, nothing to set, and the judge of the others.

    index.json    width, embedder, number of items
    ids.json      of the items in their order
    vectors.bin   [N, E] float32, little-endian, normalised; memory-mapped

Letters as in `jaxmem.retrieval.index`; B items of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.errors import DataError
from jaxmem.retrieval import files, index
from jaxmem.retrieval.index import Hits

_IDS, _VECTORS = "ids.json", "vectors.bin"
_BLOCK, _QUERIES = 1 << 24, 256  # numbers of a block of items; queries at once


class ExactIndex:
    """See the module; made by `create` or `open`.

    Attributes:
      folder: where it lies.
      width: E.
      embedder: digest of what made the vectors.
    """

    def __init__(self, folder: Path, width: int, embedder: str, ids: list[str]) -> None:
        self.folder, self.width, self.embedder, self._ids = folder, width, embedder, ids

    @classmethod
    def create(cls, folder: str | Path, ids: Sequence[str], vectors: Any, embedder: str) -> ExactIndex:
        """See `index.create_index`."""
        folder = Path(folder)
        with files.locked(folder):
            index.refuse_existing(folder)
            made = cls(folder, width_of(vectors), embedder, [])
            made._append(ids, vectors)
        return made

    @classmethod
    def open(cls, folder: str | Path) -> ExactIndex:
        """Opens a folder; DataError when it holds no exact index, or a truncated one."""
        folder = Path(folder)
        info = index.read_info(folder, "exact")
        ids = files.read_json(folder / _IDS, "index")["ids"][: info["items"]]
        vectors = folder / _VECTORS
        size, found = info["items"] * info["width"] * 4, vectors.stat().st_size if vectors.is_file() else 0
        if found < size or len(ids) < info["items"]:
            raise DataError(f"{vectors} has {found:,} bytes where {size:,} belong; make the index again")
        return cls(folder, info["width"], info["embedder"], ids)

    def __len__(self) -> int:
        """N."""
        return len(self._ids)

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all items in their order."""
        return tuple(self._ids)

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the index has."""
        return set(self._ids).intersection(ids)

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Puts new items behind the others.

        Raises:
          DataError: ids that are there already, vectors that cannot be used, a full disk; the index stays as it was.
        """
        with files.locked(self.folder):
            self._append(ids, vectors)

    def _append(self, ids: Sequence[str], vectors: Any) -> None:
        index.check_ids(ids, len(vectors), set(self._ids))
        everything = [*self._ids, *ids]
        parts = (part.astype("<f4").reshape(-1).view(np.uint8).data for part in blocks(vectors, self.width, ids))
        files.append(self.folder / _VECTORS, len(self._ids) * self.width * 4, parts)
        files.commit_json(self.folder / _IDS, {"ids": everything})
        index.write_info(self.folder, "exact", self.width, self.embedder, items=len(everything))
        self._ids = everything

    @property
    def vectors(self) -> np.ndarray:
        """[N, E] float32, mapped."""
        if not self._ids:
            return np.zeros((0, self.width), np.float32)
        return np.memmap(self.folder / _VECTORS, "<f4", "r", shape=(len(self._ids), self.width))

    def search(self, queries: Any, k: int) -> Hits:
        """The nearest items of each query.

        Products of blocks of items in float32 choose candidates, which are then compared in float64, so that equal
        vectors have equal scores wherever they lie.

        Args:
          queries: [Q, E] floating, normalised here.
          k: hits per query.

        Raises:
          DataError: queries that cannot be used, by row.
        """
        wanted = index.hits_wanted(k, len(self))
        rows = index.normalised(queries, self.width, "query")
        scores, places = np.zeros((len(rows), wanted), np.float32), np.zeros((len(rows), wanted), np.int64)
        for start in range(0, len(rows) if wanted else 0, _QUERIES):
            part = slice(start, start + _QUERIES)
            scores[part], places[part] = self._best(rows[part], wanted)
        return Hits(tuple(tuple(self._ids[at] for at in row) for row in places), scores)

    def _best(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """[Q, k] scores and places of the best items."""
        found = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in queries]
        vectors, step = self.vectors, max(1, _BLOCK // self.width)
        for start in range(0, len(vectors), step):
            block = np.asarray(vectors[start : start + step])
            rough = queries @ block.T
            for row, query in enumerate(queries):
                found[row] = _better(found[row], rough[row], block, query, start, k)
        return np.stack([scores for scores, _ in found]), np.stack([places for _, places in found])


def _better(
    best: tuple[np.ndarray, np.ndarray], rough: np.ndarray, block: np.ndarray, query: np.ndarray, start: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` so far and those of a block [B, E] with its rough scores [B]."""
    slack = len(query) * 2.0**-22  # more than float32 can be wrong in a product of unit vectors
    floor = best[0][-1] - slack if len(best[0]) == k else -np.inf
    chosen = np.flatnonzero(rough >= floor)
    if len(chosen) > 4 * k:
        floor = np.partition(rough[chosen], -k)[-k] - slack
        chosen = chosen[rough[chosen] >= floor]
    scores = np.sum(block[chosen].astype(np.float64) * query, axis=1).astype(np.float32)
    together = np.concatenate([best[0], scores]), np.concatenate([best[1], chosen + start])
    return index.ranked(*together, k)


def width_of(vectors: Any) -> int:
    """E of [N, E] vectors, an array or a list of rows."""
    shape = getattr(vectors, "shape", None)
    if shape is None and len(vectors):
        shape = (len(vectors), len(vectors[0]))
    if shape is None or len(shape) != 2 or shape[1] < 1:
        raise DataError(f"vectors have shape {shape}, expected [n, E]")
    return int(shape[1])


def blocks(vectors: Any, width: int, ids: Sequence[str]) -> Iterator[np.ndarray]:
    """Normalised vectors [B, E] float32, block by block, so that a mapped array is never in memory as a whole."""
    step = max(1, _BLOCK // width)
    for start in range(0, len(vectors), step):
        yield index.normalised(vectors[start : start + step], width, "vector", ids[start : start + step])
