"""Files that are whole or not there: written beside their place, forced onto the disk, then renamed.

Whoever kills the process at any moment finds the old file, the new one, or none, and at most a temporary one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxmem.errors import DataError

PARTIAL, LOCK = ".partial", ".lock"


def commit(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Writes a file, all of it or nothing; returns the SHA-256 of its bytes.

    Raises:
      DataError: the disk is full or cannot be written to; nothing is left behind.
    """
    partial, total = path.with_name(path.name + PARTIAL), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                write(file, chunk)
                total.update(chunk)
        settle(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {reason(error)}") from error
    return total.hexdigest()


def settle(partial: Path, path: Path) -> None:
    """Gives a file that is written its final name, once its bytes are on the disk; may raise OSError."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def commit_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON in the order of its keys, all of it or nothing."""
    commit(path, [(json.dumps(content, indent=1) + "\n").encode()])


def append(path: Path, start: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Puts bytes behind the first `start` of a file, which an interrupted writer may have made longer.

    Raises:
      DataError: the disk is full or cannot be written to; the first `start` bytes are as they were.
    """
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in chunks:
                write(file, chunk)
            file.flush()
            os.fsync(file.fileno())
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, start)
        raise DataError(f"cannot write {path}: {reason(error)}") from error


def write(file: BinaryIO, chunk: bytes | memoryview) -> None:
    """The one place where bytes go to the disk."""
    file.write(chunk)


def reason(error: OSError) -> str:
    """What went wrong and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk; what was there before is whole, so free space and run the same again"
    return f"{error.strerror or error}"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      DataError: no such file, or not an object; names the file as `what`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; this folder is no {what}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); this {what} is damaged") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object; this {what} is damaged")
    return content


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear(folder: Path, names: Iterable[str]) -> None:
    """Removes what killed writers of these files (patterns) left half-written; only for the holder of the lock."""
    for left in [left for name in names for left in folder.glob(name + PARTIAL)]:
        left.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's own to write to; the claim ends with the process, however that ends.

    Raises:
      DataError: another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {reason(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is writing to it; wait until that one has ended") from None
        yield


def _sync(folder: Path) -> None:
    """Forces the names in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
