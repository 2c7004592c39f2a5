"""Knowledge items: a text with images, from JSON-lines files; what a memory bank encodes and an index finds."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jaxmem.data.records import JsonlRecords
from jaxmem.errors import DataError

SHOWN = 10  # how many of several faults a message names
_FORM = '{"id": "...", "text": "...", "image": "path"}'


@dataclasses.dataclass(frozen=True)
class Item:
    """One piece of knowledge, or one question to look knowledge up for.

    Attributes:
      id: a name that no other item has.
      text: the description, "<title>: <description>" where there is a title; may be empty beside an image.
      images: what `jaxmem.data.images.load_image` reads; may be none beside a text.
    """

    id: str
    text: str
    images: tuple[Any, ...] = ()


class Items(Protocol):
    """Anything with a length and an index that holds items: a list, an ItemFile."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Item `index`; DataError when it cannot be used."""
        ...


class ItemFile(JsonlRecords):
    """A file with one item per line, read by line on demand.

    A line is {"id": text, "text" or "description": text, "title": text, "image": path or "images": [paths]}, where
    title and images may be missing or null, and the text too where there is an image. Other keys are ignored.
    Relative image paths are relative to the folder of the file.

    A missing text (null, or the NaN that pandas writes) is empty, never the word "nan"; a text that is that word is
    refused, because a missing value was written as text.

    Args:
      path: the file.

    Attributes:
      ids: of every line, None where a line has none; reading that line says why.
      fingerprint: SHA-256 of the file's bytes.

    Raises:
      DataError: the file cannot be read or holds no item, or several lines have the same id.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            super().__init__(path)
        except DataError as error:
            if error.__cause__ is not None:
                raise
            raise DataError(f"the item file {path} is empty; it should have one {_FORM} per line") from None
        self.ids = tuple(self._scanned())
        self._rows: dict[str, int] = {}
        doubled = []
        for row, name in enumerate(self.ids):
            if name is not None and self._rows.setdefault(name, row) != row:
                doubled.append(f"{name!r} (lines {self._lines[self._rows[name]]} and {self._lines[row]})")
        if doubled:
            raise DataError(f"{path}: every item needs an id of its own; found twice: {some(doubled)}")

    def _scanned(self) -> Iterator[str | None]:
        """The id of every line in turn."""
        with open(self.path, "rb") as file:
            for start, size in self._starts:
                file.seek(start)
                try:
                    record = json.loads(file.read(size))
                except ValueError:
                    record = None
                name = record.get("id") if isinstance(record, dict) else None
                yield name if isinstance(name, str) and name else None

    def __getitem__(self, index: int) -> Item:  # pyrefly: ignore[bad-override]
        """Item `index`; DataError with file and line when it is not an item."""
        return _item(self.line(index), self.name(index), self.path.parent)

    def find(self, ids: Sequence[str]) -> list[Item]:
        """The items of these ids, in their order; DataError that names those the file does not have."""
        if missing := [repr(name) for name in ids if name not in self._rows]:
            raise DataError(f"{self.path}: no item with the id {some(missing)}")
        return [self[self._rows[name]] for name in ids]


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _item(record: Any, where: str, folder: Path) -> Item:
    """A line's object as an item; DataError when it is not one."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: an item is {_FORM}, got {type(record).__name__}")
    if not isinstance(record.get("id"), str) or not _words(record, "id", where).strip():
        raise DataError(f"{where}: id is {record.get('id')!r}; give a text that no other item has")
    if record.get("text") is not None and record.get("description") is not None:
        raise DataError(f"{where}: has both text and description; keep one of them")
    title, body = (_words(record, key, where).strip() for key in ("title", "text"))
    body = body or _words(record, "description", where).strip()
    images = tuple(_located(path, folder) for path in _images(record, where))
    if not body and not images:
        raise DataError(f"{where}: neither text nor image; an item needs one of them at least")
    return Item(record["id"], f"{title}: {body}" if title and body else title or body, images)


def _words(record: Mapping[str, Any], key: str, where: str) -> str:
    """A text of the record, "" where it is missing."""
    value = record.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {value!r}; give a text")
    if key != "id" and value.strip().lower() == "nan":
        raise DataError(f"{where}: {key} is the word {value!r}, a missing value written as text; write null instead")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {key} holds half a character (a lone surrogate); write the text as UTF-8")
    return value


def _images(record: Mapping[str, Any], where: str) -> list[str]:
    """The image sources of a record."""
    one, several = record.get("image"), record.get("images")
    if one is not None and several is not None:
        raise DataError(f"{where}: has both image and images; put all of them into images")
    paths = [one] if one is not None else [] if several is None else several
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{where}: image is one path and images a list of paths, got {paths if one is None else one!r}")
    return paths


def _located(value: str, folder: Path) -> str:
    """An address with a scheme (data:, https:) stays; a path is joined to the folder unless it is absolute."""
    return value if value.startswith("data:") or "://" in value else os.path.join(folder, value)


def digest(item: Item) -> str:
    """What identifies an item's content: SHA-256 over its id, its text and its images' bytes.

    Nothing is decoded: a file counts as its bytes, which are the same in a data URI. PIL images and arrays, which
    have no such bytes, count as their pixels.

    Raises:
      DataError: an image cannot be read.
    """
    parts = [item.id.encode(errors="surrogatepass"), item.text.encode(errors="surrogatepass")]
    parts += [_content(image, f"item {item.id!r}, image {at}") for at, image in enumerate(item.images, 1)]
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _content(source: Any, where: str) -> bytes:
    """SHA-256 of an image's bytes."""
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).digest()
    if isinstance(source, np.ndarray):
        return hashlib.sha256(f"{source.dtype} {source.shape} ".encode() + source.tobytes()).digest()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).digest()
    if isinstance(source, str) and source[:5].lower() == "data:":
        return hashlib.sha256(_from_uri(source, where)).digest()
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"{where}: cannot read {type(source).__name__}; see jaxmem.data.images.load_image")
    try:
        with open(os.fspath(source).removeprefix("file://"), "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{where}: cannot read {os.fspath(source)[:300]!r} ({error.strerror})") from None


def _from_uri(uri: str, where: str) -> bytes:
    """The bytes of a data URI."""
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except ValueError:
        raise DataError(f"{where}: the data URI is not valid base64") from None
