"""From questions to the items that may answer them, in rank order: what is missing is named and moves nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmem.data.images import ImageError, load_image
from jaxmem.data.items import Item, ItemFile, some
from jaxmem.errors import DataError
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.index import Embedder, Hits, Index


@dataclasses.dataclass(frozen=True)
class Found:
    """An item that a search found.

    Attributes:
      rank: from 1.
      score: cosine with the question.
      item: the item itself.
      images: its images, RGB; None for one that could not be read.
      faults: what is wrong with these.
    """

    rank: int
    score: float
    item: Item
    images: tuple[Any, ...]
    faults: tuple[str, ...]


def search(index: Index, bank: Bank | None, queries: Any, k: int, embedder: Embedder | None = None) -> Hits:
    """The items nearest to every question.

    Args:
      index: of vectors of items.
      bank: must hold what is found; None does not look.
      queries: [Q, E] vectors, or questions as items for the embedder.
      k: items per question; where there are fewer, all of them.
      embedder: makes vectors of questions.

    Raises:
      DataError: a query that cannot be used, a question without the image or text that the embedder reads, or items
        of the index that are not in the bank, each by name.
    """
    hits = index.search(queries if embedder is None else embedder.embed(queries), k)
    if bank is not None:
        found = dict.fromkeys(name for row in hits.ids for name in row)
        if absent := [repr(name) for name in found if name not in bank]:
            raise DataError(
                f"the index has items that bank {bank.folder} lacks: {some(absent)}; add them to the bank (jaxmem bank "
                "add), or make the index from the bank's items"
            )
    return hits


def fetch(hits: Hits, items: ItemFile, images: bool = True) -> list[list[Found]]:
    """The items of a search with their texts and images, for every question in rank order.

    An image that cannot be read is named beside its item, which keeps its rank.

    Args:
      hits: of the search.
      items: where they come from.
      images: read these too.

    Raises:
      DataError: an item that the file does not have, or whose line cannot be used.
    """
    return [
        [
            _found(rank, name, float(score), items, images)
            for rank, (name, score) in enumerate(zip(ids, scores, strict=True), 1)
        ]
        for ids, scores in zip(hits.ids, hits.scores, strict=True)
    ]


def _found(rank: int, name: str, score: float, items: ItemFile, images: bool) -> Found:
    (item,) = items.find([name])
    read, faults = [], []
    for at, source in enumerate(item.images if images else (), 1):
        try:
            read.append(load_image(source, f"item {name!r}, image {at}"))
        except ImageError as error:
            read.append(None)
            faults.append(str(error))
    return Found(rank, score, item, tuple(read), tuple(faults))
