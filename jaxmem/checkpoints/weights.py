"""Folders of safetensors: opening them without reading, and writing them one tensor at a time, all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxmem.checkpoints.table import View, size
from jaxmem.distributed import hosts
from jaxmem.errors import CheckpointError

SINGLE, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_LENGTH = 8  # bytes at the start of a safetensors file, which say how long its header is
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def report(where: Any, groups: Mapping[str, Sequence[str]], advice: str, limit: int = 8) -> None:
    """Raises one CheckpointError that counts every group with entries and names the first; without entries, returns."""
    lines = []
    for title, entries in groups.items():
        shown = ", ".join(entries[:limit]) + (f", ... ({len(entries) - limit} more)" if len(entries) > limit else "")
        lines += [f"  {title} ({len(entries)}): {shown}"] if entries else []
    if lines:
        raise CheckpointError("\n".join([f"{where}: cannot be used", *lines, advice]))


def open_weights(folder: str | Path, ignore: str | None = None) -> dict[str, View]:
    """Name to View of every tensor in a folder's `model.safetensors`, else in the shards of its index.

    Args:
      folder: of a checkpoint.
      ignore: regular expression; tensors whose names match anywhere are left out, whatever their type.

    Raises:
      CheckpointError: no weights, or only pickled ones; an unreadable or missing shard; a tensor that is not where
        the index puts it; a number format other than float32, float16 and bfloat16.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE, ignore)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    places: dict[str, str] = read_json(folder / INDEX).get("weight_map") or {}
    shards = sorted(set(places.values()))
    report(
        folder,
        {
            f"shards in {INDEX} that are not plain file names": [name for name in shards if Path(name).name != name],
            f"missing shards that {INDEX} names": [name for name in shards if not (folder / name).is_file()],
        },
        "Download the folder again.",
    )
    files = {shard: open_file(folder / shard, ignore) for shard in shards}
    places = {name: shard for name, shard in places.items() if not _matches(ignore, name)}
    absent = [f"{name} (in {shard})" for name, shard in places.items() if name not in files[shard]]
    report(folder, {f"tensors that {INDEX} seeks in the wrong shard": absent}, "Do index and shards belong together?")
    unlisted = {name: tensor for file in files.values() for name, tensor in file.items() if name not in places}
    return {name: files[shard][name] for name, shard in places.items()} | unlisted


def _matches(pattern: str | None, name: str) -> bool:
    """Does a name match anywhere?"""
    return pattern is not None and re.search(pattern, name) is not None


def _no_weights(folder: Path) -> str:
    """Why a folder without `model.safetensors` and index cannot be read."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder}: holds {', '.join(shards[:3])} but no {INDEX}; download the index again"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are "
            "opened; convert them to safetensors (transformers: save_pretrained) and load that folder"
        )
    return f"{folder}: no weights; expected {SINGLE} or {INDEX}"


def open_file(path: Path, ignore: str | None = None) -> dict[str, View]:
    """Name to View of every tensor in one safetensors file, but those that `ignore` names, as in `open_weights`.

    Raises CheckpointError naming the file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks the header, and that tensors fill the file
            content = np.memmap(path, np.uint8, mode="r")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or not a safetensors file ({error})") from error
    start = _LENGTH + int.from_bytes(content[:_LENGTH].tobytes(), "little")
    header = json.loads(content[_LENGTH:start].tobytes())
    about = {name: entry for name, entry in header.items() if name != "__metadata__" and not _matches(ignore, name)}
    odd = [f"{name} ({entry['dtype']})" for name, entry in about.items() if entry["dtype"] not in DTYPES]
    report(path, {"tensors of an unsupported type": odd}, f"Supported: {', '.join(DTYPES)}; dequantise first.")
    return {name: _file_view(content[start:], entry) for name, entry in about.items()}


def _file_view(content: np.ndarray, entry: Mapping[str, Any]) -> View:
    """A tensor in a mapped file, by its entry in the header; only the box that is asked for is ever read."""
    begin, end = entry["data_offsets"]
    tensor = content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return View(tensor.shape, tensor.dtype, lambda box: tensor[box])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(folder: Path, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when it does not.

    Of several hosts that run the same block, the first alone writes; what the others stage vanishes.

    Args:
      folder: made when it does not exist.
      replaced: patterns of old files that go just before the new ones arrive.
    """
    if not hosts.first():
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)
        return
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield stage
        for pattern in replaced:
            for old in folder.glob(pattern):
                old.unlink()
        for file in sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


SHOWN = 1_000_000_000
"""From so many bytes on, reading and writing show their progress on a terminal."""


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes on standard error, if that is a terminal and there are many; yields how to move it on."""
    if total < SHOWN or not hosts.first():
        yield lambda count: None
        return
    from rich import progress as rich  # heavy: only where there is something to wait for
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TimeRemainingColumn(),
    )
    out = Console(stderr=True)
    with rich.Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def write_file(
    path: Path, tensors: Iterable[tuple[str, View]], advance: Callable[[int], None] = lambda count: None
) -> None:
    """Writes one safetensors file; one tensor at a time is on the host. Hosts other than the first only read along.

    `advance` is told the bytes of every tensor that was written.
    """
    names = {dtype: kind for kind, dtype in DTYPES.items()}
    tensors = sorted(tensors, key=lambda item: -jnp.dtype(item[1].dtype).itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + size(tensor)
        header[name] = {"dtype": names[jnp.dtype(tensor.dtype)], "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if not hosts.first():
        for _, tensor in tensors:
            tensor.read()
        return
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in tensors:
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
            advance(size(tensor))
        file.flush()
        os.fsync(file.fileno())


def write_weights(folder: Path, tensors: Iterable[tuple[str, View]], max_shard_size: int) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes (or one tensor) and their index."""
    shards: list[list[tuple[str, View]]] = [[]]
    room = max_shard_size
    for name, tensor in tensors:
        if shards[-1] and size(tensor) > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append((name, tensor))
        room -= size(tensor)
    total, places = sum(size(tensor) for shard in shards for _, tensor in shard), {}
    with progress(f"writing {folder.name}", total) as advance:
        if len(shards) == 1:
            return write_file(folder / SINGLE, shards[0], advance)
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(folder / file, shard, advance)
            places |= {name: file for name, _ in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
