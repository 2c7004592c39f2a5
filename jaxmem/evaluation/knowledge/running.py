"""Asks a model the questions of a benchmark under a condition, scores what it says, and keeps both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import conditions
from jaxmem.evaluation.knowledge.prompts import Template
from jaxmem.evaluation.knowledge.questions import Question, QuestionSet
from jaxmem.evaluation.knowledge.results import Results, Settings, digest
from jaxmem.evaluation.knowledge.scoring import Scorer
from jaxmem.evaluation.knowledge.summary import summarise

Answer = Callable[[Sequence[Question]], Sequence[str]]


class Answering(Protocol):
    """A model with its memory, bank and index, as the command line uses it."""

    def answer(self, questions: Sequence[Question], condition: str, template: Template) -> Sequence[str]:
        """A reply to each question, with the items of the question `meta["items_of"]` in front, if any."""
        ...

    def facts(self, condition: str) -> Mapping[str, Any]:
        """model, order, decode, and where there are any memory, bank_size, bank_digest, index, extra: of `Settings`."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    Attributes:
      path: of the answers.
      summary: see `summary.summarise`; its "notes" say what happened to the questions and the file.
      rows: one per question, in the order of the questions.
      asked: how many questions were new.
    """

    path: Path
    summary: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    asked: int


def evaluate(
    questions: QuestionSet,
    answer: Answer,
    settings: Settings,
    out: str | Path,
    score: Scorer,
    batch_size: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Asks what the result file lacks, and summarises all of it.

    Args:
      questions: all of them.
      answer: replies to a batch; each question says in `meta["items_of"]` whose items stand before it.
      settings: what answers depend on; its condition says what stands before the questions.
      out: a folder; answers go to `CONDITION.jsonl` in it, settings and summary to `CONDITION.json`.
      score: judges a reply.
      batch_size: questions per call; the last call may have fewer.
      report: told (answered, all) after each batch.

    Raises:
      ConfigError: the file has answers of other settings, or they are not about these questions.
      DataError: the file is broken, has answers to other questions, or a batch got another number of replies.
    """
    _check(questions, settings, batch_size)
    assigned = conditions.assign(questions.questions, settings.condition, settings.seed)
    results = Results(Path(out) / f"{settings.condition}.jsonl", settings)
    if foreign := results.ids - {question.id for question in assigned}:
        raise DataError(f"{results.path}: has an answer to {min(foreign)}, which is no question of this evaluation")
    open_ones = [question for question in assigned if question.id not in results.ids]
    report(len(results.ids), len(assigned))
    for batch in _batches(open_ones, batch_size):
        results.add(_rows(batch, answer(batch), score))
        report(len(results.ids), len(assigned))
    by_id = {row["id"]: row for row in results.rows}
    rows = tuple(by_id[question.id] for question in assigned)
    notes = [*questions.notes, *([results.repaired] if results.repaired else [])]
    summary = {**summarise(questions.name, rows), "notes": notes}
    results.finish(summary)
    return Outcome(results.path, summary, rows, len(open_ones))


def _check(questions: QuestionSet, settings: Settings, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    if settings.questions != digest(questions.questions) or dict(settings.split_sizes) != questions.split_sizes:
        raise ConfigError("the settings are about other questions; make them with `settings_of`")


def _batches(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    return [questions[at : at + size] for at in range(0, len(questions), size)]


def _rows(batch: Sequence[Question], replies: Sequence[str], score: Scorer) -> list[dict[str, Any]]:
    """The lines of a batch."""
    if len(replies) != len(batch) or not all(isinstance(reply, str) for reply in replies):
        raise DataError(f"the model gave {len(replies)} replies to {len(batch)} questions, from {batch[0].id} on")
    return [_row(question, reply, score) for question, reply in zip(batch, replies, strict=True)]


def _row(question: Question, reply: str, score: Scorer) -> dict[str, Any]:
    judged = score(question, reply)
    return {
        "id": question.id,
        "split": question.split,
        "kind": question.kind,
        "question": question.text,
        "answers": list(question.answers),
        "items_of": question.meta["items_of"],
        "reply": reply,
        "answer": judged.answer,
        "how": judged.how,
        "flags": list(judged.flags),
        "metrics": dict(judged.metrics),
    }


def settings_of(
    questions: QuestionSet, condition: str, template: Template, k: int, facts: Mapping[str, Any], seed: int = 0
) -> Settings:
    """The settings of an evaluation; `k` becomes 0 where no items are used.

    Raises:
      ConfigError: the facts lack model, order or decode, or have a name that settings do not.
    """
    known = {"model", "order", "decode", "memory", "bank_size", "bank_digest", "index", "extra"}
    if odd := [*({"model", "order", "decode"} - facts.keys()), *(facts.keys() - known)]:
        raise ConfigError(f"facts of a model: {', '.join(sorted(odd))} is missing or unknown; they are {sorted(known)}")
    return Settings(
        benchmark=questions.name,
        condition=condition,
        k=0 if condition == "none" else k,
        template=template.record,
        split_sizes=questions.split_sizes,
        questions=digest(questions.questions),
        seed=seed if condition == "shuffled" else 0,
        **facts,
    )
