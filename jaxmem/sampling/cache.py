"""The key-value cache, and the forward pass that reads and extends it.

Slots of a row fill without gaps, each row at its own pace. Axis letters: B rows, T new tokens, S slots, K key heads,
H head width, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.ports import Ports
from jaxmem.errors import DataError
from jaxmem.memory.registry import memory as memory_module
from jaxmem.model import Spec, final_norm, memory_ports, read_prompt


@flax.struct.dataclass
class Cache:
    """Everything that a row has seen.

    Attributes:
      layers: per decoder layer, keys and values [B, S, K, H].
      stream: [B, S] what stands in each slot; segment 0 where nothing does.
      length: [B] int32, the next free slot.
      position: [B] int32, the rotary position of the next token (equal on all axes).
      segment: [B] int32, the document that the next token belongs to.
      states: per memory name, its per-prompt state.
    """

    layers: tuple[tuple[Array, Array], ...]
    stream: Stream
    length: Array
    position: Array
    segment: Array
    states: dict[str, Any]


def require_room(spec: Spec, prompt: int, new: int, size: int) -> None:
    """Raises DataError when `prompt` + `new` tokens exceed the cache's `size` or the backbone's positions."""
    asked, limit = f"a prompt of {prompt} tokens and {new} new ones", spec.backbone.text.max_positions
    if prompt + new > size:
        raise DataError(f"{asked} exceed the cache of {size}; enlarge cache_size or shorten the prompt")
    if prompt + new > limit:
        raise DataError(f"{asked} exceed the {limit} positions of the backbone; shorten the prompt")


def _after(stream: Stream, positions: Array) -> tuple[Array, Array, Array]:
    """Per row of a batch: tokens up to the last valid one, the next rotary position, the last document."""
    valid = stream.segments > 0
    count = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]) + 1, 0), axis=1)
    position = 1 + jnp.max(jnp.where(valid[:, None], positions, -1), axis=(1, 2))
    return count, position, jnp.max(stream.segments, axis=1)


def prefill(spec: Spec, base: Any, memory: Any, batch: Batch, size: int) -> tuple[Array, Cache]:
    """Reads prompts into a new cache.

    Args:
      spec: static.
      base, memory: the two trees.
      batch: prompts, padded on either side.
      size: slots S (static), at least T.

    Returns:
      [B, D] normalised hidden state of each row's last token, and the cache.
    """
    prompt = read_prompt(spec, base, memory, batch)
    stream = prompt.stream
    x, (keys, values) = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        prompt.x,
        prompt.angle,
        decoder.visible(stream, stream),
        ports=prompt.own + memory_ports(spec, memory, prompt.states, stream),
        observe=lambda query, keys, values, mask: (keys, values),
    )
    room = size - batch.tokens.shape[1]
    grow = lambda a: jnp.pad(a, [(0, 0), (0, room)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    count, position, segment = _after(stream, jnp.asarray(batch.positions))
    order = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(count), size))
    cache = Cache(
        layers=tuple((grow(keys[i]), grow(values[i])) for i in range(spec.backbone.text.layers)),
        stream=Stream(order, grow(stream.segments), grow(stream.is_visual), stream.blind),
        length=count,
        position=position,
        segment=segment,
        states=prompt.states,
    )
    return final_norm(spec, base, last(x, count)), cache


def last(x: Array, count: Array) -> Array:
    """[B, T, D], [B] -> [B, D], the row's entry at count - 1."""
    return jnp.take_along_axis(x, (count - 1)[:, None, None], axis=1)[:, 0]


def _write(old: Array, new: Array, start: Array) -> Array:
    """Puts new [B, T, ...] into old [B, S, ...] from slot start [B] on."""
    put = lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, axis=0)  # noqa: E731
    return jax.vmap(put)(old, new.astype(old.dtype), start)


def _through(
    spec: Spec, layers: tuple, cache: Cache, x: Array, angle: Array, stream: Stream, ports: Ports
) -> tuple[Array, Cache]:
    """New tokens through all layers against the cache; keys and values of the new tokens are written into it."""
    start = cache.length
    key_stream = dataclasses.replace(
        cache.stream,
        segments=_write(cache.stream.segments, stream.segments, start),
        is_visual=_write(cache.stream.is_visual, stream.is_visual, start),
    )
    stores = tuple(lambda k, v, old=old: (_write(old[0], k, start), _write(old[1], v, start)) for old in cache.layers)
    mask = decoder.visible(stream, key_stream)
    x, kept = decoder.loop_layers(spec.backbone.text, layers, x, angle, mask, stores, ports=ports)
    return x, dataclasses.replace(cache, layers=kept, stream=key_stream)


def extend(spec: Spec, base: Any, memory: Any, cache: Cache, batch: Batch) -> tuple[Array, Cache]:
    """Reads a further turn, with images of its own or without, behind what the cache holds.

    Args:
      spec: static.
      base, memory: the two trees.
      cache: has at least T free slots in every row.
      batch: the turn, right-padded, positions and documents counted from its own start.

    Returns:
      [B, D] normalised hidden state of each row's last token, and the longer cache; memories keep earlier images.
    """
    batch = dataclasses.replace(
        batch,
        positions=jnp.asarray(batch.positions) + cache.position[:, None, None],
        segments=jnp.where(jnp.asarray(batch.segments) > 0, cache.segment[:, None], 0),
    )
    prompt = read_prompt(spec, base, memory, batch, start=cache.length)
    states = {
        config.name: memory_module(config.name).append(cache.states[config.name], prompt.states[config.name])
        for config in spec.memories
    }
    ports = prompt.own + memory_ports(spec, memory, states, prompt.stream)
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    x, cache = _through(spec, layers, cache, prompt.x, prompt.angle, prompt.stream, ports)
    count, position, _ = _after(prompt.stream, batch.positions)
    hidden = final_norm(spec, base, last(x, count))
    return hidden, dataclasses.replace(cache, length=cache.length + count, position=position, states=states)


def step(
    spec: Spec, base: Any, layers: tuple, memory: Any, cache: Cache, tokens: Array, active: Array, angle_of: Any
) -> tuple[Array, Cache]:
    """One generated token per row.

    Args:
      spec: static.
      base, memory: the two trees; `layers` are the decoder's, unstacked.
      cache: has a free slot in every active row.
      tokens: [B] ids; rows that are not `active` [B] are computed and forgotten.
      angle_of: positions [B, 3, 1] -> rotary angles.

    Returns:
      [B, D] normalised hidden state, and the cache.
    """
    column = lambda a: a[:, None]  # noqa: E731
    segments = column(jnp.where(active, cache.segment, 0))
    stream = Stream(column(cache.length), segments, jnp.zeros_like(segments, bool), cache.stream.blind)
    angle = angle_of(jnp.broadcast_to(cache.position[:, None, None], (len(tokens), 3, 1)))
    ports = memory_ports(spec, memory, cache.states, stream)
    x, cache = _through(spec, layers, cache, base["embed"][column(tokens)], angle, stream, ports)
    ahead = active.astype(jnp.int32)
    hidden = final_norm(spec, base, x[:, 0])
    return hidden, dataclasses.replace(cache, length=cache.length + ahead, position=cache.position + ahead)
