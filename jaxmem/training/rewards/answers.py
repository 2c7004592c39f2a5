"""Rewards for words and for option letters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case

_ALONE = r"(?=$|[.:)])"
"""What follows a letter on its own line, as in "B. Paris"."""


@dataclasses.dataclass(frozen=True)
class Exact(BuiltIn):
    """1 when the final answer equals the reference, else 0.

    Compared is the last marked answer (see `text.explicit_answer`) or, without one, everything after the thinking;
    case, spacing, quotes, Markdown and closing punctuation do not matter.

    Attributes:
      column: the reference; a list holds several that are right. None or an empty list: does not apply.
    """

    column: str = "answer"

    def score(self, text: str, *values: Any) -> float | None:
        """Equality with any of the references."""
        given = values[0] if isinstance(values[0], list | tuple) else [values[0]]
        references = {texts.normalise(str(reference)) for reference in given if reference is not None}
        return float(texts.normalise(texts.final_answer(text)) in references) if references else None

    def cases(self) -> tuple[Case, ...]:
        """Equality, a marked answer, and an answer that only contains the reference."""
        row = {self.column: "Red fox"}
        return Case("red  fox.", row, 1.0), Case(r"It is \boxed{red fox}", row, 1.0), Case("red fox or cat", row, 0.0)


@dataclasses.dataclass(frozen=True)
class Choice(BuiltIn):
    r"""1 when the chosen option is the right one, else 0.

    The choice is the last marked answer (\boxed{B}, <answer>B</answer>, "the answer is (B)"), else a letter alone on
    its line, else the one option whose text occurs. An answer that names several options, or none, gets 0 and not
    "does not apply": otherwise not committing would cost nothing.

    Attributes:
      column: the right letter, or the right option's text. One that is neither does not apply.
      options: a column with the list of the options' texts; without it only letters are read.
      letters: names of the options in order.
    """

    column: str = "answer"
    options: str | None = None
    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        """Checks the letters; raises ValueError."""
        if len(self.letters) < 2 or len({*self.letters}) < len(self.letters) or not self.letters.isupper():
            raise ValueError(f"letters is {self.letters!r}; give two or more different capital letters")

    @property
    def columns(self) -> tuple[str, ...]:
        """The reference, and the options where there are any."""
        return (self.column,) if self.options is None else (self.column, self.options)

    def score(self, text: str, *values: Any) -> float | None:
        """Equality of the letters."""
        options = tuple(str(option) for option in values[1]) if len(values) > 1 else ()
        right = read_choice(str(values[0]), options, self.letters)
        return None if right is None else float(read_choice(text, options, self.letters) == right)

    def cases(self) -> tuple[Case, ...]:
        """A marked letter, a lone letter, and the hack of naming every option."""
        first, second = self.letters[:2]
        row = dict.fromkeys(self.columns, ["red", "green"]) | {self.column: second}
        listing = f"{first}\n{second}"
        return (
            Case(f"Not {first}, so the answer is ({second}).", row, 1.0),
            Case(f"<answer>{first}</answer>", row, 0.0),
            Case(second, row, 1.0),
            Case(listing, row, 0.0),
        )


def read_choice(text: str, options: Sequence[str] = (), letters: str = "ABCDEFGHIJ") -> str | None:
    """The letter that a text chooses; None when it chooses several or none."""
    letters = letters[: len(options)] if options else letters
    rest = texts.after_thinking(text)
    marked = texts.explicit_answer(rest)
    if marked is not None:
        return _only(_leading_letters(marked, letters) or _named_options(marked, options, letters))
    alone = set().union(*(_leading_letters(line, letters, _ALONE) for line in rest.splitlines()))
    return _only(alone or _named_options(rest, options, letters))


def _only(found: set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def _leading_letters(answer: str, letters: str, end: str = r"(?=$|[.,:;)\s])") -> set[str]:
    """The letters that an answer begins with: "B", "(b)", "B. text", "B and C"; nothing for "A fox".

    `end` is what must follow them.
    """
    answer = re.sub(r"^(?i:option|choice)\s+", "", texts.plain(answer))
    one = rf"[(\[]?[{re.escape(letters)}][)\]]?"
    found = re.match(rf"{one}(?:(?:\s?[,/&]\s?|\s(?:or|and)\s)+{one})*{end}", answer)
    if found is None:  # a small letter counts when it stands alone
        alone = answer.strip("()[]. ").upper()
        return {alone} if len(alone) == 1 and alone in letters else set()
    bare, rest = found.group() in ("A", "I"), answer[found.end() :]
    if bare and re.match(r"\s+(?!(?:because|since|as|is|for|given)\b)\w", rest):
        return set()  # an article or a pronoun
    return {letter for letter in re.sub(r"\b(?:or|and)\b", "", found.group()) if letter in letters}


def _named_options(text: str, options: Sequence[str], letters: str) -> set[str]:
    """Letters of the options whose text occurs as whole words; a part of a longer one that occurs does not count."""
    rest, found = texts.normalise(text), set()
    names = [(texts.normalise(option), letter) for option, letter in zip(options, letters, strict=False)]
    for name, letter in sorted(names, key=lambda pair: -len(pair[0])):
        pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
        if name and re.search(pattern, rest):
            found.add(letter)
            rest = re.sub(pattern, "\n", rest)
    return found
