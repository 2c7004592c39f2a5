"""What all benchmarks have in common: a question, a set of them, and the choice of some of them by their ids."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.files import some
from jaxmem.evaluation.knowledge.pictures import Named, Pictures, check

ID_KEYS = ("id", "data_id", "question_id", "ID")
LETTERS, NUMBERS = "ABCDEFGH", "12345678"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
      id: unique in its benchmark.
      text: the words asked.
      images: sources that `jaxmem.data.images.load_image` reads; `Named` while their files are not looked up.
      answers: the right ones; the label ("B", "2") where there are choices, the gold range's ends where a number is
        asked.
      split: the group that is scored on its own.
      kind: "string", "time" or "numerical" of InfoSeek, "entity" of OVEN, "open", or "choice".
      choices: texts of the options, in order; () for an open question.
      meta: whatever else the row says. From the readers there are always "language" and "image_id", the name of the
        first image's file, None where the row holds the image itself.
    """

    id: str
    text: str
    images: tuple[Any, ...]
    answers: tuple[str, ...]
    split: str
    kind: str
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def language(self) -> str:
        """ISO 639-1 code of the words."""
        return self.meta.get("language", "en")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a benchmark's files are, and which questions to take.

    Attributes:
      questions: the question files, or folders with Parquet files.
      annotations: files that belong to them; which ones, each reader says.
      images: the folder of the images, searched with all its subfolders; None is the first question file's folder.
      subset: a file of ids (`read_ids`); None takes all.
      limit: the first so many of those; 0 takes all.
      language: of the words, where the files do not say.
    """

    questions: tuple[Path, ...]
    annotations: tuple[Path, ...] = ()
    images: Path | None = None
    subset: Path | None = None
    limit: int = 0
    language: str = "en"

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError("there is no question file; give one, or several where a benchmark has several")
        if self.limit < 0:
            raise ConfigError(f"limit {self.limit} is negative; it is a number of questions, 0 takes all")


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions in their file's order, and what the reader has to say about them."""

    name: str
    questions: tuple[Question, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many questions."""
        return len(self.questions)

    @property
    def split_sizes(self) -> dict[str, int]:
        """Questions by split, in order of appearance."""
        return dict(collections.Counter(question.split for question in self.questions))


def collect(
    name: str, drafts: Iterable[tuple[str, Question]], source: Source, notes: Sequence[str] = ()
) -> QuestionSet:
    """The chosen questions, with the files of their images.

    Args:
      name: of the benchmark.
      drafts: (file and row, question) with `Named` images.
      source: which of them, and the images' folder.
      notes: what the reader has to say.

    Raises:
      DataError: no question, two with one id, ids of the subset that no row has, or images without a file.
    """
    by_id: dict[str, tuple[str, Question]] = {}
    twice = []
    for where, draft in drafts:
        if draft.id in by_id:
            twice.append(f"{draft.id} ({by_id[draft.id][0]} and {where})")
        by_id.setdefault(draft.id, (where, draft))
    if twice:
        raise DataError(f"{name}: several rows have the same id: {some(twice)}; remove the copies")
    if not by_id:
        raise DataError(f"{name}: there is no question in {', '.join(map(str, source.questions))}")
    chosen = _chosen(name, by_id, source)
    pictures = Pictures(source.images or source.questions[0].parent)
    missing: list[str] = []
    found = tuple(_pictured(draft, where, pictures, missing) for where, draft in chosen)
    check(missing, len(found), pictures.folder)
    return QuestionSet(name, found, tuple(notes))


def _chosen(name: str, by_id: Mapping[str, tuple[str, Question]], source: Source) -> list[tuple[str, Question]]:
    """Those of the subset, in the questions' order, up to the limit."""
    wanted = by_id.keys()
    if source.subset is not None:
        ids = read_ids(source.subset)
        if unknown := [one for one in ids if one not in by_id]:
            raise DataError(f"{source.subset}: {name} has no question {some(unknown)}; the ids belong to other files")
        wanted = set(ids)
    kept = [pair for pair in by_id.values() if pair[1].id in wanted]
    return kept[: source.limit or None]


def _pictured(draft: Question, where: str, pictures: Pictures, missing: list[str]) -> Question:
    """The question with sources instead of names; names without a file are added to `missing`."""
    find = lambda image: pictures.source(image, where, missing)  # noqa: E731
    meta = dict(draft.meta)
    if "gold_images" in meta:
        meta["gold_images"] = tuple(find(image) for image in meta["gold_images"])
    named = next((image.names[0] for image in draft.images if isinstance(image, Named)), None)
    return dataclasses.replace(draft, images=tuple(map(find, draft.images)), meta=meta | {"image_id": named})


def read_ids(path: str | Path) -> tuple[str, ...]:
    """The ids of a file: a JSON list, or one per line, where a line may also be a JSON object with an id.

    Raises:
      DataError: the file cannot be read, is empty, names an id twice, or has an object without an id.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the ids in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            ids = [_id(value, f"{path}, entry {at}") for at, value in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(f"{path}: not JSON: {error}") from error
    else:
        lines = enumerate(text.split("\n"), 1)
        ids = [_id(_line(line.strip()), f"{path}:{at}") for at, line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path}: there is no id in it; give one per line, or a JSON list")
    if twice := [one for one, count in collections.Counter(ids).items() if count > 1]:
        raise DataError(f"{path}: named more than once: {some(twice)}")
    return tuple(ids)


def _line(line: str) -> Any:
    """A line that looks like an object as one; any other as it is."""
    if not line.startswith("{"):
        return line
    try:
        return json.loads(line)
    except ValueError:
        return line


def _id(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ID_KEYS if key in value), None)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise DataError(f"{where}: not an id; give a text, a number or an object with one of {', '.join(ID_KEYS)}")
    return str(value)
