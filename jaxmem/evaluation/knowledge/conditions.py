"""What stands before a question: nothing, its own memory, another question's, or the items themselves."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from jaxmem import config as configs
from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.questions import Question

CONDITIONS = {
    "none": "K = 0: the question alone",
    "memory": "the memory of the K items retrieved for the question",
    "shuffled": "the memory of the items retrieved for another question, about another image",
    "rag": "the K retrieved items themselves, as text and images",
}


def assign(questions: Sequence[Question], condition: str, seed: int = 0) -> tuple[Question, ...]:
    """The questions with `meta["items_of"]`: the id of the question whose items are to be used, None for none.

    Args:
      questions: all that are asked.
      condition: one of CONDITIONS.
      seed: of the shuffling.

    Raises:
      ConfigError: an unknown condition.
      DataError: shuffling is impossible.
    """
    configs.choose(CONDITIONS, condition, "condition")
    ids: list[str | None] = [question.id for question in questions]
    if condition == "none":
        ids = [None] * len(questions)
    elif condition == "shuffled":
        ids = list(partners(questions, seed))
    return tuple(
        dataclasses.replace(question, meta={**question.meta, "items_of": other})
        for question, other in zip(questions, ids, strict=True)
    )


def partners(questions: Sequence[Question], seed: int) -> list[str]:
    """For every question the id of another about another image; every question is one's partner once.

    Questions about one image would retrieve the same items, so that these must not swap among themselves. Images are
    shuffled, their questions laid side by side and moved on by as many places as the most frequent image has.

    Raises:
      DataError: more than half of the questions are about one image.
    """
    groups: dict[Any, list[int]] = {}
    for at, question in enumerate(questions):
        groups.setdefault(_image(question), []).append(at)
    step = max(map(len, groups.values()), default=0)
    if not questions or 2 * step > len(questions):
        raise DataError(
            f"{step} of {len(questions)} questions are about one image: there are not enough others to shuffle memories"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    line = [at for group in order for at in members[group]]
    found = [""] * len(questions)
    for place, at in enumerate(line):
        found[at] = questions[line[(place + step) % len(line)]].id
    return found


def _image(question: Question) -> Any:
    """What tells a question's images from others; a question without images is like no other."""
    return tuple(map(_key, question.images)) or question.id


def _key(image: Any) -> str:
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return str(image) if isinstance(image, str | PurePath) else f"object {id(image)}"
