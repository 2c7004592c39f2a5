"""Rows of unequal length to a padded `Batch` whose shape comes from a short list, so that few programs compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmem.backbones.batch import Batch
from jaxmem.data.example import PER_TOKEN, Example
from jaxmem.errors import ConfigError, DataError

_OPTIONAL = ("prefix_rows", "query_rows", "visual_taps", "visual_weights", "question")
_PER_PATCH = (
    "patches",
    "patch_segments",
    "patch_coords",
    "patch_table",
    "patch_weights",
    "patch_windows",
    "patch_images",
)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The lengths that batches may have.

    Attributes:
      tokens: allowed T, ascending.
      patches: allowed P per row, ascending, each rounded up to whole visual tokens or tiles of the backbone; a batch
        without patches has P = 0 and needs no bucket.
      items: allowed numbers of knowledge items per row, ascending.
      item_tokens, item_patches: allowed lengths of an item; empty is those of a row.
      query_tokens: allowed lengths of a query, which an encoder of its own reads; empty is those of a row.
    """

    tokens: tuple[int, ...] = tuple(64 * 2**k for k in range(10))
    patches: tuple[int, ...] = tuple(64 * 2**k for k in range(11))
    items: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 30, 50, 100)
    item_tokens: tuple[int, ...] = ()
    item_patches: tuple[int, ...] = ()
    query_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "patches", "items", "item_tokens", "item_patches", "query_tokens"):
            lengths = tuple(getattr(self, name))
            if name.startswith(("item_", "query_")) and not lengths:
                lengths = getattr(self, name.partition("_")[2])
            if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
                raise ConfigError(f"buckets.{name} must be positive and ascending, got {lengths}")
            object.__setattr__(self, name, lengths)

    def fit_tokens(self, count: int, where: str = "a row") -> int:
        """The shortest T that holds `count` tokens; ValueError when none does."""
        return _fit(count, self.tokens, "tokens", where, "shorten the text, lower max_pixels or add a longer bucket")

    def fit_patches(self, count: int, where: str = "a row") -> int:
        """The shortest P that holds `count` patches, 0 for none; ValueError when none does."""
        advice = "lower max_pixels, use fewer images or add a longer bucket"
        return _fit(count, self.patches, "patches", where, advice) if count else 0

    @property
    def of_items(self) -> Buckets:
        """The lengths that items may have."""
        return Buckets(self.item_tokens, self.item_patches)

    @property
    def of_queries(self) -> Buckets:
        """The lengths that queries may have."""
        return Buckets(self.query_tokens, self.patches)


def _fit(count: int, lengths: tuple[int, ...], what: str, where: str, advice: str) -> int:
    """The first of `lengths` that is at least `count`."""
    for length in lengths:
        if length >= count:
            return length
    raise DataError(f"{where} has {count} {what} and the longest bucket is {lengths[-1]}: {advice}")


def collate(
    examples: Sequence[Example],
    buckets: Buckets | None = None,
    pad_token: int = 0,
    padding: str = "right",
    blind: Sequence[bool] | np.ndarray | None = None,
) -> Batch:
    """Pads rows to the shortest buckets that hold them all.

    Args:
      examples: B rows of one processor.
      buckets: allowed lengths; `Buckets()` when None.
      pad_token: id that fills the token padding.
      padding: side of the token padding, "right" (training) or "left" (generation). Patches pad on the right always.
      blind: [B] rows whose text cannot attend to visual keys in the backbone; none when None.

    Returns:
      A Batch of numpy arrays; padding has segment 0, position 0 and no loss.

    Raises:
      DataError: no rows, rows of different patch widths, a row over the longest bucket, or a bad `padding`/`blind`.
    """
    if not examples:
        raise DataError("a batch needs at least one row")
    if padding not in ("right", "left"):
        raise DataError(f"padding must be 'right' or 'left', got {padding!r}")
    buckets = buckets or Buckets()
    width, patches = _shape(examples, buckets)
    starts = [width - len(row) if padding == "left" else 0 for row in examples]
    fill = PER_TOKEN | {"tokens": pad_token}
    fields: dict[str, Any] = {
        name: _stack([getattr(row, name) for row in examples], starts, width, fill[name])
        for name in fill
        if name not in _OPTIONAL
    }
    for name in ("visual_taps", "visual_weights", "question"):
        if any(getattr(row, name) is not None for row in examples):
            fields[name] = _stack([_or_plain(row, name) for row in examples], starts, width, fill[name])
    for name in _PER_PATCH:
        if getattr(examples[0], name) is not None:
            fields[name] = _stack_patches([getattr(row, name) for row in examples], patches)
    segments = _stack([np.ones(len(row), np.int32) for row in examples], starts, width, 0)
    fields |= _prefixes(examples, buckets, starts, width) | _queries(examples, buckets, starts, width)
    return Batch(segments=segments, blind=_blind(blind, len(examples)), **fields)


def _or_plain(row: Example, name: str) -> np.ndarray:
    """A field that other rows have, for a row that needs none: each token shows its one visual row."""
    if (value := getattr(row, name)) is not None:
        return value
    if name == "question":
        raise DataError("some rows mark their question and some do not: encode them with one processor")
    shape = (4, len(row))
    if name == "visual_weights":
        return np.broadcast_to(np.eye(4, 1, dtype=np.float32), shape)
    return np.broadcast_to(np.maximum(row.visual_rows, 0), shape)


def _prefixes(examples: Sequence[Example], buckets: Buckets, starts: list[int], width: int) -> dict[str, Any]:
    """What stands in front of the prompts: where, and the vectors or the items that they come from."""
    if all(row.prefix_rows is None for row in examples):
        return {}
    if any(row.items for row in examples) and any(row.vectors is not None for row in examples):
        raise DataError("some rows bring knowledge items and some their vectors; encode the items of all, or of none")
    places = [_absent(row) if row.prefix_rows is None else row.prefix_rows for row in examples]
    found: dict[str, Any] = {"prefix_rows": _stack(places, starts, width, -1)}
    if any(row.items for row in examples):
        return found | {"items": _items(examples, buckets)}
    given = [row.vectors for row in examples if row.vectors is not None]
    size = max(len(vectors) for vectors in given)
    rows = np.zeros((len(examples), size, given[0].shape[-1]), given[0].dtype)
    for row, example in zip(rows, examples, strict=True):
        if example.vectors is not None:
            row[: len(example.vectors)] = example.vectors
    return found | {"vectors": rows}


def _absent(row: Example) -> np.ndarray:
    """[T] int32: no token of the row stands for a vector."""
    return np.full(len(row), -1, np.int32)


def _queries(examples: Sequence[Example], buckets: Buckets, starts: list[int], width: int) -> dict[str, Any]:
    """What an encoder of its own reads of the prompts, leaves [B, ...], and where its states stand."""
    if all(row.query is None for row in examples):
        return {}
    queries = [row.query for row in examples if row.query is not None]
    if len(queries) < len(examples):
        raise DataError("some rows bring a query for the encoder and some do not: encode them with one model")
    places = [_absent(row) if row.query_rows is None else row.query_rows for row in examples]
    return {"query_rows": _stack(places, starts, width, -1), "query": collate(queries, buckets.of_queries)}


def _items(examples: Sequence[Example], buckets: Buckets) -> Batch:
    """The items of all rows, leaves [B, K, ...]; rows with fewer have items of padding behind theirs.

    They may be of another vocabulary than the rows, so their padding is token 0, which every vocabulary has.
    """
    most = max(range(len(examples)), key=lambda i: len(examples[i].items))
    advice = "give it fewer items or add a larger number to buckets.items"
    count = _fit(len(examples[most].items), buckets.items, "items", f"row {most}", advice)
    first = next(item for row in examples for item in row.items)
    cut = {name: getattr(first, name)[:0] for name in _PER_PATCH if getattr(first, name) is not None}
    empty = dataclasses.replace(first.upto(0), **cut, images=())
    flat = [item for row in examples for item in (*row.items, *[empty] * (count - len(row.items)))]
    batch = collate(flat, buckets.of_items)
    return jax.tree.map(lambda leaf: leaf.reshape((len(examples), count, *leaf.shape[1:])), batch)


def widen(
    batch: Batch,
    tokens: int,
    patches: int,
    items: tuple[int, int, int] = (0, 0, 0),
    query: tuple[int, int] = (0, 0),
) -> Batch:
    """The batch with token and patch axes padded on the right to given lengths: the same rows in a larger bucket.

    Args:
      batch: numpy arrays.
      tokens, patches: T and P.
      items: number, T and P of the items; for a batch with items alone.
      query: T and P of the queries; for a batch with queries alone.
    """

    def padded(name: str, axis: int, length: int, fill: int) -> np.ndarray:
        leaf = np.asarray(getattr(batch, name))
        width = [(0, 0)] * leaf.ndim
        width[axis] = (0, length - leaf.shape[axis])
        return np.pad(leaf, width, constant_values=fill)

    per_token = (PER_TOKEN | {"segments": 0}).items()
    fields: dict[str, Any] = {
        name: padded(name, -1, tokens, fill) for name, fill in per_token if getattr(batch, name) is not None
    }
    if batch.items is not None:
        fields["items"] = _widen_items(batch.items, *items)
    if batch.query is not None:
        fields["query"] = widen(batch.query, *query)
    held = [name for name in _PER_PATCH if getattr(batch, name) is not None]
    fields |= {name: padded(name, 1, patches, 0) for name in held}
    return dataclasses.replace(batch, **fields)


def _widen_items(items: Batch, count: int, tokens: int, patches: int) -> Batch:
    """Items [B, K, ...] in a larger bucket: longer ones, and more of them, the further ones of padding."""
    rows, had = items.tokens.shape[:2]
    flat = widen(jax.tree.map(lambda leaf: leaf.reshape(rows * had, *leaf.shape[2:]), items), tokens, patches)
    back = jax.tree.map(lambda leaf: leaf.reshape(rows, had, *leaf.shape[1:]), flat)
    more = lambda leaf: np.pad(leaf, ((0, 0), (0, count - had), *((0, 0),) * (leaf.ndim - 2)))  # noqa: E731
    return dataclasses.replace(
        jax.tree.map(more, back),
        visual_rows=np.concatenate([back.visual_rows, np.full((rows, count - had, tokens), -1, np.int32)], axis=1),
    )


def _shape(examples: Sequence[Example], buckets: Buckets) -> tuple[int, int]:
    """(T, P) of the batch; checks that the rows belong together."""
    dims = {row.patches.shape[1] for row in examples}
    if len(dims) > 1:
        raise DataError(f"rows have patches of different lengths {sorted(dims)}: encode them with one processor")
    if len({row.patch_windows is None for row in examples}) > 1:
        raise DataError("some rows have attention windows and some have none: encode them with one processor")
    units = {row.unit for row in examples if len(row.patches)}
    if len(units) > 1:
        raise DataError(f"rows merge {sorted(units)} patches into a visual token: encode them with one processor")
    width = max(buckets.fit_tokens(len(row), f"row {i}") for i, row in enumerate(examples))
    patches = max(buckets.fit_patches(len(row.patches), f"row {i}") for i, row in enumerate(examples))
    unit = min(units, default=1)
    return width, -(-patches // unit) * unit


def _stack(rows: list[np.ndarray], starts: list[int], width: int, fill: int) -> np.ndarray:
    """[B, ..., width] with row i at starts[i] on the last axis."""
    out = np.full((len(rows), *rows[0].shape[:-1], width), fill, rows[0].dtype)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        out[i, ..., start : start + row.shape[-1]] = row
    return out


def _stack_patches(rows: list[np.ndarray], count: int) -> np.ndarray:
    """[B, count, ...] with zeros behind each row's patches."""
    out = np.zeros((len(rows), count, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _blind(blind: Sequence[bool] | np.ndarray | None, rows: int) -> np.ndarray:
    """[B] bool."""
    values = np.zeros(rows, bool) if blind is None else np.asarray(blind, bool)
    if values.shape != (rows,):
        raise DataError(f"blind has shape {values.shape}, the batch has {rows} rows")
    return values
