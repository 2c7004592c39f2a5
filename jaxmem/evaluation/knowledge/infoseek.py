"""InfoSeek (arXiv 2302.11713): `infoseek_val.jsonl` with its question types, and translations in the same format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import listed, need, rows, some, words
from jaxmem.evaluation.knowledge.pictures import Named
from jaxmem.evaluation.knowledge.questions import Question, QuestionSet, Source, collect

SPLITS = ("unseen_question", "unseen_entity")
TRAIN = "train"
KINDS = {"string": "string", "time": "time", "numerical": "numerical"}


def read(source: Source) -> QuestionSet:
    """The questions of InfoSeek's files.

    A row has data_id, image_id, question, answer_eval (texts, or the range of a number) and data_split, which ends
    with "unseen_question", "unseen_entity" or "train". Annotations, in any order: the file of types (data_id,
    question_type) and the one with entities (data_id, entity_id, entity_text). Without types a range makes a question
    "numerical" and anything else "string": times are then not told apart, which changes nothing but the released code's
    metric.

    Args:
      source: of the files.

    Raises:
      DataError: a row lacks a key, has another split, or has no type though a file of types was given.
    """
    types: dict[str, str] = {}
    entities: dict[str, dict[str, Any]] = {}
    for where, row in rows(source.annotations):
        (name,) = need(row, where, "data_id")
        if "question_type" in row:
            types[str(name)] = _kind(row["question_type"], where)
        elif "entity_id" in row:
            entities[str(name)] = {"entity_id": row["entity_id"], "entity_text": row.get("entity_text")}
        else:
            raise DataError(f"{where}: has neither question_type nor entity_id; annotations are one or the other")
    untyped: list[str] = []
    found = collect("infoseek", _drafts(source, types, entities, untyped), source)
    if types and untyped:
        raise DataError(
            f"infoseek: the annotations have no question_type for {some(untyped)}; give the file of this split"
        )
    if types:
        return found
    note = "no file of question types: ranges are numbers, everything else is scored as strings, times among them"
    return QuestionSet(found.name, found.questions, (*found.notes, note))


def _kind(value: Any, where: str) -> str:
    kind = KINDS.get(str(value).lower())
    if kind is None:
        raise DataError(f"{where}: question_type {value!r} is none of String, Time, Numerical")
    return kind


def _drafts(
    source: Source, types: Mapping[str, str], entities: Mapping[str, Mapping[str, Any]], untyped: list[str]
) -> Iterator[tuple[str, Question]]:
    for where, row in rows(source.questions):
        name, image, question, gold, split = need(
            row, where, "data_id", "image_id", "question", "answer_eval", "data_split"
        )
        name, span = str(name), _range(gold)
        kind = types.get(name) or ("numerical" if span else "string")
        if name not in types:
            untyped.append(name)
        if (kind == "numerical") != (span is not None):
            raise DataError(f"{where}: a question of type {kind} has answer_eval {gold!r}")
        meta = {"language": source.language, "answer": row.get("answer"), **entities.get(name, {})}
        if span is not None:
            meta |= {"range": span, "wikidata": _first(gold).get("wikidata")}
        answers = tuple(str(end) for end in span) if span else listed(gold, where, "answer_eval")
        text, images = words(question, where, "question"), (Named((str(image),)),)
        yield where, Question(name, text, images, answers, _split(split, where), kind, (), meta)


def _split(value: Any, where: str) -> str:
    found = [split for split in (*SPLITS, TRAIN) if str(value).endswith(split)]
    if not found:
        raise DataError(f"{where}: data_split {value!r} ends with none of unseen_question, unseen_entity, train")
    return found[0]


def _first(gold: Any) -> Any:
    return gold[0] if isinstance(gold, list) and gold else gold


def _range(gold: Any) -> tuple[float, float] | None:
    """The ends of a number's gold range, None for other answers."""
    span = _first(gold).get("range") if isinstance(_first(gold), Mapping) else None
    if not isinstance(span, list | tuple) or len(span) < 2 or not all(isinstance(end, int | float) for end in span[:2]):
        return None
    return float(span[0]), float(span[1])
