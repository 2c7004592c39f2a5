"""Attention in windows of a frame (Qwen2.5-VL), at the cost of windows: patches stand in the order of their windows, so
that a window's patches are neighbours and a query needs only its own stretch of the row and the two beside it.

Axis letters: B rows, P patches, M visual tokens (cells of merge^2 patches), R patches of a whole window.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array


def by_window(windows: Array, unit: int) -> Array:
    """[B, M] the order of cells in which those of a window stand together, padding last.

    Args:
      windows: [B, P] int32 numbers of windows from 1, 0 for padding; the `unit` patches of a cell share one.
      unit: patches per cell.
    """
    cells = windows[:, ::unit]
    return jnp.argsort(jnp.where(cells > 0, cells, jnp.iinfo(jnp.int32).max), axis=1, stable=True)


def reorder(leaf: Array, order: Array, unit: int) -> Array:
    """[B, M * unit, ...] with its cells of `unit` entries in `order` [B, M]."""
    cells = leaf.reshape(*order.shape, unit, *leaf.shape[2:])
    index = order.reshape(*order.shape, *(1,) * (cells.ndim - 2))
    return jnp.take_along_axis(cells, index, axis=1).reshape(leaf.shape)


def attend_in_windows(windows: Array, reach: int) -> Callable[[Array, Array, Array], Array]:
    """Attention among the patches with the same number, each number's patches standing side by side.

    Args:
      windows: [B, P] int32.
      reach: R, the most patches that have a number (padding may have more; what it finds is read by none).

    Returns:
      (query, key, value), [B, P, N, H] each -> [B, P, N * H]; P * 3 R scores instead of P * P.
    """
    rows, length = windows.shape
    count = -(-length // reach)

    def cut(leaf: Array) -> Array:
        """[B, P, ...] -> [B, P / R, R, ...]; what fills the last stretch has number 0."""
        pad = jnp.pad(leaf, ((0, 0), (0, count * reach - length), *((0, 0),) * (leaf.ndim - 2)))
        return pad.reshape(rows, count, reach, *leaf.shape[2:])

    def around(leaf: Array, fill: int = 0) -> Array:
        """[B, P, ...] -> [B * P / R, 3 R, ...]: each stretch with its neighbours."""
        wide = jnp.pad(cut(leaf), ((0, 0), (1, 1), *((0, 0),) * (leaf.ndim - 1)), constant_values=fill)
        three = jnp.concatenate([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], axis=2)
        return three.reshape(rows * count, 3 * reach, *leaf.shape[2:])

    own = cut(windows).reshape(rows * count, reach)
    mask = own[:, :, None] == around(windows, -1)[:, None, :]

    def among(query: Array, key: Array, value: Array) -> Array:
        pieces = cut(query).reshape(rows * count, reach, *query.shape[2:])
        found = jax.nn.dot_product_attention(pieces, around(key), around(value), mask=mask[:, None])
        return found.reshape(rows, count * reach, -1)[:, :length]

    return among
