r"""What CoMEM's released code computes instead of the benchmarks' metrics (arXiv 2505.17670), false matches included.

Kept to compare with its numbers alone. Known to be wrong, on purpose: the normaliser cuts behind the letters "is",
"the", "of" and "by" even inside words, so that "Paris" equals "Tennis" (both become nothing) and "University of Oxford"
equals "Oxford"; an empty time is contained in every time; a capital letter in an answer of OK-VQA, A-OKVQA or ViQuAE
cannot be matched; a reply of MRAG-Bench that begins "Based on" says B.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from jaxmem.evaluation.knowledge import strict

_BOX = "\\boxed{"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CUTS = ("is", "the", "of", "by")


def extract(reply: str) -> str:
    r"""The first \boxed{...}, up to the first closing brace, else what follows the last colon."""
    box = _box(reply)
    return (reply.rpartition(":")[2] if box is None else box).strip()


def _box(reply: str) -> str | None:
    """The content of the first box that ends on its line."""
    for line in reply.split("\n"):
        inside, closed, _ = line.partition(_BOX)[2].partition("}")
        if closed:
            return inside
    return None


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, only what follows the last "is", then "the", "of", "by"; no articles."""
    text = text.lower().translate(_PUNCTUATION)
    for cut in _CUTS:
        text = text.rpartition(cut)[2]
    return " ".join(_ARTICLES.sub(" ", text).split())


def infoseek(reply: str, kind: str, answers: Iterable[str], gold: strict.Number | None) -> float:
    """InfoSeek: normalised equality of strings, containment of times either way, numbers as in the benchmark.

    The reply is cut behind its last colon before a box is looked for.
    """
    said = extract(_cut(reply))
    if kind == "numerical" and gold is not None:
        return strict.numerical(said, gold)
    if kind == "time":
        return float(any(said in answer or answer in said for answer in answers))
    return float(normalise(said) in map(normalise, answers))


def infoseek_contains(reply: str, kind: str, answers: Iterable[str], gold: strict.Number | None) -> float:
    """`infoseek`, where without a box a string also counts when it occurs in the reply, both normalised.

    Readings of the released code differ on this, so it is a metric of its own.
    """
    answers = list(answers)
    found = infoseek(reply, kind, answers, gold)
    if kind != "string" or _box(_cut(reply)) is not None:
        return found
    said = normalise(_cut(reply))
    return max(found, float(any(normalise(answer) in said for answer in answers)))


def _cut(reply: str) -> str:
    return reply.rpartition(":")[2]


def raw_match(reply: str, answers: Iterable[str]) -> float:
    """OK-VQA, A-OKVQA and ViQuAE: the normalised prediction is an answer as it is written, capitals and all."""
    return float(normalise(extract(reply)) in set(answers))


def first_letter(reply: str) -> str | None:
    """MRAG-Bench: the reply's first character where it is A to D; else None, where released code asks GPT-4o-mini."""
    first = reply.strip()[:1]
    return first if first in tuple("ABCD") else None


def boxed_number(reply: str) -> str | None:
    """CVQA: the content of the first box, None without one."""
    box = _box(reply)
    return None if box is None else box.strip()
