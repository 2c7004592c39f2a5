"""Reward for mathematics, judged by math-verify (extra `math`).

math-verify can take for ever on a few characters (9^9^9), and its own time limit works in a main thread only. Its
limits are therefore off, and the functions that use it run in processes that can be killed.

LaTeX is parsed by a grammar. Plain arithmetic goes through sympy's parser, which ends in Python's `eval`; math-verify's
pattern lets nothing but digits, white space, points, brackets and + - * / ^ (and the signs for times and by) reach it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import Any

from jaxmem.errors import ConfigError
from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_FORMULA = re.compile(r"\d|[\\^_=<>{}()\[\]]|^\W*[A-Za-z]\W*$")
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_REWRITES = (
    (re.compile("\u2212"), "-"),
    (re.compile(r"(?<=\d)[eE]([-+]?\d+)"), r" \\cdot 10^{\1}"),
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d.])"), r"\1 \\frac{\2}{\3}"),  # a mixed number
)


@dataclasses.dataclass(frozen=True)
class Math(BuiltIn):
    r"""1 when the final answer equals the reference mathematically, else 0.

    Judged is the last \boxed{...} or <answer>...</answer> or, without one, what math-verify finds after the
    thinking. A marked answer that lists several values is a set, which no single value equals.

    Attributes:
      column: the reference, with or without LaTeX delimiters; one that does not parse does not apply.
    """

    column: str = "answer"

    @property
    def in_process(self) -> bool:
        """No: see the module."""
        return False

    def prepare(self) -> None:
        """Imports math-verify; raises ConfigError when it is missing."""
        _package()

    def score(self, text: str, *values: Any) -> float | None:
        """Mathematical equality."""
        reference = read_cached(str(values[0]))
        if not reference:
            return None
        rest = texts.after_thinking(text)
        marked = texts.explicit_answer(rest, phrases=False)
        return float(_same(reference, _parse(rest) if marked is None else read(marked)))

    def cases(self) -> tuple[Case, ...]:
        """Two forms of one number, the hack of listing, and a reference that is no mathematics."""
        root = {self.column: r"2\sqrt{3}"}
        return (
            Case(r"Hence \boxed{\sqrt{12}}.", root, 1.0),
            Case("<answer>2</answer>", root, 0.0),
            Case("<answer>3, 4 or 5</answer>", {self.column: "4"}, 0.0),
            Case("4", {self.column: "no idea"}, None),
        )


def equal(reference: str, answer: str) -> bool:
    """Are two short texts equal: word by word, or as mathematics where the reference is any?"""
    if texts.normalise(reference) == texts.normalise(answer):
        return True
    wanted = read_cached(reference)
    return bool(wanted) and _same(wanted, read(answer))


def read(text: str) -> list[Any]:
    r"""What math-verify makes of a short text that should be one formula; empty for words.

    Undelimited text is read as LaTeX first: in running text math-verify would take the 2 out of 2\sqrt{3}. Prose is
    left to it.
    """
    if not _FORMULA.search(text):
        return []
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text.strip())
    if _DELIMITED.search(text) or _PROSE.search(text):
        return _parse(text)
    return _parse(f"${text}$") or _parse(text)


read_cached = functools.lru_cache(maxsize=256)(read)
"""`read` for references, which every completion of a group shares."""


def _parse(text: str) -> list[Any]:
    return _package().parse(text, parsing_timeout=None)  # pyrefly: ignore[bad-argument-type]


def _same(reference: list[Any], answer: list[Any]) -> bool:
    return bool(_package().verify(reference, answer, timeout_seconds=None))


@functools.cache
def _package() -> Any:
    """The module math_verify, without its warnings about the limits that are off."""
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError("this reward needs math-verify: pip install 'jaxmem[math]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
