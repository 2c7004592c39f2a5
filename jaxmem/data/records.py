"""Where training rows come from: anything with a length and an index; here, JSON-lines files of chats or questions."""

from __future__ import annotations

import copy
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
    """A file with one object per line, read by line on demand: a chat or a question.

    A chat is {"messages": [...], columns...}; a list "images" fills its image parts without a source.
    A question is {"prompt": text, "image": path or "images": [paths], "answer": text, number or list, "id": ...,
    columns...}, where everything but the prompt may be missing or null. It becomes a chat of one user turn, images
    first, and one assistant turn with the (first) answer, or none without an answer. Its "answer" (None when missing)
    and "id" (the running number when missing) stay as columns, like every other key. A column "items" holds the
    knowledge items of a memory, {"text": ..., "image": path or "images": [paths]} each.

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

    def line(self, index: int) -> Any:
        """What line `index` holds; DataError with file and line when it is not JSON."""
        start, size = self._starts[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(size)
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: not JSON: {error}") from error

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyrefly: ignore[bad-override]
        """Record `index`; DataError with file and line when it is not a chat."""
        record = self.line(index)
        record = _as_chat(record, index, self.name(index))
        if isinstance(record.get("items"), list):
            record = record | {"items": [_located_item(item, self.path.parent) for item in record["items"]]}
        return record | {"messages": [_located(message, self.path.parent) for message in record["messages"]]}


def _as_chat(record: Any, index: int, where: str) -> dict[str, Any]:
    """A line's object as {"messages": [...], columns...}; DataError when it is neither a chat nor a question."""
    if not isinstance(record, dict) or not ("messages" in record or "prompt" in record):
        raise DataError(
            f'{where}: a record is {{"messages": [{{"role": ..., "content": ...}}, ...]}} or '
            '{"prompt": "...", "image": "path", "answer": "..."}'
        )
    if "messages" not in record:
        return _asked(record, index, where)
    if not isinstance(record["messages"], list) or not record["messages"]:
        raise DataError(f"{where}: messages is {record['messages']!r}; a chat is a list of messages, one at least")
    return _filled(record, where) if record.get("images") else record


def _asked(record: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    """The chat of a question (see `JsonlRecords`)."""
    if not isinstance(record["prompt"], str):
        raise DataError(f"{where}: prompt is {record['prompt']!r}; give a text, or a chat as messages")
    parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in _paths(record, where)]
    chat: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": record["prompt"]}]}]
    if (answer := _first_answer(record, where)) is not None:
        chat.append({"role": "assistant", "content": answer})
    columns = {key: value for key, value in record.items() if key not in ("prompt", "image", "images")}
    named = {"answer": None, **columns, "id": str(index) if columns.get("id") is None else columns["id"]}
    return named | {"messages": chat}


def _paths(record: dict[str, Any], where: str) -> list[str]:
    """The images of a question."""
    one, several = record.get("image"), record.get("images")
    if one is not None and several is not None:
        raise DataError(f"{where}: has both image and images; put all of them into images")
    paths = several if one is None else [one]
    if not isinstance(paths or [], list) or not all(isinstance(path, str) and path for path in paths or []):
        raise DataError(f"{where}: image is one path and images a list of paths, got {paths if one is None else one!r}")
    return paths or []


def _first_answer(record: dict[str, Any], where: str) -> str | None:
    """What the assistant is to say: the answer, or the first of several that are right; None without one."""
    answer = record.get("answer")
    given = answer if isinstance(answer, list) else [] if answer is None else [answer]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in given):
        raise DataError(f"{where}: answer is {answer!r}; give a text, a number or a list of these")
    return str(given[0]) if given else None


def _filled(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A chat whose image parts without a source take those of "images", in order; there must be as many.

    Where every image part has a source already, "images" is a column like others.
    """
    images, messages = record["images"], copy.deepcopy(record["messages"])
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    parts = [part for part in parts if part.get("type") in ("image", "image_url")]
    bare = [part for part in parts if not any(value for key, value in part.items() if key != "type")]
    if parts and not bare:
        return record
    if not isinstance(images, list) or len(images) != len(bare):
        found = f"{len(images)} images" if isinstance(images, list) else f"images {images!r}"
        raise DataError(
            f'{where}: {found} beside a chat with {len(bare)} parts {{"type": "image"}} without a source; images is a '
            "list with one path for each of these parts"
        )
    for part, image in zip(bare, images, strict=True):
        part["image"] = image
    return {key: value for key, value in record.items() if key != "images"} | {"messages": messages}


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


def _located_item(item: Any, folder: Path) -> Any:
    """A knowledge item with its images' paths made relative to `folder`."""
    if not isinstance(item, dict):
        return item
    one: dict[str, Any] = {"image": _path(item["image"], folder)} if isinstance(item.get("image"), str) else {}
    if isinstance(item.get("images"), list):
        one |= {"images": [_path(image, folder) if isinstance(image, str) else image for image in item["images"]]}
    return item | one


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


def items_of(record: Any) -> Sequence[Any]:
    """The knowledge items of a record, best first; none for most.

    Raises:
      DataError: "items" is not a list.
    """
    items = record.get("items") if isinstance(record, dict) else getattr(record, "items", None)
    if not isinstance(items or (), list | tuple):
        raise DataError(f'items is {items!r}; give a list of {{"text": ..., "image": path}}')
    return items or ()


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
