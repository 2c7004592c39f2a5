"""The items of every question, found once and written down with digests of what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.data.items import Item, ItemFile, digest
from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.lookup import queries
from jaxmem.retrieval import files, find
from jaxmem.retrieval.index import Embedder, Hits, open_index
from jaxmem.training.synthesis.choosing import Asked
from jaxmem.training.synthesis.journal import Journal, encoded
from jaxmem.training.synthesis.settings import RetrievalConfig

QUESTIONS = "questions.jsonl"


def found(
    folder: Path, config: RetrievalConfig, asked: Sequence[Asked], embedder: Callable[[], Embedder]
) -> dict[str, dict[str, Any]]:
    """What `questions.jsonl` says of every question, by its key; made when it is not there.

    A line is {"key", "source", "digest", "items": [{"id", "digest"}] best first, "lost": [{"id", "reason"}]}. A lost
    item has no image, or one that cannot be read; its question stays.

    Raises:
      DataError: a question's image that cannot be read, an item that the file does not have, an index of another
        embedder, or a file about other questions.
    """
    path = folder / QUESTIONS
    if not path.exists():
        files.commit(path, [encoded(_rows(config, asked, embedder()))])
    rows = {row["key"]: row for row in Journal(path, ("key",)).rows.values()}
    if list(rows) != [one.key for one in asked]:
        raise DataError(f"{path} is about other questions; remove it, and they are looked up again")
    return rows


def _rows(config: RetrievalConfig, asked: Sequence[Asked], embedder: Embedder) -> list[dict[str, Any]]:
    index, items = open_index(config.index, embedder), ItemFile(config.items)
    hits = index.search(queries([one.question for one in asked], embedder), config.k)
    return [
        {"key": one.key, "source": one.source, "digest": one.digest, **_items(hits, row, items)}
        for row, one in enumerate(asked)
    ]


def _items(hits: Hits, row: int, items: ItemFile) -> dict[str, Any]:
    """The items of one question: those that can be shown, and those that cannot."""
    kept, lost = [], []
    for one in find.fetch(Hits(hits.ids[row : row + 1], hits.scores[row : row + 1]), items)[0]:
        reason = "; ".join(one.faults) or ("" if one.item.images else "it has no image")
        if reason:
            lost.append({"id": one.item.id, "reason": reason})
        else:
            kept.append({"id": one.item.id, "digest": digest(one.item)})
    return {"items": kept, "lost": lost}


def items_of(row: Mapping[str, Any], items: ItemFile) -> list[Item]:
    """The items of a line, best first; DataError for one that changed since it was found."""
    named = items.find([one["id"] for one in row["items"]])
    for item, entry in zip(named, row["items"], strict=True):
        if digest(item) != entry["digest"]:
            raise DataError(f"{items.path}: item {item.id!r} or its image changed since it was found; restore it")
    return named


def check(one: Asked, row: Mapping[str, Any]) -> None:
    """Raises DataError for a question that changed since its items were found."""
    if one.digest != row["digest"]:
        raise DataError(f"question {one.key} or its image changed since its items were found; restore it")
