"""Some rows of a batch of continuations, picked out, worked on and put back, each part of the batch on its devices.

Axis letters: B prompts, G continuations of each, P parts of the batch that stay on their devices, w rows picked of each
part, W = P * w.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.distributed.mesh import ROWS, ways


@dataclasses.dataclass(frozen=True, eq=False)
class Pick:
    """w rows of each of P parts of a batch of B * G continuations.

    Attributes:
      order: [P, w] int32 rows within their part, G for each of its prompts.
      live: [P, w] bool; the others only fill up.
      group: G.
      prompts: [W] int32 prompts of the rows.
    """

    order: Array
    live: Array
    group: int
    prompts: Array

    def take(self, leaf: Array) -> Array:
        """[B, G, ...] -> [W, ...]."""
        found = jax.vmap(lambda part, prompt: part[prompt])(self._parts(leaf), self.order // self.group)
        found, member = found.reshape(-1, *leaf.shape[1:]), (self.order % self.group).reshape(-1)
        if ways("sequence") == 1 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.vmap(lambda row, at: row[at])(found, member)
        # Members lie on the devices of the sequence: a sum sends one of them, where an index would gather all.
        here = jnp.arange(self.group) == member[:, None]
        here = here.reshape(*here.shape, *(1,) * (found.ndim - 2))
        return jnp.sum(jnp.where(here, found, jnp.zeros((), leaf.dtype)), axis=1, dtype=leaf.dtype)

    def put(self, leaf: Array, new: Array) -> Array:
        """[B, G, ...] with the live rows of new [W, ...] in their places."""
        parts = self._parts(leaf)
        new = new.reshape(*self.order.shape, *leaf.shape[2:]).astype(leaf.dtype)
        if ways("sequence") > 1:
            return self._written_over(parts, new).reshape(leaf.shape)

        def one(part: Array, index: Array, live: Array, values: Array) -> Array:
            prompt = jnp.where(live, index // self.group, len(part))
            return part.at[prompt, index % self.group].set(values, mode="drop")

        return jax.vmap(one)(parts, self.order, self.live, new).reshape(leaf.shape)

    def _written_over(self, parts: Array, new: Array) -> Array:
        """parts [P, B / P, G, ...] with the live rows of new [P, w, ...]. An index would gather all members on every
        device of the sequence, so each device goes through its own."""
        places = jnp.arange(parts.shape[1] * self.group).reshape(1, -1, self.group)
        for nth in range(self.order.shape[1]):
            here = (places == self.order[:, nth, None, None]) & self.live[:, nth, None, None]
            here = here.reshape(*here.shape, *(1,) * (parts.ndim - 3))
            parts = jnp.where(here, new[:, nth, None, None], parts)
        return parts

    def _parts(self, leaf: Array) -> Array:
        """[B, G, ...] -> [P, B / P, G, ...]: prompts and members stay axes of their own, which a mesh cuts."""
        return leaf.reshape(self.order.shape[0], -1, *leaf.shape[1:])


def pick_rows(pending: Array, rows_at_once: int) -> Pick:
    """The first pending rows of every part; parts are those of the mesh, so that nothing leaves its device."""
    prompts, group = pending.shape
    parts = ways(*ROWS) if prompts % ways(*ROWS) == 0 else 1
    folded = pending.reshape(parts, -1)
    size = folded.shape[1]
    order = jnp.argsort(~folded, axis=1, stable=True)[:, : min(rows_at_once, size)]
    live = jnp.take_along_axis(folded, order, axis=1)
    rows = (jnp.arange(parts)[:, None] * size + order).reshape(-1)
    return Pick(order, live, group, rows // group)


def put_at(rows: Array, new: Array, start: Array, axis: int = 0) -> Array:
    """Puts new [W, ...] into rows [W, ...] from `start` [W] on, along an axis within a row; a new part without that
    axis takes one place."""
    if new.ndim < rows.ndim:
        new = jnp.expand_dims(new, axis + 1)
    put = lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, axis=axis)  # noqa: E731
    return jax.vmap(put)(rows, new.astype(rows.dtype), start)
