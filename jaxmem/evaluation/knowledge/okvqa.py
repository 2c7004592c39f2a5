"""OK-VQA (arXiv 1906.00067) in the format of the VQA challenge, and A-OKVQA (arXiv 2206.01718)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import entries, need, read_json, rows, some, words
from jaxmem.evaluation.knowledge.pictures import Named
from jaxmem.evaluation.knowledge.questions import Question, QuestionSet, Source, collect


def read(source: Source) -> QuestionSet:
    """OK-VQA: `OpenEnded_mscoco_val2014_questions.json`, with `mscoco_val2014_annotations.json` as annotations.

    Answers are the annotators' `answer`, the form that the challenge compares; every one counts, so that repetitions
    stay. Images are COCO's, by their 2014 or their bare file name.

    Args:
      source: one question file, one file of annotations.

    Raises:
      DataError: a file is missing or has another structure, a question has no annotation or less than two answers.
    """
    if len(source.questions) != 1 or len(source.annotations) != 1:
        raise DataError("okvqa: give one question file, and the file of answers that belongs to it as --annotations")
    answers = _answers(source.annotations[0])
    drafts = list(_drafts(source, answers))
    asked = {question.id for _, question in drafts}
    extra = sum(name not in asked for name in answers)
    notes = (f"{extra} annotations belong to no question of {source.questions[0]}",) if extra else ()
    return collect("okvqa", drafts, source, notes)


def _object(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: the file is {type(content).__name__}; the VQA challenge's files are objects")
    return content


def _answers(path: Path) -> dict[str, tuple[str, ...]]:
    """All annotators' answers by question."""
    found = {}
    for where, row in entries(path, _object(path).get("annotations"), "annotations"):
        name, given = need(row, where, "question_id", "answers")
        if not isinstance(given, list) or len(given) < 2:
            raise DataError(f"{where}: question {name} has answers {given!r}; the metric needs two annotators at least")
        found[str(name)] = tuple(_answer(one, where) for one in given)
    return found


def _answer(given: Any, where: str) -> str:
    if not isinstance(given, Mapping):
        raise DataError(f'{where}: an annotator\'s answer is {given!r}; it should be {{"answer": ...}}')
    return str(need(given, where, "answer")[0])


def _drafts(source: Source, answers: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Question]]:
    path = source.questions[0]
    content = _object(path)
    subtype = content.get("data_subtype", "val2014")
    without = []
    for where, row in entries(path, content.get("questions"), "questions"):
        name, image, question = need(row, where, "question_id", "image_id", "question")
        if str(name) not in answers:
            without.append(f"{name} ({where})")
            continue
        images = (Named((f"COCO_{subtype}_{_coco(image, where)}", _coco(image, where))),)
        meta = {"language": source.language}
        text = words(question, where, "question")
        yield where, Question(str(name), text, images, answers[str(name)], str(subtype), "open", (), meta)
    if without:
        raise DataError(
            f"{source.annotations[0]}: no annotation of question {some(without)}; the files do not belong together"
        )


def read_a(source: Source) -> QuestionSet:
    """A-OKVQA: `aokvqa_v1p0_val.json`, a list of objects, for its direct answers.

    Images are COCO's of 2017 by their bare file name, or of 2014. Choices stay in `meta`: the questions are open here.

    Args:
      source: of the files.

    Raises:
      DataError: a row lacks a key; the test split has no direct_answers.
    """
    return collect("aokvqa", _direct(source), source)


def _direct(source: Source) -> Iterator[tuple[str, Question]]:
    for where, row in rows(source.questions):
        name, image, question, answers = need(row, where, "question_id", "image_id", "question", "direct_answers")
        if isinstance(answers, str) or len(answers) < 2:
            raise DataError(f"{where}: direct_answers {answers!r}; the metric needs two annotators at least")
        split = str(row.get("split") or "val")
        bare = _coco(image, where)
        names = (bare, f"COCO_val2014_{bare}", f"COCO_train2014_{bare}")
        kept = ("choices", "correct_choice_idx", "difficult_direct_answer")
        meta = {"language": source.language} | {key: row[key] for key in kept if key in row}
        given = tuple(words(one, where, "direct_answers") for one in answers)
        text = words(question, where, "question")
        yield where, Question(str(name), text, (Named(names),), given, split, "open", (), meta)


def _coco(image: Any, where: str) -> str:
    """The twelve digits of a COCO image's file name."""
    if isinstance(image, bool) or not str(image).isdigit():
        raise DataError(f"{where}: image_id is {image!r}; it should be a number of COCO")
    return f"{int(image):012d}"
