"""Where training rows come from: anything with a length and an index; here, JSON-lines files of chats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError

_SAMPLED = 1000


class JsonlRecords(Sequence[dict[str, Any]]):
    """A file with one `{"messages": [...]}` object per line, read by line on demand.

    Only the places of the lines are kept in memory. Blank lines are skipped. Relative image paths are relative to
    the folder of the file.

    Args:
      path: the file.

    Attributes:
      fingerprint: SHA-256 of the file's bytes.

    Raises:
      DataError: the file cannot be read or holds no record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._starts, self._lines = Path(path), [], []
        digest, place = hashlib.sha256(), 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        self._starts.append((place, len(line)))
                        self._lines.append(number)
                    place += len(line)
        except OSError as error:
            raise DataError(f"cannot read the dataset {self.path}: {error.strerror}") from error
        if not self._starts:
            raise DataError(f'the dataset {self.path} is empty; it should have one {{"messages": [...]}} per line')
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    def name(self, index: int) -> str:
        """file:line of a record."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyrefly: ignore[bad-override]
        """Record `index`; DataError with file and line when it is not a chat."""
        start, size = self._starts[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(size)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
            raise DataError(f'{self.name(index)}: a record is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
        return record | {"messages": [_located(message, self.path.parent) for message in record["messages"]]}


def _located(message: Any, folder: Path) -> Any:
    """The message with relative image paths made relative to `folder`; anything odd is left for the encoder."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_located_part(part, folder) for part in message["content"]]}


def _located_part(part: Any, folder: Path) -> Any:
    """One part of a message: an image's path, or the paths of a video's frames."""
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("image"), str):
        return part | {"image": _path(part["image"], folder)}
    if isinstance(part.get("video"), list):
        return part | {"video": [_path(frame, folder) if isinstance(frame, str) else frame for frame in part["video"]]}
    return part


def _path(value: str, folder: Path) -> str:
    """An address with a scheme (data:, https:) stays; a path is joined to the folder unless it is absolute."""
    return value if value.startswith("data:") or "://" in value else os.path.join(folder, value)


def name_of(source: Any, index: int) -> str:
    """How messages call record `index`: file and line where the source knows them."""
    return source.name(index) if hasattr(source, "name") else f"row {index}"


def messages_of(record: Any) -> list[dict[str, Any]]:
    """The chat of a record: a list of messages, `{"messages": ...}`, or an object with `.messages`.

    Raises:
      DataError: it is none of these.
    """
    if isinstance(record, dict) and "messages" in record:
        return record["messages"]
    messages = getattr(record, "messages", record)
    if not isinstance(messages, list):
        raise DataError(f'a record is a list of messages or {{"messages": [...]}}, got {type(record).__name__}')
    return messages


def fingerprint(source: Any) -> str:
    """What tells one dataset from another: its own fingerprint, its settings, or a hash of up to 1,000 records."""
    if hasattr(source, "fingerprint"):
        return source.fingerprint
    if dataclasses.is_dataclass(source):
        text = repr(source)
    else:
        chosen = range(0, len(source), max(1, len(source) // _SAMPLED))
        text = json.dumps([len(source), *(source[i] for i in chosen)], default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()
