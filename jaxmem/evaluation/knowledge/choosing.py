"""Which choice a reply names. Never by its first character: "Based on" is not B, "Considering" not C, "A dog" not A."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jaxmem.data.replies import after_thinking, last_boxed
from jaxmem.evaluation.knowledge.extraction import bare
from jaxmem.evaluation.knowledge.languages import LANGUAGES

_MARKS = re.compile(r"[*$]")
_CHOICE = ("option", "choice", "opción", "opção", "вариант", "选项")
_ANSWER = "|".join(
    map(re.escape, sorted({w for words in LANGUAGES.values() for w in words.answer}, key=len, reverse=True))
)
_VERB = r"[^\S\n]+(?:is|es|é|е|would be|should be|—|-)(?![\w'])|[^\S\n]*(?:[:=]|是|为)"
_NAMED = re.compile(rf"(?:{_ANSWER}|{'|'.join(_CHOICE)})(?:{_VERB})[^\S\n]*([^\n]*)", re.IGNORECASE)
_LEAD = re.compile(
    rf"\A(?:the |la |el |a |o )?(?:{'|'.join((*_CHOICE, 'letter', 'number'))})[^\S\n]*:?[^\S\n]*", re.IGNORECASE
)
_SENTENCE = re.compile(r"\s+(?!(?:because|since|as|for|and|which|that|is|was)\b)\w", re.IGNORECASE)


def choose(reply: str, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    r"""The label of the choice that a reply names, None when it names none, or several.

    In this order: the last \boxed{...}; the last "answer is ..." or "answer: ..."; a reply that is a label, or begins
    with one as lists do ("B.", "(B) a dog"); one label in brackets; a last line that is a label; the text of one
    choice. The first place that says anything decides: a box with something else in it is no choice.

    Args:
      reply: what the model wrote.
      labels: "A" to "D", or "1" to "4".
      choices: the texts, one for each label.

    Returns:
      One of `labels`, or None.
    """
    rest = unicodedata.normalize("NFKC", after_thinking(reply))
    if (box := last_boxed(rest)) is not None:
        return _said(_MARKS.sub("", bare(box[1])), labels, choices)
    rest = _MARKS.sub("", bare(rest))
    if named := [match[1] for match in _NAMED.finditer(rest) if match[1].strip()]:
        found = _said(named[-1], labels, choices)
        if found is not None:
            return found
    if (found := _marked(rest, labels, choices)) is not None:
        return found
    bracketed = set(_bracketed(rest, labels))
    if len(bracketed) == 1:
        return bracketed.pop()
    lines = rest.splitlines()
    if len(lines) > 1 and (found := _marked(lines[-1], labels, choices)) is not None:
        return found
    return None if bracketed else _text(rest, labels, choices)


def _bracketed(text: str, labels: Sequence[str]) -> list[str]:
    """Labels in brackets or behind "option", anywhere."""
    one = "|".join(labels)
    return [a or b for a, b in re.findall(rf"\(({one})\)|(?i:{'|'.join(_CHOICE)})\s*({one})(?!\w)", text)]


def _said(text: str, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    """The label that a place meant for the answer begins with, or the choice whose text stands there.

    Where words follow a bare label ("A dog", "3 people"), a choice that begins like this goes first, and an A is none.
    """
    text = _LEAD.sub("", text.strip()).strip()
    if (alone := _alone(text, labels)) is not None:
        return alone
    match = re.match(rf"[(\[{{]?({'|'.join(labels)})(?!\w|[.,]\d)[)\]}}]?", text)
    if match is None:
        return _text(text, labels, choices)
    if match.group() == match[1] and _SENTENCE.match(text[match.end() :]):
        starts = [label for label, choice in zip(labels, choices, strict=False) if _begins(text, choice)]
        if starts or match[1] == "A":
            return starts[0] if len(starts) == 1 else _text(text, labels, choices)
    return None if _another(text[match.end() :], labels) else match[1]


def _alone(text: str, labels: Sequence[str]) -> str | None:
    """The label when the text is nothing else, in either case."""
    match = re.fullmatch(r"[(\[{]?(\w)[)\]}]?[.:)]?", text)
    return match[1].upper() if match is not None and match[1].upper() in labels else None


def _begins(text: str, choice: str) -> bool:
    return re.match(rf"{re.escape(_plain(choice))}(?!\w)", _plain(text)) is not None


def _another(rest: str, labels: Sequence[str]) -> bool:
    """Does a second label follow at once, as in "A or B", "A, C" or "1-4"?"""
    return re.match(rf"\s*(?:or|and|,|/|-|&)\s*[(\[]?(?:{'|'.join(labels)})(?!\w)", rest) is not None


def _marked(text: str, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    """The label of a text that is one, or begins with one in the way of a list or before its choice's text."""
    text = text.strip()
    if (alone := _alone(text, labels)) is not None:
        return alone
    match = re.match(rf"[(\[]?({'|'.join(labels)})(?:[)\]]|[.:)](?=\s|$)|(?=\s|$))\s*", text)
    if match is None or _another(text[match.end(1) :].lstrip(")].:"), labels):
        return None
    rest, choice = text[match.end() :], choices[labels.index(match[1])]
    listed = not match.group().rstrip().endswith(match[1])
    return match[1] if not rest or listed or _begins(rest, choice) else None


def _text(text: str, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    """The only choice whose text occurs as whole words, but for those inside a longer choice that occurs."""
    text = f" {_plain(text)} "
    present = []
    for label, choice in sorted(zip(labels, map(_plain, choices), strict=False), key=lambda pair: -len(pair[1])):
        if choice and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text):
            present.append(label)
            text = re.sub(rf"(?<!\w){re.escape(choice)}(?!\w)", "\0", text)
    return present[0] if len(present) == 1 else None


def _plain(text: str) -> str:
    """Lower case, single spaces, no markup, no full stop or quotes around."""
    text = _MARKS.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split()).strip(" .\"'")
