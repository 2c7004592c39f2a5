"""Where an answer stands in a completion. Everything here takes time linear in the text."""

from __future__ import annotations

import collections
import re
import unicodedata

from jaxmem.data.replies import after_thinking, last_boxed

_PHRASE = re.compile(r"(?i)\banswer[\s*]{0,8}(?:is\b|[:=])[\s*:]{0,8}([^\n]*)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_MARKUP = re.compile(r"\*\*|[`$]|(?<!\w)\*|\*(?!\w)")  # a star between words may be a product
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")


def first_answer_block(text: str) -> str | None:
    """The stripped text between the first <answer> and the first </answer> after it."""
    _, opened, rest = text.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip() if opened and closed else None


def well_formed(text: str) -> bool:
    """Is the text one think block and one answer block?

    The think block starts at the first character; its first closing tag is followed by white space only, then by one
    answer block without a nested closing tag, then by nothing but white space.
    """
    if not text.startswith("<think>"):
        return False
    _, closed, rest = text.partition("</think>")
    before, opened, rest = rest.partition("<answer>")
    _, ended, after = rest.partition("</answer>")
    return bool(closed and opened and ended) and not before.strip() and not after.strip()


def explicit_answer(text: str, phrases: bool = True) -> str | None:
    r"""The last answer that is marked as one: \boxed{...}, <answer>...</answer> or "the answer is ...".

    Of nested marks the inner one counts. A phrase (not looked for without `phrases`) ends with its sentence or line.
    """
    marks = (last_boxed(text), _last_block(text), _last_phrase(text) if phrases else None)
    found = [mark for mark in marks if mark is not None]
    return max(found)[1].strip() if found else None


def final_answer(text: str) -> str:
    """The explicit answer after the thinking, or all that stands there."""
    rest = after_thinking(text)
    answer = explicit_answer(rest)
    return rest.strip() if answer is None else answer


def _last_block(text: str) -> tuple[int, str] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (start, text[start + len("<answer>") : end]) if start >= 0 else None


def _last_phrase(text: str) -> tuple[int, str] | None:
    found = collections.deque(_PHRASE.finditer(text), maxlen=1)
    if not found:
        return None
    last = found.pop()
    return (last.start(), _SENTENCE_END.split(last[1].partition("</answer>")[0], maxsplit=1)[0])


def unwrap(text: str) -> str:
    r"""Text with \text{...} and its like replaced by their content."""
    return _WRAPPER.sub(r"\1", text)


def plain(text: str) -> str:
    r"""Text without Markdown's stars and backticks, dollar signs and \text{...}; one space between words."""
    text = unwrap(unicodedata.normalize("NFKC", text)).replace("\u2212", "-")
    return " ".join(_MARKUP.sub(" ", text).split())


def normalise(text: str) -> str:
    """For comparing words: `plain`, without case, quotes around and punctuation behind."""
    return plain(text).casefold().strip("\"' ").rstrip(".,;:!? ").strip("\"' ")
