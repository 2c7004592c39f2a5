"""The index that looks only where a query's neighbours are likely: faiss's inverted lists.

    index.json          width, embedder, number of items, lists and probes
    ids.json            of the items in their order
    vectors_N.faiss     the lists of N items

Vectors are grouped around `lists` centres, and a query is compared with those of the `probes` nearest lists. Fewer
than 1,000 vectors are compared one by one. Inverted lists were taken rather than a graph (HNSW): they are made several
times faster, and many copies of one vector (a picture that several articles show) do not hide others, while a graph of
20,000 vectors with 200 copies of each found half of what there was. Vectors without any structure suit neither; look
at the recall against `jaxmem.retrieval.exact` and raise `probes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files, index
from jaxmem.retrieval.exact import blocks, width_of
from jaxmem.retrieval.index import Hits

FEW, PER_CENTRE = 1000, 64  # vectors that need no lists; vectors per centre that training looks at
_IDS = "ids.json"


class ApproximateIndex:
    """See the module; made by `create` or `open`.

    Attributes:
      folder: where it lies.
      width: E.
      embedder: digest of what made the vectors.
      probes: lists that a query looks into; more find more and take longer.
    """

    def __init__(self, folder: Path, width: int, embedder: str, ids: list[str], probes: int, lists: int) -> None:
        self.folder, self.width, self.embedder, self.probes = folder, width, embedder, probes
        self._ids, self._lists, self._index = ids, lists, None

    @classmethod
    def create(
        cls, folder: str | Path, ids: Sequence[str], vectors: Any, embedder: str, *, lists: int = 0, probes: int = 48
    ) -> ApproximateIndex:
        """See `index.create_index`.

        Args:
          folder, ids, vectors, embedder: as there.
          lists: centres; 0 takes 4 sqrt(N) and makes them anew when added items have made N four times as large.
          probes: lists that a query looks into.
        """
        folder = Path(folder)
        if lists < 0 or probes < 1:
            raise ConfigError(f"lists is {lists} and probes {probes}; lists is 0 or more, probes at least 1")
        with files.locked(folder):
            index.refuse_existing(folder)
            made = cls(folder, width_of(vectors), embedder, [], probes, lists)
            made._append(ids, vectors)
        return made

    @classmethod
    def open(cls, folder: str | Path) -> ApproximateIndex:
        """Reads an index into memory; DataError when there is none of this kind or it is damaged."""
        folder, faiss = Path(folder), _faiss()
        info = index.read_info(folder, "approximate")
        ids = files.read_json(folder / _IDS, "index")["ids"][: info["items"]]
        made = cls(folder, info["width"], info["embedder"], ids, info["probes"], info["lists"])
        try:
            made._index = faiss.read_index(str(made._file))
        except RuntimeError as error:
            raise DataError(f"{made._file}: missing, truncated or damaged; make the index again") from error
        if (made._index.d, made._index.ntotal, len(ids)) != (info["width"], info["items"], info["items"]):
            raise DataError(
                f"{made._file}: {made._index.ntotal} vectors of width {made._index.d} and {len(ids)} ids where "
                f"{info['items']} of width {info['width']} belong; make the index again"
            )
        return made

    @property
    def _file(self) -> Path:
        return self.folder / f"vectors_{len(self._ids)}.faiss"

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
        """Puts new items behind the others and writes the whole index.

        Raises:
          DataError: ids that are there already, vectors that cannot be used, a full disk; the files stay as they were.
        """
        with files.locked(self.folder):
            files.clear(self.folder, ("vectors_*.faiss",))
            self._append(ids, vectors)

    def _append(self, ids: Sequence[str], vectors: Any) -> None:
        index.check_ids(ids, len(vectors), set(self._ids))
        new = np.concatenate([np.zeros((0, self.width), np.float32), *blocks(vectors, self.width, ids)])
        before, everything = self._file, [*self._ids, *ids]
        lists = self._lists or _lists(len(everything))
        if self._index is None or lists >= 2 * _count(self._index):
            held = np.zeros((0, self.width), np.float32) if self._index is None else _vectors(self._index)
            grown = _trained(np.concatenate([held, new]) if len(held) else new, lists)
        else:
            grown = _faiss().clone_index(self._index)
            grown.add(new)
        self._write(grown, everything)
        self._index, self._ids = grown, everything
        if before != self._file:
            before.unlink(missing_ok=True)

    def _write(self, grown: Any, ids: list[str]) -> None:
        """The lists under a name of their own, then ids, then `index.json`, which names them."""
        path = self.folder / f"vectors_{len(ids)}.faiss"
        partial = path.with_name(path.name + files.PARTIAL)
        try:
            _faiss().write_index(grown, str(partial))
            files.settle(partial, path)
        except (RuntimeError, OSError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise DataError(f"cannot write {path}: {error}; is there space on the disk?") from error
        files.commit_json(self.folder / _IDS, {"ids": ids})
        more = {"items": len(ids), "lists": self._lists, "probes": self.probes}
        index.write_info(self.folder, "approximate", self.width, self.embedder, **more)

    def search(self, queries: Any, k: int) -> Hits:
        """The nearest items of each query, or nearly: an item in a list that is not looked into is missed.

        A query whose lists hold fewer than `k` items looks into more of them.

        Args:
          queries: [Q, E] floating, normalised here.
          k: hits per query.

        Raises:
          DataError: queries that cannot be used, by row.
        """
        wanted = index.hits_wanted(k, len(self))
        rows = index.normalised(queries, self.width, "query")
        scores, places = np.zeros((len(rows), wanted), np.float32), np.full((len(rows), wanted), -1, np.int64)
        probes, lists = self.probes, _count(self._index)
        todo = np.arange(len(rows) if wanted else 0)
        while len(todo):
            scores[todo], places[todo] = _probe(self._index, rows[todo], wanted, min(probes, lists))
            todo = todo[(places[todo] < 0).any(1)]
            probes *= 4
        for row in range(len(rows)):
            scores[row], places[row] = index.ranked(scores[row], places[row], wanted)
        return Hits(tuple(tuple(self._ids[at] for at in row) for row in places), scores)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("an approximate index needs faiss: pip install 'jaxmem[retrieval]'") from error
    return faiss


def _lists(count: int) -> int:
    """Centres for so many vectors; 1 where they are compared one by one."""
    return 1 if count < FEW else round(4 * count**0.5)


def _count(lists: Any) -> int:
    """Lists of a faiss index."""
    return getattr(lists, "nlist", 1)


def _trained(vectors: np.ndarray, lists: int) -> Any:
    """A faiss index of [N, E] normalised vectors."""
    faiss = _faiss()
    flat = faiss.IndexFlatIP(vectors.shape[1])
    if len(vectors) < FEW or lists == 1:
        flat.add(vectors)
        return flat
    made = faiss.IndexIVFFlat(flat, vectors.shape[1], min(lists, len(vectors)), faiss.METRIC_INNER_PRODUCT)
    made.cp.spherical, made.cp.max_points_per_centroid, made.cp.min_points_per_centroid = True, PER_CENTRE, 1
    made.train(vectors)
    made.add(vectors)
    return made


def _vectors(lists: Any) -> np.ndarray:
    """[N, E] vectors of a faiss index in their order."""
    if hasattr(lists, "make_direct_map"):
        lists.make_direct_map()
    return lists.reconstruct_n(0, lists.ntotal)


def _probe(lists: Any, queries: np.ndarray, k: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, k] scores and places, -1 where the lists hold too few."""
    if not hasattr(lists, "nlist"):
        return lists.search(queries, k)
    return lists.search(queries, k, params=_faiss().SearchParametersIVF(nprobe=probes))
