r"""Where the final answer stands in a reply. Everything here takes time linear in the text."""

from __future__ import annotations

import dataclasses
import re

from jaxmem.data.replies import after_thinking, last_boxed
from jaxmem.evaluation.knowledge.languages import LANGUAGES

_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")
_EMPHASIS = re.compile(r"\*\*|`")
_MATHS = re.compile(r"\$+([^$]*)\$+")
_LABELS = sorted(
    {label for words in LANGUAGES.values() for label in (words.final, *words.answer)}, key=len, reverse=True
)
_LABEL = re.compile(rf"(?:{'|'.join(map(re.escape, _LABELS))})[ \t]*[:：][ \t]*([^\n]*)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """A final answer and where it was found: "boxed", "label" ("Final answer: ...") or "whole"."""

    text: str
    how: str


def final_answer(reply: str) -> Extracted:
    r"""The last \boxed{...} with its braces closed, else the last line labelled as the answer, else all of the reply.

    What stands before </think> does not count; of a <think> that is never closed nothing does. See `bare` for what is
    taken away around it.
    """
    rest = after_thinking(reply)
    if (box := last_boxed(rest)) is not None:
        return Extracted(bare(box[1]), "boxed")
    labelled = [match[1] for match in _LABEL.finditer(_EMPHASIS.sub("", rest))]
    if labelled and labelled[-1].strip():
        return Extracted(bare(labelled[-1]), "label")
    return Extracted(bare(rest), "whole")


def bare(text: str) -> str:
    r"""Text without \text{...}, Markdown's marks, and without dollar signs, stars and blanks around it."""
    text = _EMPHASIS.sub("", _WRAPPER.sub(r"\1", text)).strip(" \t\r\n*")
    maths = _MATHS.fullmatch(text)
    return maths[1].strip() if maths else text
