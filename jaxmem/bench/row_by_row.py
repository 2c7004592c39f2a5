"""The peer of `jaxmem bench vismem`: VisMem decoded one row at a time, by a loop in Python.

What the published code does, with its faults left out: Python takes a token, waits for it, and decides what follows.
An invocation runs the former over all of [visual states; text states; queries; slots], with no keys kept from one to
the next, and the policy then reads the memory and the end token. Every piece is compiled once per shape, keys and
values of what was read are kept, and text states are padded to a few lengths.

Axis letters: T tokens, S slots of the cache, K key heads, H head width, D model width, V tokens, Z text states.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import KeysValues, Look
from jaxmem.backbones.layers import attend
from jaxmem.backbones.registry import backbone
from jaxmem.memory import former
from jaxmem.memory.former import Seen
from jaxmem.memory.vismem import VisMemConfig, embed
from jaxmem.model import Spec, final_norm, logits, next_position, read
from jaxmem.sampling.invoking import InvokeConfig, forced
from jaxmem.sampling.slots import Slot

TEXT_SIZES = (16, 64, 256, 1024)
Kept = tuple[KeysValues, ...]


@functools.partial(jax.jit, static_argnames=("spec", "size"))
def _prompt(spec: Spec, size: int, base: Any, memory: Any, row: Batch) -> tuple[Array, Array, Kept, Seen | None, Array]:
    """Reads a prompt: the next token, the state [D] that it follows from, keys and values [1, S, K, H] per layer, the
    states of its images, and the position behind it."""
    found = read(spec, base, memory, row)
    room = ((0, 0), (0, size - row.tokens.shape[1]), (0, 0), (0, 0))
    keys, values = found.past
    kept = tuple((jnp.pad(keys[i], room), jnp.pad(values[i], room)) for i in range(spec.backbone.text.layers))
    return (
        _best(spec, base, found.last),
        found.last[0],
        kept,
        found.states[_config(spec).name],
        next_position(spec, row)[0],
    )


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="kept")
def _token(
    spec: Spec, base: Any, layers: Any, memory: Any, kept: Kept, token: Array, start: Array, position: Array
) -> tuple[Array, Array, Kept]:
    """Reads one token: the next one, the state [D] that it follows from, and the longer cache."""
    config = _config(spec)
    x = embed(config, memory[config.name], base["embed"], token[None, None])
    hidden, kept = _behind(spec, base, layers, kept, x, start, position)
    return _best(spec, base, hidden[:, -1]), hidden[0, -1], kept


@functools.partial(jax.jit, static_argnames=("spec", "kind"), donate_argnames="kept")
def _invocation(
    spec: Spec,
    kind: int,
    base: Any,
    layers: Any,
    memory: Any,
    kept: Kept,
    visual: Seen | None,
    text: Seen,
    start: Array,
    position: Array,
) -> tuple[Array, Array, Kept]:
    """Forms a memory and reads it with its end token; returns as `_token`."""
    config = _config(spec)
    params = memory[config.name]
    vectors = former.form(config, spec.backbone, base, params, visual, text, jnp.asarray([kind]))
    end = embed(config, params, base["embed"], jnp.asarray([[config.end_ids[kind]]]))
    x = jnp.concatenate([vectors[:, : config.sizes[kind]], end], axis=1)
    hidden, kept = _behind(spec, base, layers, kept, x, start, position)
    return _best(spec, base, hidden[:, -1]), hidden[0, -1], kept


def _behind(
    spec: Spec, base: Any, layers: Any, kept: Kept, x: Array, start: Array, position: Array
) -> tuple[Array, Kept]:
    """Reads x [1, T, D] into the cache from slot `start` on: states [1, T, D] after the final norm."""
    place = jnp.arange(x.shape[1])
    mask = jnp.arange(kept[0][0].shape[1]) <= (start + place)[None, :, None]

    def look(old: KeysValues) -> Look:
        def write_and_look(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
            new = tuple(
                jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis=1)
                for leaf, part in zip(old, (key, value), strict=True)
            )
            return attend(query, *new, mask), new  # pyrefly: ignore

        return write_and_look

    positions = jnp.broadcast_to(position + place, (1, 3, x.shape[1]))
    angle = backbone(spec.backbone.model_type).rotary_angles(spec.backbone, positions)
    out, kept = decoder.loop_layers(spec.backbone.text, layers, x, angle, [look(old) for old in kept])
    return final_norm(spec, base, out), kept


def _best(spec: Spec, base: Any, hidden: Array) -> Array:
    """The likeliest token after states [1, D]; control tokens are forced, never sampled."""
    return jnp.argmax(logits(spec, base, hidden)[0, : _config(spec).vocab])


def _config(spec: Spec) -> VisMemConfig:
    assert spec.vismem is not None, "the loop is VisMem's"
    return spec.vismem


def chances(config: VisMemConfig, invoke: InvokeConfig, rows: int, limit: int, key: Array) -> tuple[np.ndarray, ...]:
    """The dice of `generate`: [B, N] bool, would an invocation be forced after so many tokens, and [B, N] its type."""
    members = jax.vmap(lambda one: jax.random.fold_in(one, 0))(jax.random.split(key, rows))
    at = lambda one, step: jax.random.fold_in(jax.random.fold_in(one, step), 1)  # noqa: E731
    keys = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(members, jnp.arange(limit))
    nothing, fits = jnp.zeros((rows, limit), jnp.int32), jnp.ones((rows, limit, 2), bool)
    here, kind = forced(config, invoke, keys, nothing, fits)
    return np.asarray(here), np.asarray(kind)


@dataclasses.dataclass(frozen=True, eq=False)
class RowByRow:
    """Greedy decoding with invocations forced anywhere.

    Attributes:
      spec, invoke: as for `generate`.
      base, memory: the two trees.
      layers: the decoder's weights, unstacked.
      limit: slots N of a continuation.
    """

    spec: Spec
    invoke: InvokeConfig
    base: Any
    memory: Any
    layers: tuple[Any, ...]
    limit: int

    def __call__(self, batch: Batch, here: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and kinds [B, N], for prompts without padding and the dice [B, N] of `chances`."""
        rows = (jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(len(batch.tokens)))
        tokens, kinds = zip(*(self._row(*one) for one in zip(rows, here, kind, strict=True)), strict=True)
        return np.stack(tokens), np.stack(kinds)

    def _row(self, row: Batch, here: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        config, invoke, limit, length = _config(self.spec), self.invoke, self.limit, row.tokens.shape[1]
        tokens, kinds = np.zeros(limit, np.int32), np.zeros(limit, np.int8)
        weights = (self.base, self.layers, self.memory)
        best, hidden, kept, visual, behind = _prompt(self.spec, length + limit, self.base, self.memory, row)
        text, behind, invoked, gap, count, step = [np.asarray(hidden)], int(behind), 0, limit, 0, 0
        while True:
            made = int(kind[step])
            size = config.sizes[made]
            room = invoked < invoke.max_invocations and gap >= invoke.min_gap and limit - count >= size + 2
            invokes = bool(here[step]) and room
            token = config.invoke_ids[made] if invokes else int(best)
            tokens[count], kinds[count] = token, Slot.FORCED if invokes else Slot.TEXT
            count, step, gap, invoked = count + 1, step + 1, 0 if invokes else gap + 1, invoked + invokes
            if count == limit:
                return tokens, kinds
            place = np.int32(length + count - 1), np.int32(behind + count - 1)
            best, hidden, kept = _token(self.spec, *weights, kept, np.int32(token), *place)
            text.append(np.asarray(hidden))
            if invokes:
                place, seen = (np.int32(length + count), np.int32(behind + count)), _padded(text)
                best, hidden, kept = _invocation(self.spec, made, *weights, kept, visual, seen, *place)
                kinds[count : count + size], kinds[count + size] = Slot.MEMORY, Slot.END
                tokens[count + size] = config.end_ids[made]
                count, text = count + size + 1, [np.asarray(hidden)]


def _padded(text: list[np.ndarray]) -> Seen:
    """Text states [D] as one of a few lengths, padded on the left; at most the last `TEXT_SIZES[-1]`."""
    rows = np.stack(text[-TEXT_SIZES[-1] :])
    short = next(size for size in TEXT_SIZES if size >= len(rows)) - len(rows)
    valid = np.arange(short + len(rows)) >= short
    return Seen(np.pad(rows, ((short, 0), (0, 0)))[None], valid[None])
