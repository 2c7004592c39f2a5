"""Rewards for completions with a <think> and an <answer> block, as in PVM's second stage (arXiv 2605.00814)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from jaxmem.training.rewards import mathematics
from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case


@dataclasses.dataclass(frozen=True)
class ThinkFormat(BuiltIn):
    """1 when the completion is one think block and one answer block and nothing else (`text.well_formed`), else 0."""

    judges: ClassVar[str] = "form"

    @property
    def columns(self) -> tuple[str, ...]:
        """None: the form needs no reference."""
        return ()

    def score(self, text: str, *values: Any) -> float | None:
        """The form alone."""
        return float(texts.well_formed(text))

    def cases(self) -> tuple[Case, ...]:
        """The right form, and words in front of it."""
        right = "<think>a</think>\n<answer>b</answer>\n"
        return Case(right, {}, 1.0), Case(f"So {right}", {}, 0.0), Case("<think>a</think>", {}, 0.0)


@dataclasses.dataclass(frozen=True)
class PVM(BuiltIn):
    """0.9 for the right answer plus 0.1 for the form: totals 0, 0.1, 0.9 and 1.

    The answer is what stands in the first answer block; it counts whether or not the form is right.

    Attributes:
      column: the reference.
      grader: "math" compares as text and as mathematics (extra `math`); "text" compares as text only.
      accuracy, form: the two shares.
    """

    column: str = "answer"
    grader: Literal["math", "text"] = "math"
    accuracy: float = 0.9
    form: float = 0.1
    judges: ClassVar[str] = "both"

    @property
    def in_process(self) -> bool:
        """Comparing text cannot hang; mathematics can."""
        return self.grader == "text"

    def prepare(self) -> None:
        """Imports math-verify where the grader is "math"; raises ConfigError when it is missing."""
        if self.grader == "math":
            mathematics.Math().prepare()

    def score(self, text: str, *values: Any) -> float | None:
        """The weighted sum; a reference of None does not apply."""
        if values[0] is None:
            return None
        answer = texts.first_answer_block(text)
        right = answer is not None and self._equal(str(values[0]), answer)
        return self.accuracy * right + self.form * texts.well_formed(text)

    def _equal(self, reference: str, answer: str) -> bool:
        if self.grader == "math":
            return mathematics.equal(reference, answer)
        return texts.normalise(reference) == texts.normalise(answer)

    def cases(self) -> tuple[Case, ...]:
        """The four totals."""
        row = {self.column: "4"}
        return (
            Case("<think>2+2</think> <answer>4</answer>", row, self.accuracy + self.form),
            Case("2+2 <answer>4</answer>", row, self.accuracy),
            Case("<think>2+2</think><answer>5</answer>", row, self.form),
            Case("4", row, 0.0),
        )
