"""A reply to a question becomes scores, one per metric, each in [0, 1].

Names of metrics say whose they are: `strict...` of the benchmark, `comem_compat...` of CoMEM's released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxmem.evaluation.knowledge import compat, strict, vqa
from jaxmem.evaluation.knowledge.choosing import choose
from jaxmem.evaluation.knowledge.entities import Entities
from jaxmem.evaluation.knowledge.extraction import final_answer
from jaxmem.evaluation.knowledge.questions import LETTERS, NUMBERS, Question

VERSION = 1
"""Grows when a scorer changes, so that one result file has the scores of one version."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a reply is worth.

    Attributes:
      answer: what the strict metric compares: the extracted answer, the choice's label, the entity's id; None where
        there is none, which counts as wrong and as unanswered.
      how: where it was found: "boxed", "label", "whole", "choice" or "entity".
      metrics: scores in [0, 1].
      flags: what is to be counted in the summary, e.g. "needs_judge".
    """

    answer: str | None
    how: str
    metrics: Mapping[str, float]
    flags: tuple[str, ...] = ()


Scorer = Callable[[Question, str], Judged]


def infoseek(question: Question, reply: str) -> Judged:
    """Exact match over accepted forms for strings and times, ranges for numbers (arXiv 2302.11713)."""
    found, gold = final_answer(reply), question.meta.get("range")
    span = None if gold is None else (float(gold[0]), float(gold[1]))
    numerical = question.kind == "numerical" and span is not None
    right = strict.numerical(found.text, span) if numerical else strict.exact_match(found.text, question.answers)
    loose = (reply, question.kind, question.answers, span)
    scores = {
        "strict": right,
        "comem_compat": compat.infoseek(*loose),
        "comem_compat_contains": compat.infoseek_contains(*loose),
    }
    return Judged(found.text or None, found.how, scores)


def okvqa(question: Question, reply: str) -> Judged:
    """Soft accuracy of the VQA challenge over all annotators."""
    found = final_answer(reply)
    scores = {
        "strict": vqa.soft_accuracy(found.text, question.answers),
        "comem_compat": compat.raw_match(reply, question.answers),
    }
    return Judged(found.text or None, found.how, scores)


def aokvqa(question: Question, reply: str) -> Judged:
    """The same for direct answers, and as `strict_script` what the benchmark's own script gives."""
    judged = okvqa(question, reply)
    script = vqa.plain_accuracy(judged.answer or "", question.answers)
    return dataclasses.replace(judged, metrics={**judged.metrics, "strict_script": script})


def viquae(question: Question, reply: str) -> Judged:
    """Exact match and F1 over the aliases."""
    found = final_answer(reply)
    scores = {
        "strict": strict.exact_match(found.text, question.answers),
        "strict_f1": strict.f1(found.text, question.answers),
        "comem_compat": compat.raw_match(reply, question.answers),
    }
    return Judged(found.text or None, found.how, scores)


def mrag(question: Question, reply: str) -> Judged:
    """The letter of the choice; the released code's rule leaves some replies to a language model, here to none."""
    label = choose(reply, LETTERS[: len(question.choices)], question.choices)
    first = compat.first_letter(reply)
    scores = {"strict": float(label in question.answers), "comem_compat": float(first in question.answers)}
    return Judged(label, "choice", scores, () if first else ("comem_needs_judge",))


def cvqa(question: Question, reply: str) -> Judged:
    """The number of the option."""
    label = choose(reply, NUMBERS[: len(question.choices)], question.choices)
    scores = {
        "strict": float(label in question.answers),
        "comem_compat": float(compat.boxed_number(reply) in question.answers),
    }
    return Judged(label, "choice", scores)


def oven(entities: Entities) -> Scorer:
    """The scorer that maps answers to the entities of an index."""

    def score(question: Question, reply: str) -> Judged:
        found = final_answer(reply)
        entity = entities.entity(found.text, strict.normalise)
        loose = entities.entity(compat.extract(reply), compat.normalise)
        scores = {"strict": float(entity in question.answers), "comem_compat": float(loose in question.answers)}
        return Judged(entity, "entity", scores)

    return score
