"""Fills a memory bank with items, shard by shard, so that a killed build goes on where it was.

The items that a bank lacks are cut, in their order, into stretches of `shard_items`; each stretch becomes one new
shard. A rejected item keeps its place in its stretch, so that shards hold the same items however often a build is
killed and resumed: the resumed bank equals an undisturbed one byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxmem.data.items import Item, Items, digest, some
from jaxmem.data.records import name_of
from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files, shards
from jaxmem.retrieval.bank import Encoder, check_encoder, missing
from jaxmem.retrieval.shards import REJECTED, Layout, Rejected, Shard

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
      items: in the bank now.
      added: of the given items, encoded now.
      present: of the given items, in the bank before.
      rejected: of the given items, not in the bank, with reasons.
    """

    items: int
    added: int
    present: int
    rejected: tuple[Rejected, ...]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One of the given items: its index there, what identifies it, and why it cannot be used, if that is so."""

    index: int
    record: str
    id: str | None
    digest: str = ""
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What a rejection is remembered by: a record without an id by its name, an item by its content."""
        return (self.record, "") if self.id is None else (self.id, self.digest)

    def rejected(self, reason: str = "") -> Rejected:
        """This item as a rejected one."""
        return Rejected(self.record, self.id, self.digest, reason or self.reason)


def build(
    folder: str | Path,
    items: Items,
    encoder: Encoder,
    *,
    dtype: str = shards.BFLOAT16,
    shard_items: int = 1024,
    batch: int = 16,
    on_error: str = "stop",
    progress: Progress | None = None,
) -> Built:
    """Makes a bank of items, or goes on with one that was begun.

    Args:
      folder: of the bank; made when missing.
      items: anything with a length and an index, such as an ItemFile. All contents are read once at first.
      encoder: makes the embeddings.
      dtype: "bfloat16", or "int8" for half the bytes and an error of up to 1/254 of an embedding's largest entry.
      shard_items: items per shard; what a kill can lose.
      batch: items per call of the encoder.
      on_error: "stop" at items that cannot be used, or "skip" them and write them to `rejected.jsonl`. A later build
        tries an item again only when its content changed.
      progress: called with (items done, items) after every shard.

    Returns:
      Counts, and the rejected items.

    Raises:
      DataError: a bank of another encoder, template, dtype or shard size; items with the same id; an item of the bank
        that changed; unusable items (with "stop"); a full disk; another process at work on the folder.
      ConfigError: an impossible setting, or an encoder whose result has other sizes than it says.
    """
    folder = Path(folder)
    layout = Layout(encoder.latents, encoder.width, dtype, encoder.digest, encoder.template, shard_items)
    with files.locked(folder):
        if not (folder / shards.BANK).exists():
            shards.write_layout(folder, layout)
        known = shards.read_layout(folder)
        check_encoder(folder, known, encoder)
        for name in ("dtype", "shard_items"):
            if getattr(known, name) != getattr(layout, name):
                raise DataError(
                    f"bank {folder} was made with {name} {getattr(known, name)}, this build asks for "
                    f"{getattr(layout, name)}; build another folder"
                )
        return _fill(folder, known, items, encoder, batch, on_error, progress)


def add(
    folder: str | Path,
    items: Items,
    encoder: Encoder,
    *,
    batch: int = 16,
    on_error: str = "stop",
    progress: Progress | None = None,
) -> Built:
    """Appends the items that a bank does not have yet, in new shards; the others are counted as present.

    Arguments, result and errors are those of `build`; DataError too when there is no bank.
    """
    folder = Path(folder)
    check_encoder(folder, shards.read_layout(folder), encoder)
    with files.locked(folder):
        return _fill(folder, shards.read_layout(folder), items, encoder, batch, on_error, progress)


def _fill(
    folder: Path,
    layout: Layout,
    items: Items,
    encoder: Encoder,
    batch: int,
    on_error: str,
    progress: Progress | None,
) -> Built:
    """Encodes what the bank lacks; the lock is held."""
    if on_error not in ("stop", "skip") or batch < 1:
        raise ConfigError(f'on_error is "stop" or "skip" and batch at least 1, got {on_error!r} and {batch}')
    shards.clear_uncommitted(folder, layout)
    complete = list(shards.read_shards(folder, layout))
    held = {name: mark for shard in complete for name, mark in zip(shard.ids, shard.digests, strict=True)}
    tried = {(one.id or one.record, one.digest): one.reason for shard in complete for one in shard.rejected}
    entries = _scanned(folder, items, held)
    absent = [entry for entry in entries if entry.id not in held]
    rejected = [entry.rejected(tried[entry.key]) for entry in absent if entry.key in tried]
    todo = [entry for entry in absent if entry.key not in tried]
    _stop(on_error, rejected + [entry.rejected() for entry in entries if entry.reason])
    _note(folder, complete)
    added = 0
    for start in range(0, len(todo), layout.shard_items):
        stretch = todo[start : start + layout.shard_items]
        vectors, good, bad = _encoded(encoder, layout, items, stretch, batch)
        _stop(on_error, bad)
        marks = [(entry.id or "", entry.digest) for entry in good]
        complete.append(shards.write_shard(folder, layout, _free(complete), vectors, marks, bad))
        added += len(good)
        rejected += bad
        if bad:
            _note(folder, complete)
        if progress is not None:
            progress(len(entries) - len(todo) + start + len(stretch), len(entries))
    _note(folder, complete)
    return Built(sum(len(shard.ids) for shard in complete), added, len(entries) - len(absent), tuple(rejected))


def _scanned(folder: Path, items: Items, held: dict[str, str]) -> list[_Entry]:
    """Reads every item once; DataError when two have the same id, or one is in the bank with another content."""
    entries, rows, doubled, changed = [], {}, [], []
    names = getattr(items, "ids", None)
    for index in range(len(items)):
        record, item = name_of(items, index), None
        try:
            item = items[index]
            if not isinstance(item, Item):
                raise DataError(f"{record}: a {type(item).__name__}, not an Item")
            entry = _Entry(index, record, item.id, digest(item))
        except DataError as error:
            entry = _Entry(index, record, names[index] if names else getattr(item, "id", None), "", str(error))
        entries.append(entry)
        if entry.id is None:
            continue
        if rows.setdefault(entry.id, record) != record:
            doubled.append(f"{entry.id!r} ({rows[entry.id]} and {record})")
        if entry.digest and held.get(entry.id, entry.digest) != entry.digest:
            changed.append(f"{entry.id!r} ({record})")
    if doubled:
        raise DataError(f"every item needs an id of its own; found twice: {some(doubled)}")
    if changed:
        raise DataError(
            f"bank {folder} holds other contents under the ids of changed items: {some(changed)}; give the new "
            "versions ids of their own, or build another folder"
        )
    return entries


def _stop(on_error: str, rejected: Sequence[Rejected]) -> None:
    """Raises DataError that names the rejected items, unless they are to be skipped."""
    if rejected and on_error == "stop":
        shown = some([one.reason if one.record in one.reason else f"{one.record}: {one.reason}" for one in rejected])
        raise DataError(
            f"{len(rejected)} items cannot be used: {shown}. Put them right and run the same again, or leave them out "
            f'with on_error "skip", which writes them to {REJECTED}'
        )


def _encoded(
    encoder: Encoder, layout: Layout, items: Items, stretch: Sequence[_Entry], batch: int
) -> tuple[np.ndarray, list[_Entry], list[Rejected]]:
    """Embeddings [n, M, D] of the good items of a stretch in its order, these items, and the others."""
    reasons = {at: entry.reason for at, entry in enumerate(stretch) if entry.reason}
    sound: dict[int, Item] = {}
    sizes: dict[int, int] = {}
    for at, entry in enumerate(stretch):
        if at in reasons:
            continue
        try:
            sound[at] = items[entry.index]
            sizes[at] = encoder.size(sound[at]) if hasattr(encoder, "size") else 0  # pyrefly: ignore
        except DataError as error:
            reasons[at] = str(error)
            sound.pop(at, None)
    order = sorted(sound, key=sizes.__getitem__)
    vectors = np.zeros((len(stretch), layout.latents, layout.width), _kept(layout))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        reasons |= _encode_into(vectors, encoder, rows, [sound[at] for at in rows])
    good = [at for at in range(len(stretch)) if at not in reasons]
    bad = [stretch[at].rejected(reasons[at]) for at in sorted(reasons)]
    return vectors[good], [stretch[at] for at in good], bad


def _kept(layout: Layout) -> np.dtype:
    """In what dtype embeddings wait to be written."""
    return np.dtype(ml_dtypes.bfloat16) if layout.dtype == shards.BFLOAT16 else np.dtype(np.float32)


def _encode_into(vectors: np.ndarray, encoder: Encoder, rows: Sequence[int], items: Sequence[Item]) -> dict[int, str]:
    """Encodes one batch into its rows; where that fails, every item alone. Returns the rows that cannot be used."""
    try:
        found = np.asarray(encoder.encode(items))
    except DataError as error:
        if len(items) == 1:
            return {rows[0]: str(error)}
        alone = [_encode_into(vectors, encoder, [row], [item]) for row, item in zip(rows, items, strict=True)]
        return {row: reason for one in alone for row, reason in one.items()}
    wanted = (len(items), *vectors.shape[1:])
    if found.shape != wanted or found.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise ConfigError(f"the encoder made {found.dtype} {found.shape}, expected floating numbers {wanted}")
    vectors[list(rows)] = found.astype(np.float32)
    finite = [bool(np.isfinite(vectors[row].astype(np.float32)).all()) for row in rows]
    return {row: "its embeddings are not finite" for row, fine in zip(rows, finite, strict=True) if not fine}


def _free(complete: Sequence[Shard]) -> int:
    """The lowest number that no shard has: that of a shard which was deleted because it was damaged, or the next."""
    taken = {shard.number for shard in complete}
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _note(folder: Path, complete: Sequence[Shard]) -> None:
    """Writes `rejected.jsonl` anew from the shards; without rejected items there is none."""
    lines = [json.dumps({"record": one.record, "id": one.id, "reason": one.reason}) for one in missing(complete)]
    if lines:
        files.commit(folder / REJECTED, [("\n".join(lines) + "\n").encode()])
    else:
        (folder / REJECTED).unlink(missing_ok=True)
