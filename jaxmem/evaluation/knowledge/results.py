"""A result file: one JSON line per question, and beside it a JSON file with every setting and the summary.

One file has the answers of one setting. Going on after a crash asks what is missing and nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.questions import Question
from jaxmem.evaluation.knowledge.scoring import VERSION

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that an answer depends on.

    Attributes:
      benchmark: its name.
      condition: one of `conditions.CONDITIONS`.
      model: which one answers, e.g. its folder and a digest of its weights.
      k: items per question; 0 for none.
      order: of the items, "rank" or "reversed".
      template: of the prompts, `prompts.Template.record`.
      decode: how text is generated: temperature, top_p, repetition_penalty, max_new_tokens, seed.
      split_sizes: questions by split.
      questions: `digest` of what is asked.
      memory: which memory's weights; None without one.
      bank_size, bank_digest: how many items there are to retrieve from, and which; None without a bank.
      index: which index finds them.
      seed: of the shuffled condition.
      scorers: version of the metrics.
      extra: anything else that changes answers.
    """

    benchmark: str
    condition: str
    model: str
    k: int
    order: str
    template: Mapping[str, Any]
    decode: Mapping[str, Any]
    split_sizes: Mapping[str, int]
    questions: str
    memory: str | None = None
    bank_size: int | None = None
    bank_digest: str | None = None
    index: str | None = None
    seed: int = 0
    scorers: int = VERSION
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def digest(questions: Iterable[Question]) -> str:
    """Tells sets of questions apart: by ids, words, choices, answers, splits and languages, in order."""
    said = [[q.id, q.text, q.choices, q.answers, q.split, q.kind, q.language] for q in questions]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


class Results:
    """The answers of one setting, on disk.

    A line that a crash cut off is removed, or ended where only its line break is missing.

    Args:
      path: of the JSON lines; settings and summary go to the same name with `.json`.
      settings: what the answers depend on.

    Attributes:
      rows: all lines, in order; `add` appends to them.
      repaired: what was done to the last line, "" when nothing.

    Raises:
      ConfigError: the file has answers of other settings; says which differ.
      DataError: the file is no result file, has a broken line, or a question twice.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path, self.header = Path(path), Path(path).with_suffix(".json")
        if self.path == self.header:
            raise ConfigError(f"{path}: answers go to a .jsonl file, the .json beside it is for settings and summary")
        self.settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
        self.repaired = ""
        self._check_header()
        self.rows = self._read()
        self.ids = self._ids()

    def _check_header(self) -> None:
        """Compares the settings on disk with ours, or writes ours."""
        if not self.header.is_file():
            if self.path.is_file() and self.path.stat().st_size:
                raise DataError(f"{self.path}: has answers but no {self.header.name} with their settings; move it away")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write_header(None)
            return
        try:
            kept = json.loads(self.header.read_text(encoding="utf-8"))
            there, version = kept["settings"], kept["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.header}: not the settings of a result file; move it away") from error
        if version != FORMAT:
            raise DataError(
                f"{self.header}: format {version}, this version writes {FORMAT}; take another output folder"
            )
        if differing := _differences(there, self.settings):
            raise ConfigError(
                f"{self.path} has answers of other settings: {'; '.join(differing)}; take another output folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """All lines, the last one repaired."""
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        rows = [self._row(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1)]
        if rest:
            rows += self._repair(rest, len(data) - len(rest))
        return rows

    def _repair(self, rest: bytes, start: int) -> list[dict[str, Any]]:
        """Ends or removes a last line without a line break."""
        try:
            row = self._row(rest, "")
        except DataError:
            os.truncate(self.path, start)
            self.repaired = f"{self.path}: the last line was cut off and is removed; its question is asked again"
            return []
        with open(self.path, "ab") as file:
            file.write(b"\n")
        self.repaired = f"{self.path}: the last line had no end and is ended"
        return [row]

    def _row(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row["id"], str) and isinstance(row["metrics"], dict):
                return row
        except (ValueError, KeyError):
            pass
        raise DataError(f"{where}: not an answer of an evaluation; remove the line, and its question is asked again")

    def _ids(self) -> set[str]:
        seen: dict[str, int] = {}
        for number, row in enumerate(self.rows, 1):
            if row["id"] in seen:
                raise DataError(f"{self.path}:{number}: question {row['id']} is on line {seen[row['id']]} already")
            seen[row["id"]] = number
        return set(seen)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines; DataError when one's question is there already."""
        names = [row["id"] for row in rows]
        if again := [name for at, name in enumerate(names) if name in self.ids or name in names[:at]]:
            raise DataError(f"{self.path}: question {again[0]} is answered already")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += [dict(row) for row in rows]
        self.ids.update(names)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary beside the settings."""
        self._write_header(summary)

    def _write_header(self, summary: Mapping[str, Any] | None) -> None:
        content = {"format": FORMAT, "settings": self.settings, "summary": summary}
        temporary = self.header.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.header)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """ "name: theirs, not ours" of every setting that differs."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name} is {there.get(name)!r}, not {here.get(name)!r}" for name in names]
