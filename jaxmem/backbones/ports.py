"""Ports: the only places where a memory touches a decoder. DeepStack, the backbone's own, uses the same door.

A port is a value: a static function, the layers it acts on, and what the function reads (parameters and per-prompt
state) stacked on a leading slot axis: slot s serves layers[s]. The decoder asks "has this layer a slot?" and knows
no paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.batch import Array


@flax.struct.dataclass
class Port:
    """A function beside or behind some decoder layers.

    Attributes:
      slots: pytree whose leaves have a leading axis of len(layers): parameters and per-prompt state.
      act: `act(slot, residual, normed) -> [B, T, D]`. Beside the FFN it returns what is added to the FFN's output,
        given the residual stream after attention and its normalised form; after a layer it returns the new residual
        stream, given the old one (`normed` is None).
      layers: 0-based decoder layers, one per slot.
      keep: beside the FFN only: `keep(slot, residual) -> pytree`, what later tokens must know of these ones; a pass
        over a prompt returns it per slot under `name`. None keeps nothing.
      name: of the memory that keeps something.
    """

    slots: Any
    act: Callable[[Any, Array, Array | None], Array] = flax.struct.field(pytree_node=False)
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
    keep: Callable[[Any, Array], Any] | None = flax.struct.field(pytree_node=False, default=None)
    name: str = flax.struct.field(pytree_node=False, default="")


@flax.struct.dataclass
class Ports:
    """All ports of one forward pass: branches beside the FFN, then rewrites after the layer."""

    beside_ffn: tuple[Port, ...] = ()
    after_layer: tuple[Port, ...] = ()

    def __add__(self, other: Ports) -> Ports:
        return Ports(self.beside_ffn + other.beside_ffn, self.after_layer + other.after_layer)


def _call(port: Port, layer: Array | int, run: Callable[[Any], Any], otherwise: Callable[[], Any]) -> Any:
    """run(slot) if the layer has a slot: at trace time for a Python int, under `lax.cond` for a scanned index."""
    chosen = lambda slot: run(jax.tree.map(lambda leaf: leaf[slot], port.slots))  # noqa: E731
    if isinstance(layer, int):
        return chosen(port.layers.index(layer)) if layer in port.layers else otherwise()
    here = jnp.asarray(np.array(port.layers)) == layer
    return jax.lax.cond(here.any(), lambda: chosen(jnp.argmax(here)), otherwise)


def beside_ffn(ports: Sequence[Port], layer: Array | int, ffn: Array, residual: Array, normed: Array) -> Array:
    """The FFN's output with every branch of this layer added to it, [B, T, D] (PVM, Algorithm 1)."""
    for port in ports:
        run = lambda slot, port=port: port.act(slot, residual, normed)  # noqa: E731
        ffn = ffn + _call(port, layer, run, lambda: jnp.zeros_like(residual))
    return ffn


def kept(ports: Sequence[Port], layer: Array | int, residual: Array) -> dict[str, Any]:
    """What the ports keep of this layer, by name; zeros where they have no slot."""
    found = {}
    for port in ports:
        if (keep := port.keep) is not None:
            run = lambda slot, keep=keep: keep(slot, residual)  # noqa: E731
            shapes = jax.eval_shape(run, jax.tree.map(lambda leaf: leaf[0], port.slots))
            empty = lambda shapes=shapes: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
            found[port.name] = _call(port, layer, run, empty)
    return found


def by_slot(ports: Ports, stacked: dict[str, Any]) -> dict[str, Any]:
    """What `kept` gave of every layer [L, ...] -> of every slot [slots, ...]."""
    keeping = [port for port in ports.beside_ffn if port.keep is not None]
    return {
        port.name: jax.tree.map(lambda leaf, layers=port.layers: leaf[np.array(layers)], stacked[port.name])
        for port in keeping
    }


def after_layer(ports: Sequence[Port], layer: Array | int, residual: Array) -> Array:
    """The residual stream after every rewrite of this layer, [B, T, D]."""
    for port in ports:
        run = lambda slot, port=port, x=residual: port.act(slot, x, None)  # noqa: E731
        residual = _call(port, layer, run, lambda x=residual: x)
    return residual
