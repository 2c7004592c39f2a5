"""Batches of the host to the devices of a mesh: which rows a host reads, and where they go.

Axis letters: G rows of a batch, A microbatches, B rows of one (G = A * B).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.backbones.batch import Batch
from jaxmem.data.batching import widen
from jaxmem.distributed import hosts
from jaxmem.distributed.mesh import ROWS, batch_shardings


def share_of(mesh: Mesh | None, rows: int, parts: int = 1) -> tuple[int, ...] | None:
    """Which of the G rows of a batch this host reads: those of its own devices. None with one host: all."""
    if mesh is None or hosts.count() == 1:
        return None
    each = rows // parts
    return tuple(part * each + row for part in range(parts) for row in _held(mesh, each))


def _held(mesh: Mesh, rows: int) -> list[int]:
    """Which of the B rows of a microbatch lie on devices of this host, ascending."""
    places = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in places if index for row in range(*index[0].indices(rows))})


def level(batch: Batch, what: str) -> Batch:
    """The batch in the largest bucket that a host chose for its rows: one shape, and so one program, on all hosts."""
    if hosts.count() == 1:
        return batch
    _, tokens, patches = batch.shape_key
    items = (0, 0, 0) if batch.items is None else (batch.items.tokens.shape[1:3] + batch.items.patches.shape[2:3])
    query = (0, 0) if batch.query is None else batch.query.shape_key[1:]
    lengths = (tokens, patches, *items, *query)
    tokens, patches, count, item_tokens, item_patches, *query = hosts.share(
        what, lengths, lambda shapes: tuple(max(column) for column in zip(*shapes, strict=True))
    )
    return widen(batch, tokens, patches, (count, item_tokens, item_patches), (query[0], query[1]))


def place(batch: Any, parts: int, mesh: Mesh | None, rows: int | None = None) -> Any:
    """[G, ...] on the host -> [A, B, ...] on the devices (`mesh.batch_shardings`).

    Args:
      batch: leaves [G, ...], or this host's share of them.
      parts: A.
      mesh: None is the default device.
      rows: G, where the batch is a share (`share_of`).
    """
    cut = lambda leaf: leaf.reshape((parts, len(leaf) // parts, *leaf.shape[1:]))  # noqa: E731
    stacked = jax.tree.map(lambda leaf: cut(np.asarray(leaf)), batch)
    if mesh is None or rows is None or hosts.count() == 1:
        return put(stacked, mesh, leading=1)
    position = {row: at for at, row in enumerate(_held(mesh, rows // parts))}

    def one(leaf: np.ndarray, whole: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            mine = [position[row] for row in range(*index[1].indices(whole.shape[1]))]
            return leaf[:, mine][(index[0], slice(None), *index[2:])]

        return jax.make_array_from_callback(whole.shape, sharding, piece)

    of_all = lambda leaf: jax.ShapeDtypeStruct((parts, rows // parts, *leaf.shape[2:]), leaf.dtype)  # noqa: E731
    whole = jax.tree.map(of_all, stacked)
    return jax.tree.map(one, stacked, whole, batch_shardings(mesh, whole, leading=1))


def put(batch: Any, mesh: Mesh | None, leading: int = 0) -> Any:
    """Host arrays [..., B, ...] to the devices; every host holds the whole batch and keeps its own part."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    make = lambda leaf, place: jax.make_array_from_callback(leaf.shape, place, leaf.__getitem__)  # noqa: E731
    return jax.tree.map(make, batch, batch_shardings(mesh, batch, leading))
