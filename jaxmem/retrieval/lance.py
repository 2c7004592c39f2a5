"""The index in a LanceDB table, which was taken for what outgrows one machine because it runs inside the process, needs
no server, keeps vectors on the disk or in an object store, and takes additions without being written anew.

    index.json    width, embedder, probes
    items.lance   the table: id, position, vector [E] float32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files, index
from jaxmem.retrieval.exact import blocks, width_of
from jaxmem.retrieval.index import Hits

_TABLE, _MANY = "items", 100_000  # from so many items on the table gets lists
_ASKED = 500  # ids looked up at once


class LanceIndex:
    """See the module; made by `create` or `open`. Below 100,000 items every query is compared with all.

    Attributes:
      folder: where it lies.
      width: E.
      embedder: digest of what made the vectors.
      probes: lists that a query looks into once there are lists.
    """

    def __init__(self, folder: Path, width: int, embedder: str, probes: int, table: Any) -> None:
        self.folder, self.width, self.embedder, self.probes, self._table = folder, width, embedder, probes, table

    @classmethod
    def create(
        cls, folder: str | Path, ids: Sequence[str], vectors: Any, embedder: str, *, lists: int = 0, probes: int = 48
    ) -> LanceIndex:
        """See `index.create_index`.

        Args:
          folder, ids, vectors, embedder: as there.
          lists: centres of inverted lists; 0 makes 4 sqrt(N) of them from 100,000 items on and none below.
          probes: lists that a query looks into.
        """
        folder, width, pyarrow = Path(folder), width_of(vectors), _pyarrow()
        with files.locked(folder):
            index.refuse_existing(folder)
            vector = pyarrow.list_(pyarrow.float32(), width)
            fields = [("id", pyarrow.string()), ("position", pyarrow.int64()), ("vector", vector)]
            table = _connect(folder).create_table(_TABLE, schema=pyarrow.schema(fields), mode="overwrite")
            made = cls(folder, width, embedder, probes, table)
            made._append(ids, vectors)
            if lists or len(made) >= _MANY:
                made._group(lists or round(4 * len(made) ** 0.5))
            index.write_info(folder, "lance", width, embedder, probes=probes)
        return made

    @classmethod
    def open(cls, folder: str | Path) -> LanceIndex:
        """Opens a folder; DataError when there is no index of this kind or its table is gone."""
        folder = Path(folder)
        info = index.read_info(folder, "lance")
        try:
            table = _connect(folder).open_table(_TABLE)
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{folder}: the table of the index is missing or damaged; make the index again") from error
        return cls(folder, info["width"], info["embedder"], info["probes"], table)

    def __len__(self) -> int:
        """N."""
        return self._table.count_rows()

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Puts new items behind the others; lists, where there are any, take them in.

        Raises:
          DataError: ids that are there already, vectors that cannot be used.
        """
        with files.locked(self.folder):
            self._append(ids, vectors)
            if self._table.list_indices():
                self._table.optimize()

    def _append(self, ids: Sequence[str], vectors: Any) -> None:
        index.check_ids(ids, len(vectors), self.known(ids))
        pyarrow, start, done = _pyarrow(), len(self), 0
        rows: list[Any] = []
        for part in blocks(vectors, self.width, ids):
            names = list(ids[done : done + len(part)])
            vector = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part.reshape(-1)), self.width)
            places = pyarrow.array(np.arange(start + done, start + done + len(part)))
            rows.append(pyarrow.table({"id": names, "position": places, "vector": vector}, schema=self._table.schema))
            done += len(part)
        try:
            if rows:
                self._table.add(pyarrow.concat_tables(rows))
        except (RuntimeError, OSError) as error:
            raise DataError(f"cannot write {self.folder}: {error}; is there space on the disk?") from error

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the index has."""
        if not len(self):
            return set()
        return {name for part in _parts(ids) for name in self._named(part)}

    def _named(self, ids: Sequence[str]) -> list[str]:
        quoted = ", ".join("'" + str(name).replace("'", "''") + "'" for name in ids)
        found = self._table.search().where(f"id IN ({quoted})").select(["id"]).limit(len(ids)).to_arrow()
        return found["id"].to_pylist()

    def _group(self, lists: int) -> None:
        """Makes inverted lists, and a tree of the ids for `add`."""
        from lancedb.index import BTree, IvfFlat

        self._table.create_index("id", config=BTree())
        self._table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=lists))

    def search(self, queries: Any, k: int) -> Hits:
        """The nearest items of each query; with lists nearly, as an item in a list that is not looked into is missed.

        Args:
          queries: [Q, E] floating, normalised here.
          k: hits per query.

        Raises:
          DataError: queries that cannot be used, by row.
        """
        wanted = index.hits_wanted(k, len(self))
        rows = index.normalised(queries, self.width, "query")
        scores, names = np.zeros((len(rows), wanted), np.float32), []
        for row, query in enumerate(rows):
            found = self._nearest(query, wanted)
            values = 1 - found["_distance"].to_numpy()
            order = np.lexsort((found["position"].to_numpy(), -values))
            scores[row], ids = values[order], found["id"].to_pylist()
            names.append(tuple(ids[at] for at in order))
        return Hits(tuple(names), scores)

    def _nearest(self, query: np.ndarray, k: int) -> Any:
        """An arrow table of the nearest `k`."""
        if not k:
            return _pyarrow().table({"id": [], "position": np.zeros(0, np.int64), "_distance": np.zeros(0, np.float32)})
        columns = ["id", "position", "_distance"]
        asked = lambda: self._table.search(query).distance_type("dot").limit(k).select(columns)  # noqa: E731
        found = asked().nprobes(self.probes).to_arrow()
        return found if len(found) == k else asked().bypass_vector_index().to_arrow()


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _ASKED] for start in range(0, len(ids), _ASKED))


def _connect(folder: Path) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ConfigError("an index in LanceDB needs lancedb: pip install 'jaxmem[lance]'") from error
    return lancedb.connect(str(folder))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("an index in LanceDB needs lancedb: pip install 'jaxmem[lance]'") from error
    return pyarrow
