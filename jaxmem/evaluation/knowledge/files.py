"""Rows of JSON lines, JSON and Parquet, each with the words by which errors call it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError, DataError

_SHOWN = 8


def rows(paths: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of several files, as (file and row, row).

    Args:
      paths: `.parquet`, `.json` with a list of objects, anything else as JSON lines; a folder stands for the Parquet
        files in it, by name.
      columns: of Parquet files, read only these, where they exist.

    Raises:
      DataError: a file cannot be read, or a row is no object.
      ConfigError: Parquet without pyarrow.
    """
    for path in _files(paths):
        if path.suffix == ".parquet":
            yield from _parquet(path, columns)
        elif path.suffix == ".json":
            yield from entries(path, read_json(path))
        else:
            yield from _lines(path)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: the folder has no .parquet file; name the files themselves")
        yield from inside


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def entries(path: Path, listed: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list in a JSON file, as (file and place, object); `key` is where the list stands."""
    if not isinstance(listed, list):
        raise DataError(f"{path}: {key or 'the file'} is {type(listed).__name__}, not a list of objects")
    for at, row in enumerate(listed, 1):
        where = f"{path}, {key} entry {at}" if key else f"{path}, entry {at}"
        yield where, _object(row, where)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        return _object(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install 'jaxmem[parquet]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=known):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object with named values, got {type(row).__name__}")
    return row


def need(row: Mapping[str, Any], where: str, *keys: str) -> list[Any]:
    """The values of keys that a row has to have; others may be there too.

    Raises:
      DataError: one of them is missing or null; names all that are, and the keys that are there.
    """
    if missing := [key for key in keys if row.get(key) is None]:
        raise DataError(f"{where}: lacks {', '.join(missing)}; the row has {', '.join(map(str, row)) or 'nothing'}")
    return [row[key] for key in keys]


def words(value: Any, where: str, key: str) -> str:
    """A text that has to say something; numbers become their digits. DataError else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r}; it should be a text")
    return value.strip()


def listed(value: Any, where: str, key: str) -> tuple[str, ...]:
    """A list of texts, or one text, without repetitions; DataError when it is neither or empty."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given:
        raise DataError(f"{where}: {key} is empty; it should name at least one answer")
    return tuple(dict.fromkeys(words(one, where, key) for one in given))


def some(names: Sequence[str]) -> str:
    """Up to eight names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
