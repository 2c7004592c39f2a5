"""MRAG-Bench (arXiv 2410.08182): choices A to D, from Parquet with images inside or JSON lines with their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import need, rows, words
from jaxmem.evaluation.knowledge.pictures import Named
from jaxmem.evaluation.knowledge.questions import LETTERS, Question, QuestionSet, Source, collect

_OPTIONS = LETTERS[:4]
_KEPT = ("aspect", "scenario", "image_type", "source")
_COLUMNS = ("id", "question", *_OPTIONS, "answer_choice", "answer", "image", *_KEPT)


def read(source: Source, gold_images: bool = False) -> QuestionSet:
    """The questions of MRAG-Bench's files, `scenario` as their split.

    A row has id, question, A, B, C, D, answer_choice (the letter) and image. The benchmark's own examples, gt_images,
    are left in the file unless asked for: CoMEM's numbers are about knowledge from elsewhere.

    Args:
      source: of the files.
      gold_images: keep gt_images as `meta["gold_images"]`.

    Raises:
      DataError: a row lacks a key, its letter is none of A to D, or its answer is not the letter's text.
    """
    return collect("mrag", _drafts(source, gold_images), source)


def _drafts(source: Source, gold_images: bool) -> Iterator[tuple[str, Question]]:
    columns = (*_COLUMNS, "gt_images") if gold_images else _COLUMNS
    for where, row in rows(source.questions, columns):
        name, question, letter, image = need(row, where, "id", "question", "answer_choice", "image")
        options = tuple(
            words(option, where, label) for label, option in zip(_OPTIONS, need(row, where, *_OPTIONS), strict=True)
        )
        letter = str(letter).strip().upper()
        if letter not in tuple(_OPTIONS):
            raise DataError(f"{where}: answer_choice is {row['answer_choice']!r}; it should be A, B, C or D")
        text = options[_OPTIONS.index(letter)]
        if row.get("answer") is not None and str(row["answer"]).strip() != text:
            raise DataError(f"{where}: answer {row['answer']!r} is not the text of choice {letter}, {text!r}")
        meta: dict[str, Any] = {"language": "en"} | {key: row[key] for key in _KEPT if row.get(key) is not None}
        if gold_images:
            meta["gold_images"] = tuple(picture(one, where) for one in need(row, where, "gt_images")[0])
        asked = words(question, where, "question")
        split = str(row.get("scenario") or "all")
        yield where, Question(str(name), asked, (picture(image, where),), (letter,), split, "choice", options, meta)


def picture(image: Any, where: str) -> Any:
    """An image as a row stores it: a path, or {"bytes": ..., "path": ...} as Hugging Face's data sets do.

    Raises:
      DataError: it is neither.
    """
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return dict(image)
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: image is {type(image).__name__}; it should be a file's name or its bytes")
    return Named((image,))
