"""Which items belong to which question: one search of an index for all questions, image to image."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmem.data.items import Item, some
from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.questions import Question
from jaxmem.retrieval import find
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.index import Embedder, Hits, Index, open_index, read_info


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """The items of a set of questions.

    Attributes:
      questions: all of them.
      folder: of the index.
      embedder: made the index, and makes vectors of questions.
      bank: must hold what is found; None does not look.
      k: items per question; all where the index has fewer.

    Raises:
      DataError: an index of another embedder.
    """

    questions: tuple[Question, ...]
    folder: Path
    embedder: Embedder
    bank: Bank | None
    k: int

    @functools.cached_property
    def index(self) -> Index:
        """The index, opened."""
        return open_index(self.folder, self.embedder)

    @functools.cached_property
    def hits(self) -> Hits:
        """What a search gave, a row for each question; made once.

        Raises:
          DataError: a question whose image cannot be read, or items of the index that the bank lacks, by name.
        """
        return find.search(self.index, self.bank, queries(self.questions, self.embedder), self.k)

    @functools.cached_property
    def ids(self) -> Mapping[str, tuple[str, ...]]:
        """Ids of the items of each question by its id, best first."""
        return {question.id: found for question, found in zip(self.questions, self.hits.ids, strict=True)}

    @property
    def record(self) -> str:
        """What the index is, for result files."""
        kind = read_info(self.folder)["kind"]
        return f"{kind}, {len(self.index)} items, embedder {self.embedder.digest[:16]}"


def queries(questions: Sequence[Question], embedder: Embedder) -> np.ndarray:
    """[Q, E] float32 vectors of questions: of their images, of the words where there is none.

    Raises:
      DataError: questions without an image and an embedder that cannot read texts, or an image that cannot be read.
    """
    seen = [at for at, question in enumerate(questions) if question.images]
    read = [at for at, question in enumerate(questions) if not question.images]
    vectors = np.zeros((len(questions), embedder.width), np.float32)
    if seen:
        vectors[seen] = embedder.embed([Item(questions[at].id, "", questions[at].images) for at in seen])
    if read:
        texts = getattr(embedder, "texts", None)
        if texts is None:
            names = some([repr(questions[at].id) for at in read])
            raise DataError(f"no image to look items up by, and the embedder cannot read texts: questions {names}")
        vectors[read] = texts([questions[at].text for at in read])
    return vectors


def bank_digest(bank: Bank) -> str:
    """Tells one bank from another: its layout, and the ids and checksums of all its shards."""
    content = [dataclasses.asdict(bank.layout), *([shard.ids, shard.sha256] for shard in bank.shards)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
