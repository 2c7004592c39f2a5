"""The benchmarks' own metrics: InfoSeek, ViQuAE and the harmonic means; those of the VQA challenge are in `vqa`.

Scores of a reply lie in [0, 1]. A prediction is the extracted final answer (`extraction`), which the benchmarks leave
to the model.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable, Sequence

TOLERANCE, OVERLAP = 0.1, 0.5
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?")

Number = float | tuple[float, float]
"""One number, or the two ends of a range."""


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, then without a, an and the, one blank between words (as for SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 when the normalised prediction is one of the normalised answers: InfoSeek's strings and times, ViQuAE's EM."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def f1(prediction: str, answers: Iterable[str]) -> float:
    """ViQuAE's F1: words that prediction and answer share, at the best answer; 0 where nothing is shared."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = (collections.Counter(predicted) & collections.Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def parse_number(text: str) -> Number:
    """The number or range that a text states, read as InfoSeek's script does, its oddities included.

    The first two numbers are a range when they ascend, else only the first counts. A hyphen behind a digit separates,
    commas group thousands. Words such as "million" and units are ignored; a point in front of the first digit is
    dropped, so that ".5" is 5. A text without a number is the range (0, 0). "-.5.5", at which the script fails, is
    passed over.
    """
    spaced = re.sub(r"(?<=\d)-", " - ", text)
    values = (_value(number.replace(",", "").strip(".")) for number in _NUMBER.findall(spaced))
    found = [value for value in values if value is not None][:2]
    if not found:
        return 0.0, 0.0
    return (found[0], found[1]) if len(found) == 2 and found[0] <= found[1] else found[0]


def _value(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def numerical(prediction: str, gold: Number) -> float:
    """InfoSeek's score of a number.

    Args:
      prediction: the answer's words.
      gold: the range of right numbers; a single number stands for 10 % to either side.

    Returns:
      1 for a number inside the range, and for a range inside it or with an intersection over union of 0.5; else 0.
    """
    return compare_numbers(parse_number(prediction), gold)


def compare_numbers(predicted: Number, gold: Number) -> float:
    """`numerical` of a number that is read already."""
    low, high = gold if isinstance(gold, tuple) else (gold * (1 - TOLERANCE), gold * (1 + TOLERANCE))
    first, last = predicted if isinstance(predicted, tuple) else (predicted, predicted)
    if low <= first <= high and low <= last <= high:
        return 1.0
    return float(isinstance(predicted, tuple) and _overlap((first, last), (low, high)) >= OVERLAP - 1e-12)


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two ranges, of which a point has no length."""
    shared = max(0.0, min(max(one), max(other)) - max(min(one), min(other)))
    tiny = 1e-12
    union = (max(one) - min(one) + tiny) + (max(other) - min(other) + tiny) - shared
    return shared / union if union else 0.0


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of scores that are not negative; 0 when one of them is 0."""
    return len(values) / sum(1 / value for value in values) if values and all(value > 0 for value in values) else 0.0
