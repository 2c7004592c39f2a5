"""How a memory bank lies on the disk.

    bank.json               what all shards share
    shard_00000.bin         embeddings [n, M, D], little-endian: bfloat16, or int8
    shard_00000.scale.bin   int8 only: [n, M] float32, one scale per embedding
    shard_00000.json        ids and digests of the n items, what was rejected, checksums
    rejected.jsonl          what was rejected, from all shards, for people

A shard's JSON file is written last: a shard without it does not exist. The bytes depend on the items and the encoder
alone. Axis letters: M embeddings of an item, D their width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files

FORMAT, BANK, REJECTED = 1, "bank.json", "rejected.jsonl"
BFLOAT16, INT8 = "bfloat16", "int8"
ADVICE = "delete the shard's files and run the same build again; the other shards stay"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all shards of a bank share; the content of `bank.json`.

    Attributes:
      latents: M.
      width: D.
      dtype: "bfloat16", or "int8" with one float32 scale per embedding.
      encoder: digest of the weights that made the embeddings.
      template: digest of how items were written as tokens.
      shard_items: items per shard, rejected ones included.
    """

    latents: int
    width: int
    dtype: str
    encoder: str
    template: str
    shard_items: int

    def __post_init__(self) -> None:
        if self.dtype not in (BFLOAT16, INT8):
            raise ConfigError(f"a bank's dtype is {BFLOAT16} or {INT8}, got {self.dtype!r}")
        if wrong := [name for name in ("latents", "width", "shard_items") if getattr(self, name) < 1]:
            raise ConfigError(f"a bank's {' and '.join(wrong)} must be at least 1")

    @property
    def parts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Suffix, dtype and shape per item of a shard's arrays."""
        if self.dtype == BFLOAT16:
            return {"bin": (np.dtype("<u2"), (self.latents, self.width))}
        return {
            "bin": (np.dtype("i1"), (self.latents, self.width)),
            "scale.bin": (np.dtype("<f4"), (self.latents,)),
        }

    @property
    def item_bytes(self) -> int:
        """Bytes of one item's embeddings on the disk."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An item that could not be encoded.

    Attributes:
      record: file and line, or the row.
      id: None where the record had none.
      digest: of its content; "" where that could not be read.
      reason: what is wrong with it.
    """

    record: str
    id: str | None
    digest: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard, without its arrays; the content of its JSON file.

    Attributes:
      number: its place among the shards.
      ids: of its n items, in their order.
      digests: of their contents.
      rejected: items of the same stretch that are not in it.
      sha256: of its arrays' bytes, by suffix.
    """

    number: int
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    sha256: dict[str, str]


def write_layout(folder: Path, layout: Layout) -> None:
    """Writes `bank.json`."""
    files.commit_json(folder / BANK, {"format": FORMAT, **dataclasses.asdict(layout)})


def read_layout(folder: Path) -> Layout:
    """What `bank.json` says; DataError when it is missing, damaged or of a later format."""
    content = files.read_json(folder / BANK, "memory bank")
    if content.get("format") != FORMAT:
        raise DataError(f"{folder}: a bank of format {content.get('format')!r}, this version reads {FORMAT}")
    names = [field.name for field in dataclasses.fields(Layout)]
    if missing := [name for name in names if name not in content]:
        raise DataError(f"{folder / BANK}: {', '.join(missing)} is missing; this memory bank is damaged")
    return Layout(**{name: content[name] for name in names})


def path(folder: Path, number: int, suffix: str) -> Path:
    """The name of a shard's file."""
    return folder / f"shard_{number:05d}.{suffix}"


def pack(layout: Layout, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """[n, M, D] bfloat16 or float32 -> the arrays of a shard by suffix."""
    if layout.dtype == BFLOAT16:
        return {"bin": np.ascontiguousarray(vectors.astype(ml_dtypes.bfloat16)).view(np.uint16).astype("<u2")}
    values, scales = quantise(vectors.astype(np.float32))
    return {"bin": values, "scale.bin": scales.astype("<f4")}


def unpack(layout: Layout, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The inverse of `pack`: arrays of some items -> [n, M, D] bfloat16."""
    if layout.dtype == BFLOAT16:
        return arrays["bin"].astype(np.uint16).view(ml_dtypes.bfloat16)
    return (arrays["bin"].astype(np.float32) * arrays["scale.bin"][..., None]).astype(ml_dtypes.bfloat16)


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., D] float32 -> [..., D] int8 and [...] float32: value = int8 * scale, wrong by half a scale at most.

    The scale is the largest magnitude of the vector / 127.
    """
    scales = (np.abs(vectors).max(-1) / 127).astype(np.float32)
    divisors = np.where(scales > 0, scales, 1)[..., None]
    return np.clip(np.rint(vectors / divisors), -127, 127).astype(np.int8), scales


def write_shard(
    folder: Path,
    layout: Layout,
    number: int,
    vectors: np.ndarray,
    entries: Sequence[tuple[str, str]],
    rejected: Sequence[Rejected],
) -> Shard:
    """Writes the arrays of a shard and then, as its commit, its JSON file.

    Args:
      folder: of the bank.
      layout: of the bank.
      number: of the shard.
      vectors: [n, M, D].
      entries: id and digest of the n items.
      rejected: what the shard stands for but does not hold.

    Raises:
      DataError: the disk is full or cannot be written to; nothing of the shard is left behind.
    """
    try:
        sums = {
            suffix: files.commit(path(folder, number, suffix), [array.reshape(-1).view(np.uint8).data])
            for suffix, array in pack(layout, vectors).items()
        }
        shard = Shard(number, tuple(i for i, _ in entries), tuple(d for _, d in entries), tuple(rejected), sums)
        files.commit_json(path(folder, number, "json"), _as_json(shard))
    except DataError:
        for suffix in layout.parts:
            path(folder, number, suffix).unlink(missing_ok=True)
        raise
    return shard


def _as_json(shard: Shard) -> dict[str, Any]:
    """A shard's JSON, which ends with a checksum of itself."""
    content = {name: value for name, value in dataclasses.asdict(shard).items() if name != "number"}
    return content | {"index_sha256": _sum(content)}


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_shards(folder: Path, layout: Layout) -> Iterator[Shard]:
    """The complete shards by number.

    Raises:
      DataError: a shard whose JSON file is damaged or whose arrays are missing or of another size.
    """
    for file in sorted(folder.glob("shard_[0-9]*.json"), key=lambda file: int(file.stem.partition("_")[2])):
        shard = _read(file)
        for suffix, size in sizes(layout, len(shard.ids)).items():
            array = path(folder, shard.number, suffix)
            found = array.stat().st_size if array.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes where {size:,} belong"
                raise DataError(f"{array} {state}; {ADVICE}")
        yield shard


def sizes(layout: Layout, items: int) -> dict[str, int]:
    """Bytes of a shard's arrays by suffix."""
    return {name: items * dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in layout.parts.items()}


def _read(file: Path) -> Shard:
    """A shard's JSON file; DataError when it is damaged."""
    content = files.read_json(file, "shard")
    known = content.pop("index_sha256", None)
    if known != _sum(content):
        raise DataError(f"{file} is damaged (its checksum differs); {ADVICE}")
    rejected = tuple(Rejected(**entry) for entry in content["rejected"])
    number = int(file.stem.partition("_")[2])
    return Shard(number, tuple(content["ids"]), tuple(content["digests"]), rejected, content["sha256"])


def clear_uncommitted(folder: Path, layout: Layout) -> None:
    """Removes temporaries, and arrays without a JSON file; only for the holder of the lock."""
    files.clear(folder, (BANK, REJECTED, "shard_*"))
    for suffix in layout.parts:
        for array in folder.glob(f"shard_[0-9]*.{suffix}"):
            number = int(array.name.partition("_")[2].partition(".")[0])
            if not path(folder, number, "json").is_file():
                array.unlink(missing_ok=True)
