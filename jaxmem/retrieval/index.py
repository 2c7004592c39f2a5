"""What finds the items nearest to a question: the interface of all indexes, and what they share.

Nearness is the cosine: vectors are normalised on the way in and compared by their inner product. Axis letters:
N items, Q queries, E width of the vectors, K hits.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmem import config as configs
from jaxmem.data.items import Item, some
from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files

FORMAT, INFO = 1, "index.json"
KINDS: Mapping[str, str] = {
    "exact": "jaxmem.retrieval.exact:ExactIndex",
    "approximate": "jaxmem.retrieval.approximate:ApproximateIndex",
    "lance": "jaxmem.retrieval.lance:LanceIndex",
}


class Embedder(Protocol):
    """What makes vectors of items and of questions."""

    @property
    def digest(self) -> str:
        """Of everything that the vectors depend on."""
        ...

    @property
    def width(self) -> int:
        """E."""
        ...

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        """[n, E] float32 from the images or the texts of items or questions; DataError names one it cannot read."""
        ...


@dataclasses.dataclass(frozen=True)
class Hits:
    """What a search found, the best first; equal scores in the order in which the items were put in.

    Attributes:
      ids: K' of every query, K' the smaller of the K asked for and N.
      scores: [Q, K'] float32, cosines.
    """

    ids: tuple[tuple[str, ...], ...]
    scores: np.ndarray


@runtime_checkable
class Index(Protocol):
    """Vectors of items in a folder.

    Attributes:
      width: E.
      embedder: digest of what made the vectors.
    """

    width: int
    embedder: str

    def __len__(self) -> int:
        """N."""
        ...

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the index has."""
        ...

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Puts [n, E] vectors of new items behind the others."""
        ...

    def search(self, queries: Any, k: int) -> Hits:
        """The `k` items nearest to each of [Q, E] queries, fewer where there are fewer; no query is dropped."""
        ...


def open_index(folder: str | Path, embedder: Embedder | None = None) -> Index:
    """Opens an index of whatever kind.

    Args:
      folder: of the index.
      embedder: refuse the index unless this made its vectors; None accepts any.

    Raises:
      DataError: no index, a damaged one, or one of another embedder or width.
    """
    info = read_info(Path(folder))
    if embedder is not None:
        check_embedder(Path(folder), info, embedder)
    return _class(info["kind"]).open(folder)


def create_index(
    kind: str, folder: str | Path, ids: Sequence[str], vectors: Any, embedder: str, **settings: Any
) -> Index:
    """Makes an index of the kind "exact", "approximate" or "lance"; see the classes for their settings.

    Args:
      kind: of the index.
      folder: must not hold an index.
      ids: of the items, each once.
      vectors: [N, E] floating, finite and not zero.
      embedder: digest of what made them.
      **settings: of the kind.

    Raises:
      ConfigError: an unknown kind, or a package that is not installed.
      DataError: vectors or ids that cannot be used, or a folder that holds an index already.
    """
    return _class(kind).create(folder, ids, vectors, embedder, **settings)


def _class(kind: str) -> Any:
    module, name = configs.choose(KINDS, kind, "kind of index").split(":")
    return getattr(importlib.import_module(module), name)


def write_info(folder: Path, kind: str, width: int, embedder: str, **more: Any) -> None:
    """Writes `index.json`, which is what makes an index complete."""
    content = {"format": FORMAT, "kind": kind, "width": width, "embedder": embedder, **more}
    files.commit_json(folder / INFO, content)


def read_info(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """What `index.json` says; DataError when it is missing, damaged, of a later format or of another kind."""
    info = files.read_json(folder / INFO, "index")
    if info.get("format") != FORMAT:
        raise DataError(f"{folder}: an index of format {info.get('format')!r}, this version reads {FORMAT}")
    if info.get("kind") not in KINDS or not {"width", "embedder"} <= info.keys():
        raise DataError(f"{folder / INFO}: kind, width or embedder is missing; this index is damaged")
    if kind is not None and info["kind"] != kind:
        raise DataError(f"{folder}: an index of the kind {info['kind']}, not {kind}; open_index opens any kind")
    return info


def refuse_existing(folder: Path) -> None:
    """Raises DataError when there is an index in the folder."""
    if (folder / INFO).exists():
        raise DataError(f"{folder}: holds an index already; add to it, or name another folder")


def check_embedder(folder: Path, info: Mapping[str, Any], embedder: Embedder) -> None:
    """Raises DataError when an index was not made by this embedder."""
    if info["embedder"] != embedder.digest:
        raise DataError(
            f"index {folder} was made by embedder {info['embedder'][:16]}, this one is {embedder.digest[:16]}; make "
            "another index, or load the embedder that made it"
        )
    if info["width"] != embedder.width:
        raise DataError(f"index {folder} holds vectors of width {info['width']}, this embedder's have {embedder.width}")


def normalised(vectors: Any, width: int | None, what: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Vectors of length 1: [n, E] floating -> [n, E] float32.

    Args:
      vectors: array or list of rows.
      width: E that they must have; None takes any.
      what: how errors call a row.
      names: of the rows, for errors.

    Raises:
      DataError: names the rows of another width, with NaN or infinity, or of length 0.
    """
    called = lambda row: f"{what} {row}" + ("" if names is None else f" ({names[row]!r})")  # noqa: E731
    if not hasattr(vectors, "shape"):
        vectors = [np.asarray(row) for row in vectors]
        width = width if width is not None or not vectors else len(vectors[0])
        _refuse([f"{called(i)} has shape {v.shape}" for i, v in enumerate(vectors) if v.shape != (width,)], width)
        vectors = np.stack(vectors) if vectors else np.zeros((0, width or 0), np.float32)
    if vectors.ndim != 2:
        raise DataError(f"{what} rows have shape {vectors.shape} together, expected [n, {width or 'E'}]")
    wrong = width is not None and vectors.shape[1] != width
    _refuse([f"{called(row)} has shape {vectors.shape[1:]}" for row in range(len(vectors)) if wrong], width)
    values = np.asarray(vectors, np.float64)
    finite = np.isfinite(values).all(1)
    _refuse([f"{called(row)} holds NaN or infinity" for row in np.flatnonzero(~finite)], None)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    _refuse([f"{called(row)} has length 0" for row in np.flatnonzero(lengths[:, 0] == 0)], None)
    return (values / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _refuse(faults: Sequence[str], width: int | None) -> None:
    if faults:
        wanted = "" if width is None else f"; the index has width {width}"
        raise DataError(some(faults) + wanted)


def check_ids(ids: Sequence[str], count: int, known: Any = ()) -> None:
    """Raises DataError unless there is one new id for each of `count` vectors."""
    if len(ids) != count:
        raise DataError(f"{len(ids)} ids for {count} vectors; give one for each")
    if wrong := [repr(name) for name in ids if not isinstance(name, str) or not name]:
        raise DataError(f"an id is a text, got {some(wrong)}")
    seen: set[str] = set()
    if doubled := [repr(name) for name in ids if name in known or name in seen or seen.add(name)]:
        raise DataError(f"items that are in the index already or twice among the new ones: {some(doubled)}")


def hits_wanted(k: int, count: int) -> int:
    """K' for K; ConfigError unless it is at least 1."""
    if k < 1:
        raise ConfigError(f"k is {k}; ask for one item at least")
    return min(k, count)


def ranked(scores: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of one query's candidates: [C] scores and places of the items -> [k] of both, ties by place."""
    order = np.lexsort((positions, -scores))[:k]
    return scores[order], positions[order]
