"""Memories spliced into continuations while they are decoded: the state machine of VisMem (arXiv 2511.11007, 1.6).

A continuation is a row of slots: text, invocation token, memory vectors, end token, text. All continuations take one
token per step. Where one has just taken an invocation token, its memory is formed, the vectors and the end token are
read behind what it has seen, and the end token's state stands in for the invocation's: the next token is drawn from it.
The others wait for that moment and notice nothing. Rows that invoke are picked out of the batch and put back, a few at
a time, in an inner loop that makes no turn where none does.

Axis letters: B prompts, G continuations of each, S slots of a continuation, N vectors of the longer memory, I memories,
P parts of the batch that stay on their devices, R rows of a part, w rows picked of each part, W = P * w, C columns of
the ring of states, Y visual states, Z text states, K key heads, H head width, D model width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array
from jaxmem.backbones.decoder import KeysValues, Stream
from jaxmem.backbones.layers import Look, attend_branches
from jaxmem.backbones.registry import backbone
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError
from jaxmem.memory import former
from jaxmem.memory.former import Seen
from jaxmem.memory.registry import memory as memory_module
from jaxmem.memory.vismem import VisMemConfig, embed
from jaxmem.model import Spec, final_norm, memory_ports
from jaxmem.sampling.cache import Cache, Tail
from jaxmem.sampling.invoking import InvokeConfig, fitting
from jaxmem.sampling.picking import Pick, pick_rows, put_at
from jaxmem.sampling.slots import Slot

TEXT_SIZES = (16, 64, 256)
"""Text states that a former reads come in these sizes, or as many as there can be."""
COLUMNS = 16
"""A cache of a multiple of so many slots is read faster: products come in vectors."""
NOISE = 2**31 - 1
"""Folded into a continuation's key for noise in place of memories; tokens take their numbers."""


@flax.struct.dataclass
class Insertions:
    """What the state machine knows of every continuation.

    Attributes:
      ring: [B, G, C, D] states of the last C steps, after the final norm; column = step modulo C.
      since: [B, G] int32 step of the first state that the next memory is formed of.
      invoked: [B, G] int32 invocations so far.
      gap: [B, G] int32 ordinary tokens since the last end token; large before the first.
      permits: [B, G, S] int8, bit 0 and 1: could a short, a long invocation be sampled in this slot?
      memories: [B, G, I, N, D] the vectors that were inserted.
      visual: what memories are formed of beside text, per prompt; None without images.
      past: keys and values [2, L, B, Y, K, H] of the visual states under each adapter; None without a prefix cache.
      filled: [2, B] bool, which of them are there.
    """

    ring: Array
    since: Array
    invoked: Array
    gap: Array
    permits: Array
    memories: Array
    visual: Seen | None
    past: KeysValues | None
    filled: Array


def columns(config: VisMemConfig, invoke: InvokeConfig) -> int:
    """Slots that the memories and end tokens of one continuation can take beside its tokens, in whole `COLUMNS`."""
    if invoke.mode == "off":
        return 0
    return -(-invoke.max_invocations * (config.longest + 1) // COLUMNS) * COLUMNS


def text_sizes(room: int) -> tuple[int, ...]:
    """The sizes in which text states come where there can be `room` of them, ascending."""
    return (*(size for size in TEXT_SIZES if size < room), room)


def begin(spec: Spec, invoke: InvokeConfig, cache: Cache, hidden: Array, group: int, slots: int) -> Insertions:
    """The state in front of the first token; hidden [B, D] is that of the prompts' last tokens.

    Raises:
      ConfigError: shuffled memories of a single prompt.
    """
    config = _config(spec)
    rows, width = hidden.shape
    visual = cache.states[config.name]
    if invoke.content == "shuffle":
        if rows < 2:
            raise ConfigError("invoke.content 'shuffle' takes the images of the next prompt; give at least two prompts")
        visual = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), visual)
    size = min(config.text_cap, slots + 1)
    ring = jnp.zeros((rows, group, size, width), hidden.dtype).at[:, :, 0].set(hidden[:, None])
    ring = constrain(ring, "members")
    number = lambda value: jnp.full((rows, group), value, jnp.int32)  # noqa: E731
    text, past = spec.backbone.text, None
    if invoke.prefix_cache and visual is not None:
        shape = (2, text.layers, rows, visual.rows.shape[1], text.kv_heads, text.head_dim)
        past = tuple(constrain(jnp.zeros(shape, hidden.dtype), "prefixes") for _ in range(2))
    return Insertions(
        ring=ring,
        since=number(0),
        invoked=number(0),
        gap=number(jnp.iinfo(jnp.int32).max // 2),
        permits=jnp.zeros((rows, group, slots), jnp.int8),
        memories=jnp.zeros((rows, group, invoke.max_invocations, config.longest, width), hidden.dtype),
        visual=visual,
        past=past,
        filled=jnp.zeros((2, rows), bool),
    )


def _config(spec: Spec) -> VisMemConfig:
    assert spec.vismem is not None, "insertions are VisMem's"
    return spec.vismem


def fits(spec: Spec, invoke: InvokeConfig, state: Insertions, count: Array, limit: int) -> Array:
    """[B, G, 2] bool: may a short, a long invocation stand in the next slot? See `fitting`."""
    return fitting(_config(spec), invoke, count, state.invoked, state.gap, limit)


def drawn(spec: Spec, state: Insertions, tokens: Array, count: Array, permits: Array, live: Array) -> Insertions:
    """The state after tokens [B, G] were drawn into the slots `count` [B, G] of those that are `live` [B, G];
    permits [B, G, 2] bool are what could be sampled."""
    bits = (permits[..., 0] + 2 * permits[..., 1]).astype(jnp.int8)
    here = (jnp.arange(state.permits.shape[2]) == count[..., None]) & live[..., None]
    invokes = live & jnp.isin(tokens, jnp.asarray(_config(spec).invoke_ids))
    return dataclasses.replace(
        state,
        permits=jnp.where(here, bits[..., None], state.permits),
        invoked=state.invoked + invokes,
        gap=jnp.where(invokes, 0, state.gap + live),
    )


def push(state: Insertions, step: Array, hidden: Array) -> Insertions:
    """Writes the states [B, G, D] of a step."""
    column = step % state.ring.shape[2]
    put = jax.lax.dynamic_update_slice_in_dim(state.ring, hidden[:, :, None].astype(state.ring.dtype), column, axis=2)
    return dataclasses.replace(state, ring=put)


@flax.struct.dataclass
class Turn:
    """What the inner loop changes.

    Attributes:
      pending: [B, G] bool, whose memory is still to come.
      hidden: [B, G, D] states that the next tokens are drawn from.
      layers: the tails' keys and values per layer.
      segments: [B, G, slots of the tail].
      tokens, kinds, count: of the continuations, as in `generate.State`.
      state: the insertions.
    """

    pending: Array
    hidden: Array
    layers: tuple[KeysValues, ...]
    segments: Array
    tokens: Array
    kinds: Array
    count: Array
    state: Insertions


def insert(
    spec: Spec,
    invoke: InvokeConfig,
    base: Any,
    layers: tuple[Any, ...],
    memory: Any,
    cache: Cache,
    turn: Turn,
    last: Array,
    step: Array,
    keys: Array | None = None,
) -> tuple[Cache, Turn]:
    """Forms and inserts the memories of all continuations whose last token [B, G] invokes one.

    Args:
      spec, invoke: static.
      base, memory: the two trees; `layers` are the decoder's, unstacked.
      cache: after the step that read the tokens `last`.
      turn: `pending` says which continuations still go on.
      last: [B, G] int32.
      step: int32, of the tokens.
      keys: [B, G] random keys of the continuations, which `content` "noise" needs.
    """
    config = _config(spec)
    tail = cache.tail
    assert tail is not None, "only continuations call for memories"
    turn = dataclasses.replace(turn, state=push(turn.state, step, turn.hidden))
    kept = [token for token, off in zip(config.invoke_ids, invoke.skipped, strict=True) if not off]
    pending = turn.pending & jnp.isin(last, jnp.asarray(kept, jnp.int32))
    emitted = (last == config.invoke_ids[1]).astype(jnp.int32)
    made = 1 - emitted if invoke.reverse else emitted
    chunk = _Chunk(spec, invoke, base, layers, memory, cache, made, step, keys)
    turn = dataclasses.replace(turn, pending=pending)
    turn = jax.lax.while_loop(lambda turn: turn.pending.any(), chunk, turn)
    tail = Tail(turn.layers, turn.segments, tail.index)
    return dataclasses.replace(cache, tail=tail), turn


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
    """One turn of the inner loop: the memories of w rows of every part.

    Attributes are the arguments of `insert`; `made` [B, G] is the type of the memory that a row is to get.
    """

    spec: Spec
    invoke: InvokeConfig
    base: Any
    layers: tuple[Any, ...]
    memory: Any
    cache: Cache
    made: Array
    step: Array
    keys: Array | None

    def __call__(self, turn: Turn) -> Turn:
        config, pick = _config(self.spec), pick_rows(turn.pending, self.invoke.rows_at_once)
        kind = pick.take(self.made)
        state = self._filled(turn.state, pick, kind)
        vectors = self._vectors(state, pick, kind)
        x, valid = self._block(vectors, kind)
        offset = pick.take(state.invoked - 1) * (config.longest + 1)
        hidden, layers, segments = self._read(turn, pick, x, valid, offset)
        sizes = jnp.asarray(config.sizes)[kind]
        end = jnp.take_along_axis(hidden, sizes[:, None, None], axis=1)[:, 0]
        tokens, kinds, count = self._written(turn, pick, kind, sizes)
        memories = put_at(pick.take(state.memories), vectors, pick.take(state.invoked) - 1)
        column = self.step % state.ring.shape[2]
        ring = jax.lax.dynamic_update_slice_in_dim(
            pick.take(state.ring), end[:, None].astype(state.ring.dtype), column, axis=1
        )
        state = dataclasses.replace(
            state,
            ring=pick.put(state.ring, ring),
            since=pick.put(state.since, jnp.broadcast_to(self.step, kind.shape)),
            memories=pick.put(state.memories, memories),
        )
        return Turn(
            pending=pick.put(turn.pending, jnp.zeros(kind.shape, bool)),
            hidden=pick.put(turn.hidden, end),
            layers=layers,
            segments=segments,
            tokens=tokens,
            kinds=kinds,
            count=count,
            state=state,
        )

    def _filled(self, state: Insertions, pick: Pick, kind: Array) -> Insertions:
        """The state with the visual prefix of all picked rows, computed where it is not there yet."""
        if state.past is None or state.visual is None:
            return state
        config, visual = _config(self.spec), jax.tree.map(lambda leaf: leaf[pick.prompts], state.visual)

        def missing(state: Insertions) -> Array:
            return (pick.live.reshape(-1) & ~state.filled[kind, pick.prompts]).any()

        def fill(state: Insertions) -> Insertions:
            layers = former.adapted(config, self.base, self.memory[config.name], kind)
            # Tied to what the loop changes: XLA moves what no turn changes in front of a loop, where it always runs.
            seen, _ = jax.lax.optimization_barrier((visual, state.filled))
            found = former.prefix(config, self.spec.backbone, layers, seen)
            # Rows that only fill up the chunk write nothing.
            prompts = jnp.where(pick.live.reshape(-1), pick.prompts, state.filled.shape[1])
            put = lambda old, new: old.at[kind, :, prompts].set(jnp.moveaxis(new, 1, 0), mode="drop")  # noqa: E731
            past = jax.tree.map(put, state.past, found)
            return dataclasses.replace(state, past=past, filled=state.filled.at[kind, prompts].set(True, mode="drop"))

        return jax.lax.while_loop(missing, fill, state)

    def _vectors(self, state: Insertions, pick: Pick, kind: Array) -> Array:
        """[W, N, D] memories of the picked rows, or what a control puts in their place."""
        config, content = _config(self.spec), self.invoke.content
        if content == "zero":
            return jnp.zeros((len(kind), config.longest, config.width), state.ring.dtype)
        made = self._formed(state, pick, kind)
        if content != "noise":
            return made
        assert self.keys is not None, "noise is drawn from the continuations' keys"
        size = jnp.sqrt(jnp.mean(jnp.square(made.astype(jnp.float32)), axis=-1, keepdims=True))
        key = lambda own, nth: jax.random.fold_in(jax.random.fold_in(own, NOISE), nth)  # noqa: E731
        keys = jax.vmap(key)(pick.take(self.keys), pick.take(state.invoked))
        noise = jax.vmap(lambda one: jax.random.normal(one, made.shape[1:]))(keys)
        return (noise * size).astype(made.dtype)

    def _formed(self, state: Insertions, pick: Pick, kind: Array) -> Array:
        config, spec = _config(self.spec), self.spec
        visual = jax.tree.map(lambda leaf: leaf[pick.prompts], state.visual)
        past = None
        if state.past is not None:
            past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf[kind, :, pick.prompts], 0, 1), state.past)
        ring, since = pick.take(state.ring), pick.take(state.since)
        room = ring.shape[1]

        def with_text(size: int) -> Callable[[], Array]:
            def form() -> Array:
                steps = self.step - size + 1 + jnp.arange(size)
                valid = (steps >= since[:, None]) & (steps >= 0)
                rows = jnp.where(valid[..., None], ring[:, steps % room], 0)
                text = Seen(rows, valid)
                return former.form(
                    config, spec.backbone, self.base, self.memory[config.name], visual, text, kind, past=past
                )

            return form

        sizes = text_sizes(room)
        longest = jnp.max(jnp.where(pick.live.reshape(-1), self.step - since + 1, 0))
        branch = jnp.sum(longest > jnp.asarray(sizes[:-1], jnp.int32)) if len(sizes) > 1 else 0
        with jax.named_scope("former"):
            return jax.lax.switch(branch, [with_text(size) for size in sizes])

    def _block(self, vectors: Array, kind: Array) -> tuple[Array, Array]:
        """[W, N + 1, D] the vectors and the end token behind them, and which of the slots are in use."""
        config = _config(self.spec)
        sizes = jnp.asarray(config.sizes)[kind][:, None]
        place = jnp.arange(config.longest + 1)
        ends = jnp.asarray(config.end_ids)[kind]
        end = embed(config, self.memory[config.name], self.base["embed"], ends).astype(vectors.dtype)
        padded = jnp.pad(vectors, ((0, 0), (0, 1), (0, 0)))
        return jnp.where((place == sizes)[..., None], end[:, None], padded), place <= sizes

    def _read(
        self, turn: Turn, pick: Pick, x: Array, valid: Array, offset: Array
    ) -> tuple[Array, tuple[KeysValues, ...], Array]:
        """The policy reads a block behind what each row has seen: states [W, N + 1, D], tails and segments."""
        spec, cache = self.spec, self.cache
        place = pick.take(turn.count)[:, None] + jnp.arange(x.shape[1])
        segment = cache.segment[pick.prompts][:, None]
        off = jnp.zeros(valid.shape, bool)
        order = (cache.length[pick.prompts][:, None] + place).astype(jnp.int32)
        stream = Stream(order, jnp.where(valid, segment, 0), off, cache.stream.blind[pick.prompts])
        trunk = jax.tree.map(lambda leaf: leaf[pick.prompts], cache.stream)
        trunk_mask = decoder.visible(stream, trunk)[:, None]
        before = pick.take(turn.segments)
        slots = jnp.arange(before.shape[1])
        inside = slots[None, None] - offset[:, None, None]  # [W, 1, slots]: place within the block
        own = (inside >= 0) & (inside <= jnp.arange(x.shape[1])[None, :, None])
        own_mask = ((before == segment)[:, None] | own)[:, None] & (segment > 0)[..., None, None]

        def look(old: KeysValues, tail: KeysValues) -> Look:
            held = tuple(leaf[pick.prompts] for leaf in old)
            mine = tuple(pick.take(leaf) for leaf in tail)

            def write_and_look(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
                kept = tuple(
                    put_at(leaf, jnp.swapaxes(part, 1, 2).astype(leaf.dtype), offset, axis=1)
                    for leaf, part in zip(mine, (key, value), strict=True)
                )
                branch = tuple(leaf[:, None] for leaf in kept)
                return attend_branches(query[:, None], held, branch, trunk_mask, own_mask)[:, 0], kept  # pyrefly: ignore

            return write_and_look

        angle_of = backbone(spec.backbone.model_type).rotary_angles
        positions = jnp.broadcast_to((cache.position[pick.prompts][:, None] + place)[:, None], (len(x), 3, x.shape[1]))
        states = {c.name: memory_module(c.name).take(cache.states[c.name], pick.prompts) for c in spec.memories}
        out, kept = decoder.loop_layers(
            spec.backbone.text,
            self.layers,
            x,
            angle_of(spec.backbone, positions),
            [look(*pair) for pair in zip(cache.layers, turn.layers, strict=True)],
            ports=memory_ports(spec, self.memory, states, stream),
            place="token",
        )
        tails = jax.tree.map(pick.put, turn.layers, kept)
        segments = pick.put(turn.segments, put_at(before, stream.segments, offset))
        return final_norm(spec, self.base, out), tails, segments

    def _written(self, turn: Turn, pick: Pick, kind: Array, sizes: Array) -> tuple[Array, Array, Array]:
        """Tokens, kinds and slots in use with the new slots written down."""
        config = _config(self.spec)
        tokens, kinds, count = (pick.take(leaf) for leaf in (turn.tokens, turn.kinds, turn.count))
        inside = jnp.arange(tokens.shape[1]) - count[:, None]
        is_vector, is_end = (inside >= 0) & (inside < sizes[:, None]), inside == sizes[:, None]
        ends = jnp.asarray(config.end_ids)[kind][:, None]
        kinds = jnp.where(is_vector, Slot.MEMORY, jnp.where(is_end, Slot.END, kinds)).astype(turn.kinds.dtype)
        return (
            pick.put(turn.tokens, jnp.where(is_end, ends, tokens)),
            pick.put(turn.kinds, kinds),
            pick.put(turn.count, count + sizes + 1),
        )
