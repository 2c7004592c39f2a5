"""Rewards that compare the letters of two texts: whole, contained, or by their edit distance."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case


@dataclasses.dataclass(frozen=True)
class ExactText(BuiltIn):
    """1 when the whole completion is the reference, but for case and white space, else 0 (VisMem's metric `exact`).

    No answer is looked for in the completion; `answers.Exact` does that.

    Attributes:
      column: the reference; a list holds several that are right. None gets 0.
    """

    column: str = "answer"

    def score(self, text: str, *values: Any) -> float | None:
        """Equality after lower case and single spaces."""
        return float(folded(text) in map(folded, references(values[0])))

    def cases(self) -> tuple[Case, ...]:
        """Case and spacing do not matter, punctuation does."""
        row = {self.column: "Red fox"}
        return Case(" red \n FOX", row, 1.0), Case("red fox.", row, 0.0), Case("red fox", {self.column: None}, 0.0)


@dataclasses.dataclass(frozen=True)
class Substring(BuiltIn):
    """1 when the reference occurs in the completion, but for case, else 0 (VisMem's metric `substr`).

    A weak judge, kept to compare with published code: a reference of one letter is in nearly every text, an empty one
    in all, and a completion that lists every answer gets 1.

    Attributes:
      column: the reference; a list holds several that are right. None gets 0.
    """

    column: str = "answer"

    def score(self, text: str, *values: Any) -> float | None:
        """Containment in lower case; white space counts."""
        return float(any(reference.lower() in text.lower() for reference in references(values[0])))

    def cases(self) -> tuple[Case, ...]:
        """Case does not matter, white space does."""
        row = {self.column: "Red fox"}
        return Case("a red FOX.", row, 1.0), Case("red  fox", row, 0.0), Case("red fox", {self.column: None}, 0.0)


@dataclasses.dataclass(frozen=True)
class ANLS(BuiltIn):
    """Average normalised Levenshtein similarity of the final answer to the closest reference (arXiv 1905.13648).

    1 - distance / length of the longer text where that quotient is below the threshold, else 0; lower case and single
    spaces. The answer is the last marked one (see `text.explicit_answer`) or everything after the thinking.

    Attributes:
      column: the reference; a list holds several that are right. None, an empty list or empty text: does not apply.
      threshold: from this normalised distance on a wrong answer gets nothing.
    """

    column: str = "answer"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Checks the threshold; raises ValueError."""
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is a normalised distance, above 0 and up to 1")

    def score(self, text: str, *values: Any) -> float | None:
        """The largest similarity."""
        known = [reference for reference in map(folded, references(values[0])) if reference]
        answer = folded(texts.final_answer(text))
        return max((self._similarity(answer, reference) for reference in known), default=None)

    def _similarity(self, answer: str, reference: str) -> float:
        longest = max(len(answer), len(reference))
        if abs(len(answer) - len(reference)) >= self.threshold * longest:  # the distance is at least that
            return 0.0
        share = distance(answer, reference) / longest
        return 1 - share if share < self.threshold else 0.0

    def cases(self) -> tuple[Case, ...]:
        """The same text, one with another length, and nothing to compare with."""
        row = {self.column: "Red fox"}
        return Case("<answer>red fox</answer>", row, 1.0), Case("", row, 0.0), Case("x", {self.column: None}, None)


def references(value: Any) -> list[str]:
    """The right answers of a column's value: none of None, several of a list."""
    given = value if isinstance(value, list | tuple) else [value]
    return [str(reference) for reference in given if reference is not None]


def folded(text: str) -> str:
    """Lower case, one space between words, none around."""
    return " ".join(text.lower().split())


def distance(one: str, other: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of a letter that make one text the other."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for at, wanted in enumerate(other):
            line.append(min(above[at + 1] + 1, line[at] + 1, above[at] + (letter != wanted)))
        above = line
    return above[-1]
