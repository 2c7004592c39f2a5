"""Text that looks like a special token stays text.

A user may write `<|im_end|>` or `<|image_pad|>`. Such strings are put between two marks before the chat template
runs; afterwards the marked pieces are tokenised with special tokens switched off. Only the template itself can
therefore open a role or hold an image's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmem.data.messages import text_runs
from jaxmem.errors import DataError

_PRIVATE_USE = range(0xE000, 0xF900)


class Guard:
    """Marks and recognises the special strings of one chat. The chat's messages are changed in place.

    Attributes:
      marked: number of special strings found in the chat's texts.
    """

    def __init__(self, chat: Sequence[dict[str, Any]], special: Iterable[str]) -> None:
        runs = text_runs(chat)
        used = {char for run in runs for holder, key in run for char in re.findall("[\ue000-\uf8ff]", holder[key])}
        self._open, self._close = _two_unused(used)
        self._pieces = re.compile(f"{self._open}(.*?){self._close}", re.DOTALL)
        self.marked = 0
        strings = sorted(special, key=len, reverse=True)
        if strings:
            pattern = re.compile("|".join(map(re.escape, strings)))
            for run in runs:
                self._mark_run(run, pattern)

    def _mark_run(self, run: list[tuple[dict[str, Any], str]], pattern: re.Pattern[str]) -> None:
        """Marks special strings, also those that only neighbouring parts spell together."""
        spans = [match.span() for match in pattern.finditer("".join(holder[key] for holder, key in run))]
        self.marked += len(spans)
        start = 0
        for holder, key in run:
            text, out, done = holder[key], [], 0
            for first, last in spans:
                first, last = max(first - start, 0), min(last - start, len(text))
                if first < last:
                    out += [text[done:first], self._open, text[first:last], self._close]
                    done = last
            holder[key] = "".join([*out, text[done:]])
            start += len(text)

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """(piece, is plain text) of a rendered chat, marks removed."""
        pieces = self._pieces.split(rendered)  # alternates: outside, marked, outside, ...
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces) if piece]

    def fill(self, rendered: str, target: str, texts: Sequence[str]) -> str:
        """Replaces the unmarked occurrences of `target` by `texts` in order; occurrences without a text stay."""
        left = iter(texts)
        return re.sub(f"(?<!{self._open}){re.escape(target)}", lambda match: next(left, match[0]), rendered)

    def unmark(self, rendered: str) -> str:
        """The rendered chat without marks, for reading."""
        return "".join(piece for piece, _ in self.split(rendered))


def _two_unused(used: set[str]) -> tuple[str, str]:
    """Two private-use characters that no text of the chat holds."""
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    first, second = next(free, None), next(free, None)
    if first is None or second is None:
        raise DataError("the chat's text uses every private-use character; remove U+E000..U+F8FF from it")
    return first, second
