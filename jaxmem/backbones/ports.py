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
    """

    slots: Any
    act: Callable[[Any, Array, Array | None], Array] = flax.struct.field(pytree_node=False)
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Ports:
    """All ports of one forward pass: branches beside the FFN, then rewrites after the layer."""

    beside_ffn: tuple[Port, ...] = ()
    after_layer: tuple[Port, ...] = ()

    def __add__(self, other: Ports) -> Ports:
        return Ports(self.beside_ffn + other.beside_ffn, self.after_layer + other.after_layer)


def _call(port: Port, layer: Array | int, residual: Array, normed: Array | None, otherwise: Callable[[], Array]):
    """Runs the port if the layer has a slot: at trace time for a Python int, under `lax.cond` for a scanned index."""
    run = lambda slot: port.act(jax.tree.map(lambda leaf: leaf[slot], port.slots), residual, normed)  # noqa: E731
    if isinstance(layer, int):
        return run(port.layers.index(layer)) if layer in port.layers else otherwise()
    here = jnp.asarray(np.array(port.layers)) == layer
    return jax.lax.cond(here.any(), lambda: run(jnp.argmax(here)), otherwise)


def beside_ffn(ports: Sequence[Port], layer: Array | int, ffn: Array, residual: Array, normed: Array) -> Array:
    """The FFN's output with every branch of this layer added to it, [B, T, D] (PVM, Algorithm 1)."""
    for port in ports:
        zeros = lambda: jnp.zeros_like(residual)  # noqa: E731
        ffn = ffn + _call(port, layer, residual, normed, zeros)
    return ffn


def after_layer(ports: Sequence[Port], layer: Array | int, residual: Array) -> Array:
    """The residual stream after every rewrite of this layer, [B, T, D]."""
    for port in ports:
        residual = _call(port, layer, residual, None, lambda kept=residual: kept)
    return residual
