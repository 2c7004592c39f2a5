"""Reward for questions that are answered with yes or no."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case

_WORDS = {"yes": True, "true": True, "no": False, "false": False}
_WORD = re.compile(r"\b(yes|true|no|false)\b")
_LEADING = re.compile(r"(yes|true|no|false)(?=\s?(?:$|[.,:;!]))")
_REFERENCES = _WORDS | {"1": True, "0": False}


@dataclasses.dataclass(frozen=True)
class YesNo(BuiltIn):
    """1 when the completion says yes and yes is right, or no and no is right, else 0.

    Read is the last marked answer (see `text.explicit_answer`) or everything after the thinking. A yes or no that
    opens it and is followed by punctuation decides; otherwise only one of the two may occur. An answer with both, or
    with neither, gets 0: not committing must not pay.

    Attributes:
      column: yes, no, true, false, 1 or 0, as text, number or truth value; anything else does not apply.
    """

    column: str = "answer"

    def score(self, text: str, *values: Any) -> float | None:
        """Equality of the two."""
        right = _REFERENCES.get(texts.normalise(str(values[0])))
        return None if right is None else float(read_yes(text) is right)

    def cases(self) -> tuple[Case, ...]:
        """Both answers, the hack of saying both, and a reference that is neither."""
        row = {self.column: "yes"}
        return (
            Case("Yes, it is.", row, 1.0),
            Case("<answer>No</answer>", row, 0.0),
            Case("yes or no", row, 0.0),
            Case("yes", {self.column: "perhaps"}, None),
        )


def read_yes(text: str) -> bool | None:
    """What a completion says; None when it says both or neither."""
    answer = texts.normalise(texts.final_answer(text))
    if leading := _LEADING.match(answer):
        return _WORDS[leading[1]]
    said = {_WORDS[word] for word in _WORD.findall(answer)}
    return said.pop() if len(said) == 1 else None
