"""ViQuAE (Lerner et al., SIGIR 2022): questions about named entities, with the aliases that TriviaQA accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import listed, need, rows, words
from jaxmem.evaluation.knowledge.pictures import Named
from jaxmem.evaluation.knowledge.questions import Question, QuestionSet, Source, collect


def read(source: Source) -> QuestionSet:
    """The questions of ViQuAE's files: JSON lines in KILT's form, or the same rows as Parquet.

    A row has id, input, image (a file name) and output with the accepted answers; `original_answer` counts as one.

    Args:
      source: of the files.

    Raises:
      DataError: a row lacks a key or has no answer.
    """
    return collect("viquae", _kilt(source), source)


def _kilt(source: Source) -> Iterator[tuple[str, Question]]:
    for where, row in rows(source.questions):
        name, question, image, output = need(row, where, "id", "input", "image", "output")
        outputs = output if isinstance(output, list) else [output]
        if not outputs or not all(isinstance(one, Mapping) for one in outputs):
            raise DataError(f'{where}: output is {output!r}; it should be {{"answer": [...], "original_answer": ...}}')
        given: list[Any] = [one["original_answer"] for one in outputs if one.get("original_answer")]
        for one in outputs:
            aliases = one.get("answer") or []
            given += aliases if isinstance(aliases, list) else [aliases]
        meta = {"language": source.language, "wikidata_id": row.get("wikidata_id")}
        answers = listed(given, where, "output")
        picture = Named((image,)) if isinstance(image, str) else image
        text = words(question, where, "input")
        yield where, Question(str(name), text, (picture,), answers, "all", "open", (), meta)
