"""The key-value cache, and the forward pass that reads and extends it.

A cache has a trunk, the prompts, of which one copy exists, and a tail for each of the G continuations of a prompt. All
continuations take one slot per step, so a step writes one column; the first columns may be reserved for memories that
are inserted (`jaxmem.sampling.insertion`). While decoding, the members of a group stand where
the tokens of a prompt stand, on the axis T = G; memories need not know.
Axis letters: B prompts, G continuations of each, T tokens, S slots of the trunk, N slots of a tail, K key heads,
H head width, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import KeysValues, Stream
from jaxmem.backbones.layers import Look, attend, attend_branches
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import DataError
from jaxmem.memory import fastv, vismem
from jaxmem.memory.registry import memory as memory_module
from jaxmem.model import (
    Spec,
    embed_tokens,
    final_norm,
    last_places,
    memory_ports,
    next_position,
    read,
    read_prompt,
    seen,
)


@flax.struct.dataclass
class Tail:
    """What the continuations have seen of themselves.

    Attributes:
      layers: per decoder layer, keys and values [B, G, K, N, H].
      segments: [B, G, N] int32 document of what stands in each slot; 0 where nothing does.
      index: int32, the next free slot.
    """

    layers: tuple[KeysValues, ...]
    segments: Array
    index: Array


@flax.struct.dataclass
class Cache:
    """Everything that a prompt has seen, and its continuations.

    Attributes:
      layers: per decoder layer, keys and values [B, K, S, H].
      stream: [B, S] what stands in each slot; segment 0 where nothing does. Slots fill without gaps.
      length: [B] int32, the next free slot.
      position: [B] int32, the rotary position of the next token (equal on all axes).
      segment: [B] int32, the document that the next token belongs to.
      states: per memory name, its per-prompt state.
      tail: of the continuations; None before `fork`.
    """

    layers: tuple[KeysValues, ...]
    stream: Stream
    length: Array
    position: Array
    segment: Array
    states: dict[str, Any]
    tail: Tail | None = None


def require_room(spec: Spec, prompt: int, new: int, size: int) -> None:
    """Raises DataError when `prompt` + `new` tokens exceed the cache's `size` or the backbone's positions."""
    asked, limit = f"a prompt of {prompt} tokens and {new} new ones", spec.backbone.text.max_positions
    if prompt + new > size:
        raise DataError(f"{asked} exceed the cache of {size}; enlarge cache_size or shorten the prompt")
    if prompt + new > limit:
        raise DataError(f"{asked} exceed the {limit} positions of the backbone; shorten the prompt")


def prefill(spec: Spec, base: Any, memory: Any, batch: Batch, size: int) -> tuple[Array, Cache]:
    """Reads prompts into a new cache.

    Args:
      spec: static.
      base, memory: the two trees.
      batch: prompts, padded on either side.
      size: slots S of the trunk (static), at least T.

    Returns:
      [B, D] normalised hidden state of each row's last token, and the cache.
    """
    prompt = read(spec, base, memory, batch)
    room = size - batch.tokens.shape[1]
    grow = lambda a: jnp.pad(a, ((0, 0), (0, room)))  # noqa: E731
    keep = lambda a: constrain(  # noqa: E731
        jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, room), (0, 0))), "trunk_keys"
    )
    places, stream, (keys, values) = last_places(batch), prompt.stream, prompt.past
    order = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(places), size))
    cache = Cache(
        layers=tuple((keep(keys[i]), keep(values[i])) for i in range(spec.backbone.text.layers)),
        stream=Stream(order, grow(stream.segments), grow(stream.is_visual), stream.blind),
        length=places + 1,
        position=next_position(spec, batch),
        segment=jnp.max(stream.segments, axis=1),
        states=prompt.states,
    )
    return prompt.last, cache


def fork(cache: Cache, group: int, new: int, reserved: int = 0) -> Cache:
    """The cache with empty tails: `group` continuations per prompt of up to `new` tokens each, behind `reserved`
    columns that steps do not write."""
    rows, size = len(cache.length), reserved + new

    def empty(leaf: Array) -> Array:
        return constrain(jnp.zeros((rows, group, leaf.shape[1], size, leaf.shape[3]), leaf.dtype), "branch_keys")

    layers = jax.tree.map(empty, cache.layers)
    segments = jnp.zeros((rows, group, size), jnp.int32)
    return dataclasses.replace(cache, tail=Tail(layers, segments, jnp.int32(reserved)))


def _at(x: Array, places: Array) -> Array:
    """[B, T, D], [B] -> [B, D]."""
    return jnp.take_along_axis(x, places[:, None, None], axis=1)[:, 0]


def _write(old: Array, new: Array, start: Array, axis: int) -> Array:
    """Puts new into old [B, ...] from slot start [B] on; `axis` counts within a row."""
    put = lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, axis=axis)  # noqa: E731
    return jax.vmap(put)(old, new.astype(old.dtype), start)


def _masks(spec: Spec, states: dict[str, Any], queries: Stream, trunk: Stream) -> list[Array]:
    """Per layer, [B, T, S] bool: what the queries may see of the trunk. Layers that see the same share one mask."""
    text, whole = spec.backbone.text, decoder.visible(queries, trunk)
    keys, late = fastv.keys_by_layer(spec.memories, trunk, states, text)
    if late is None:
        return [whole] * text.layers
    part = decoder.visible(queries, keys(True))
    return [part if one else whole for one in late]


def extend(spec: Spec, base: Any, memory: Any, cache: Cache, batch: Batch) -> tuple[Array, Cache]:
    """Reads a further turn, with images of its own or without, behind what the trunk holds.

    Args:
      spec: static.
      base, memory: the two trees.
      cache: has at least T free slots in every row.
      batch: the turn, right-padded, positions and documents counted from its own start.

    Returns:
      [B, D] normalised hidden state of each row's last token, and the longer cache; memories keep earlier images.
    """
    start = cache.length
    batch = dataclasses.replace(
        batch,
        positions=jnp.asarray(batch.positions) + cache.position[:, None, None],
        segments=jnp.where(jnp.asarray(batch.segments) > 0, cache.segment[:, None], 0),
    )
    prompt = read_prompt(spec, base, memory, batch, start=start)
    states = {
        config.name: memory_module(config.name).append(cache.states[config.name], prompt.states[config.name])
        for config in spec.memories
    }
    stream = dataclasses.replace(
        cache.stream,
        segments=_write(cache.stream.segments, prompt.stream.segments, start, 0),
        is_visual=_write(cache.stream.is_visual, prompt.stream.is_visual, start, 0),
    )
    masks = _masks(spec, states, prompt.stream, stream)

    def look(old: KeysValues, mask: Array) -> Look:
        def write_and_look(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
            put = lambda leaf, part: _write(leaf, jnp.swapaxes(part, 1, 2), start, 1)  # noqa: E731
            kept = put(old[0], key), put(old[1], value)
            return attend(query, jnp.swapaxes(kept[0], 1, 2), jnp.swapaxes(kept[1], 1, 2), mask), kept

        return write_and_look

    x, layers = decoder.loop_layers(
        spec.backbone.text,
        decoder.unstack(base["layers"], spec.backbone.text.layers),
        prompt.x,
        prompt.angle,
        [look(*pair) for pair in zip(cache.layers, masks, strict=True)],
        ports=prompt.own + memory_ports(spec, memory, states, prompt.stream),
    )
    if spec.vismem is not None:
        name = spec.vismem.name
        states[name] = vismem.joined(spec.vismem, cache.states[name], seen(spec, base, batch, prompt.x, x))
    places = last_places(batch)
    cache = dataclasses.replace(
        cache,
        layers=layers,
        stream=stream,
        length=start + places + 1,
        position=next_position(spec, batch),
        states=states,
    )
    return final_norm(spec, base, _at(x, places)), cache


def step(
    spec: Spec,
    base: Any,
    layers: tuple[Any, ...],
    memory: Any,
    cache: Cache,
    tokens: Array,
    active: Array,
    place: Array,
    angle_of: Callable[[Array], Array],
) -> tuple[Array, Cache]:
    """One generated token per continuation.

    Args:
      spec: static.
      base, memory: the two trees; `layers` are the decoder's, unstacked.
      cache: forked, with a free slot in its tails.
      tokens: [B, G] ids; continuations that are not `active` [B, G] are computed and forgotten, for good.
      place: [B, G] slots of each continuation in front of the token.
      angle_of: positions [B, 3, G] -> rotary angles.

    Returns:
      [B, G, D] normalised hidden states, and the cache.
    """
    tail = cache.tail
    assert tail is not None, "fork the cache before the first step"
    index = tail.index
    segments = jnp.where(active, cache.segment[:, None], 0)
    stream = Stream(cache.length[:, None] + place, segments, jnp.zeros_like(active), cache.stream.blind)
    written = jax.lax.dynamic_update_slice_in_dim(tail.segments, segments[..., None], index, axis=2)
    masks = _masks(spec, cache.states, stream, cache.stream)
    own_mask = ((written == segments[..., None]) & (segments > 0)[..., None])[:, :, None]

    def look(trunk: KeysValues, own: KeysValues, mask: Array) -> Look:
        def write_and_look(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
            put = lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
                leaf, part[:, :, :, None].astype(leaf.dtype), index, axis=3
            )
            kept = put(own[0], key), put(own[1], value)
            return attend_branches(query[:, :, None], trunk, kept, mask[:, :, None], own_mask)[:, :, 0], kept

        return write_and_look

    positions = jnp.broadcast_to((cache.position[:, None] + place)[:, None], (len(tokens), 3, tokens.shape[1]))
    x, kept = decoder.loop_layers(
        spec.backbone.text,
        layers,
        embed_tokens(spec, base, memory, tokens),
        angle_of(positions),
        [look(*one) for one in zip(cache.layers, tail.layers, masks, strict=True)],
        ports=memory_ports(spec, memory, cache.states, stream),
        place="token",
    )
    return final_norm(spec, base, constrain(x, "token")), dataclasses.replace(
        cache, tail=Tail(kept, written, index + 1)
    )
