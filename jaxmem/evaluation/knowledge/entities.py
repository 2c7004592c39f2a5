"""From an answer's words to a Wikipedia entity, as OVEN's generative models are scored: Okapi BM25 over the titles.

Our own index in numpy: the score of a title needs the postings of the query's words alone, so that six million titles
take milliseconds, and equal scores have one order. Formula and constants are those of the package rank-bm25, which
OVEN's script uses; its words come from BERT's tokenizer, which `words` can be given.
"""

from __future__ import annotations

import collections
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxmem.errors import DataError

K1, B, FLOOR = 1.5, 0.75, 0.25
LONGEST = 50
_WORD = re.compile(r"\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Lower case without accents; runs of letters and digits, and every other mark, are words."""
    plain = unicodedata.normalize("NFD", text.lower())
    return _WORD.findall("".join(mark for mark in plain if unicodedata.category(mark) != "Mn"))


class Entities:
    """Titles that can be searched.

    Args:
      titles: (entity id, title); the same entity may have several titles.
      words: makes words of a title or a query.

    Raises:
      DataError: no title, or none with a word.
    """

    def __init__(self, titles: Iterable[tuple[str, str]], words: Callable[[str], Sequence[str]] = split_words) -> None:
        ordered = sorted(titles, key=lambda pair: (pair[1], pair[0]))
        if not ordered:
            raise DataError("there are no titles of entities to search")
        self._words, self.ids, self.titles = words, [pair[0] for pair in ordered], [pair[1] for pair in ordered]
        postings: dict[str, list[int]] = collections.defaultdict(list)
        counts: dict[str, list[int]] = collections.defaultdict(list)
        lengths = np.zeros(len(ordered), np.int32)
        for row, title in enumerate(self.titles):
            found = collections.Counter(words(title))
            lengths[row] = found.total()
            for word, count in found.items():
                postings[word].append(row)
                counts[word].append(count)
        if not postings:
            raise DataError(f"none of {len(ordered)} titles of entities has a word")
        self._postings = {word: np.asarray(rows, np.int32) for word, rows in postings.items()}
        self._counts = {word: np.asarray(some, np.int32) for word, some in counts.items()}
        self._damping = K1 * (1 - B + B * lengths / lengths.mean())
        self._weights = _weights({word: len(rows) for word, rows in postings.items()}, len(ordered))

    def __len__(self) -> int:
        """How many titles."""
        return len(self.ids)

    def search(self, query: str, k: int = 5) -> list[tuple[str, str, float]]:
        """The k best titles that share a word with the query, as (entity id, title, score), best first.

        Equal scores are in the order of the titles, then of the ids. Repeated words of the query count repeatedly.
        """
        known = [word for word in self._words(query) if word in self._postings]
        if not known:
            return []
        rows = np.concatenate([self._postings[word] for word in known])
        parts = np.concatenate([self._part(word) for word in known])
        places, inverse = np.unique(rows, return_inverse=True)
        scores = np.bincount(inverse, weights=parts)
        best = np.lexsort((places, -scores))[:k]
        return [(self.ids[places[at]], self.titles[places[at]], float(scores[at])) for at in best]

    def entity(self, prediction: str, normalise: Callable[[str], str]) -> str | None:
        """The best title's entity for an answer's first 50 characters once normalised; None without a known word."""
        found = self.search(normalise(prediction)[:LONGEST], 1)
        return found[0][0] if found else None

    def _part(self, word: str) -> np.ndarray:
        """What a word adds to the titles that have it, in the order of its postings."""
        counts = self._counts[word]
        return self._weights[word] * counts * (K1 + 1) / (counts + self._damping[self._postings[word]])


def _weights(frequencies: dict[str, int], titles: int) -> dict[str, float]:
    """Inverse document frequencies; those below 0, of words in over half of the titles, are a share of the mean."""
    raw = {word: math.log(titles - count + 0.5) - math.log(count + 0.5) for word, count in frequencies.items()}
    floor = FLOOR * math.fsum(raw.values()) / len(raw)
    return {word: weight if weight >= 0 else floor for word, weight in raw.items()}
