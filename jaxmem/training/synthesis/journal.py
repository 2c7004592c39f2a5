"""JSON lines that grow and survive: whoever kills the process loses at most what was being added."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError
from jaxmem.retrieval import files


class Journal:
    """A file of JSON lines; a last line without its end was cut off and is removed.

    Args:
      path: of the file; made with the first line.
      keys: that every line has; together they are its name, which no other line has.

    Attributes:
      rows: all lines by name, in order.

    Raises:
      DataError: a line that is none of this file's, by number.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole, end, _ = data.rpartition(b"\n")
        self._size = len(whole + end)
        if self._size < len(data):
            os.truncate(path, self._size)
        for number, line in enumerate(whole.split(b"\n") if end else (), 1):
            row = self._row(line, number)
            if self.name(row) in self.rows:
                raise DataError(f"{path}:{number}: {self.name(row)} stands on an earlier line already; remove the file")
            self.rows[self.name(row)] = row

    def name(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a line is called by."""
        return tuple(row[key] for key in self.keys)

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and all(key in row for key in self.keys):
                return row
        except ValueError:
            pass
        raise DataError(f"{self.path}:{number}: not a line of this file ({', '.join(self.keys)}); remove the file")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines and waits until they are on the disk; DataError when that is full."""
        data = encoded(rows)
        files.append(self.path, self._size, [data])
        self._size += len(data)
        self.rows |= {self.name(row): dict(row) for row in rows}


def encoded(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines as bytes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
