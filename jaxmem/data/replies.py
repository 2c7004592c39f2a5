"""What models put around an answer: their thinking, and boxes. Everything here takes time linear in the text."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\[\\{}]|\\boxed\s?\{|\{|\}")


def after_thinking(text: str) -> str:
    """What follows the last </think>; nothing when a <think> was never closed; all when there is neither."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""(start, content) of the last \boxed{...} whose brace is closed."""
    last, open_braces = None, []
    for match in _BRACES.finditer(text):
        word = match.group()
        if word == "}" and open_braces:
            start, content, boxed = open_braces.pop()
            if boxed and (last is None or start > last[0]):
                last = (start, text[content : match.start()])
        elif word.endswith("{") and word != r"\{":
            open_braces.append((match.start(), match.end(), len(word) > 1))
    return last
