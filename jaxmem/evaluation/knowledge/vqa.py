"""Soft accuracy of the VQA challenge, for OK-VQA and A-OKVQA."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_GROUPED = re.compile(r"\d,\d")
_DIGITS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_DIGITS["none"] = "0"
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
).split()


def _without_one(word: str) -> list[str]:
    """The spellings that lack one of the apostrophes."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in _APOSTROPHES for short in _without_one(word)} | {"somebody'd": "somebodyd"}
"""The challenge's table, with its one entry the other way round."""


def normalise(text: str) -> str:
    """The challenge's form of an answer.

    Punctuation goes away where a blank is beside that mark, or where the text has a number with a comma; elsewhere it
    becomes a blank. Full stops go, but for decimal points. Then lower case, number words up to ten as digits,
    no articles, apostrophes put back into contractions.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped, written = _GROUPED.search(text) is not None, text
    for mark in _PUNCTUATION:
        apart = grouped or f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if apart else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", written).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean over annotators of min(matches among the others / 3, 1), everything normalised.

    Args:
      prediction: the answer's words.
      answers: of all annotators, repetitions included; two at least.
    """
    said, given = normalise(prediction), [normalise(answer) for answer in answers]
    matches = [answer == said for answer in given]
    return sum(min((sum(matches) - match) / 3, 1.0) for match in matches) / len(matches)


def plain_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """What A-OKVQA's own script computes: min(answers that are the prediction, letter by letter / 3, 1)."""
    return min(sum(answer == prediction for answer in answers) / 3, 1.0)
