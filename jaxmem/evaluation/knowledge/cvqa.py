"""CVQA (arXiv 2406.05967): cultural questions in their own languages, with numbered options."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import need, rows, some, words
from jaxmem.evaluation.knowledge.mrag import picture
from jaxmem.evaluation.knowledge.questions import NUMBERS, Question, QuestionSet, Source, collect

LANGUAGES = {"Chinese": "zh", "Spanish": "es", "Russian": "ru", "Bulgarian": "bg", "Portuguese": "pt", "English": "en"}
COMEM = ("Chinese/China", "Spanish/Spain", "Russian/Russia", "Bulgarian/Bulgaria", "Portuguese/Brazil")
"""The five subsets that CoMEM reports (arXiv 2505.17670, table 4)."""
_KEPT = ("Category", "Image Type", "Image Source", "Translated Question", "Translated Options")
_COLUMNS = ("ID", "Question", "Options", "Label", "Subset", "image", "image_path", *_KEPT)


def read(source: Source, subsets: tuple[str, ...] = ()) -> QuestionSet:
    """The questions of CVQA's files, `Subset` as their split, e.g. "Chinese/China".

    A row has ID, Question, Options (texts, or such a list written as text), Label (the right one, from 0), Subset and
    image. The answer's label is the option's number, from 1. A language that prompts are not written in gets English
    ones; notes say which.

    Args:
      source: of the files.
      subsets: read only these; () reads all.

    Raises:
      DataError: a row lacks a key, its label is no option, its subset cannot be read; or a wanted subset is absent.
    """
    drafts = [draft for draft in _drafts(source) if not subsets or draft[1].split in subsets]
    here = {question.split for _, question in drafts}
    if absent := [subset for subset in subsets if subset not in here]:
        raise DataError(f"cvqa: the files have no question of {some(absent)}; give all of the benchmark's files")
    foreign = sorted({draft.meta["spoken"] for _, draft in drafts} - LANGUAGES.keys())
    notes = (f"prompts are in English for questions in {', '.join(foreign)}",) if foreign else ()
    return collect("cvqa", drafts, source, notes)


def _drafts(source: Source) -> Iterator[tuple[str, Question]]:
    for where, row in rows(source.questions, _COLUMNS):
        name, question, options, label, subset = need(row, where, "ID", "Question", "Options", "Label", "Subset")
        options = _texts(options, where, "Options")
        if not isinstance(label, int) or not 0 <= label < min(len(options), len(NUMBERS)):
            raise DataError(
                f"{where}: Label is {label!r}; it should be the place of one of {len(options)} options, from 0"
            )
        place = _texts(subset, where, "Subset")
        if len(place) != 2:
            raise DataError(f"{where}: Subset is {subset!r}; it should be a language and a country")
        spoken, country = place
        image = row.get("image") if row.get("image") is not None else row.get("image_path")
        if image is None:
            need(row, where, "image")
        meta: dict[str, Any] = {"language": LANGUAGES.get(spoken, "en"), "spoken": spoken}
        meta |= {key: row[key] for key in _KEPT if row.get(key) is not None}
        asked, answer = words(question, where, "Question"), (NUMBERS[label],)
        split = f"{spoken}/{country}"
        yield where, Question(str(name), asked, (picture(image, where),), answer, split, "choice", options, meta)


def _texts(value: Any, where: str, key: str) -> tuple[str, ...]:
    """A list of texts, given as such or written out in Python's notation."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise DataError(f"{where}: {key} is {value[:80]!r}; it should be a list of texts") from None
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: {key} is {value!r}; it should be a list of texts")
    return tuple(words(one, where, key) for one in value)
