"""OVEN (arXiv 2302.11154): questions of the query and the entity set, and the Wikipedia titles that answers map to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import need, rows, words
from jaxmem.evaluation.knowledge.pictures import Named
from jaxmem.evaluation.knowledge.questions import Question, QuestionSet, Source, collect

SETS, SIGHT = ("query", "entity"), ("unseen", "seen")
SPLITS = ("query_seen", "query_unseen", "entity_seen", "entity_unseen")
_TITLE_KEYS = (("wikidata_id", "wikipedia_title"), ("entity_id", "entity_text"), ("id", "content"), ("id", "title"))


def read(source: Source) -> QuestionSet:
    """The questions of OVEN's files; give both sets to get the final score.

    A row has data_id (older files: id), image_id, question, entity_id, entity_text and data_split. Seen or unseen is
    read from data_split, the set from data_split, the id or the file's name, whichever names it first.
    `source.annotations` are files of titles, which `titles` reads.

    Args:
      source: of the files.

    Raises:
      DataError: a row lacks a key, or its split cannot be told.
    """
    return collect("oven", _drafts(source), source)


def _drafts(source: Source) -> Iterator[tuple[str, Question]]:
    for where, row in rows(source.questions):
        name, image, question, entity, split = need(
            {"data_id": row["id"], **row} if "id" in row else row,
            where,
            "data_id",
            "image_id",
            "question",
            "entity_id",
            "data_split",
        )
        meta = {"language": source.language, "entity_id": entity, "entity_text": row.get("entity_text")}
        text, images = words(question, where, "question"), (Named((str(image),)),)
        answers = (words(entity, where, "entity_id"),)
        place = _split(str(split), str(name), where)
        yield where, Question(str(name), text, images, answers, place, "entity", (), meta)


def _split(split: str, name: str, where: str) -> str:
    """One of SPLITS."""
    sight = next((word for word in SIGHT if split.endswith(word)), None)
    file = Path(where.rpartition(":")[0] or where).name
    which = next((word for text in (split, name, file) for word in SETS if word in text), None)
    if sight is None or which is None:
        raise DataError(
            f"{where}: data_split {split!r} and id {name!r} do not say which split this is; data_split should be like "
            '"query_val_seen" or "entity_val_unseen"'
        )
    return f"{which}_{sight}"


def titles(paths: tuple[Path, ...]) -> list[tuple[str, str]]:
    """(entity id, title) of Wikipedia's entities, in the files' order.

    Args:
      paths: JSON lines with wikidata_id and wikipedia_title (`Wiki6M_ver_1_0_title_only.jsonl`), entity_id and
        entity_text, or id and content.

    Raises:
      DataError: a row without such keys, or no file.
    """
    if not paths:
        raise DataError("oven: answers map to Wikipedia's titles; give the file of titles as --annotations")
    return [_title(row, where) for where, row in rows(paths)]


def _title(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    for entity, title in _TITLE_KEYS:
        if row.get(entity) is not None and row.get(title) is not None:
            return str(row[entity]), str(row[title])
    keys = " or ".join(" with ".join(pair) for pair in _TITLE_KEYS)
    raise DataError(f"{where}: no title of an entity here; a row has {keys}")
