"""Generation: prefill, then one compiled loop until every continuation has ended.

Axis letters: B prompts, G continuations of each, N new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.registry import backbone
from jaxmem.distributed import hosts
from jaxmem.distributed.mesh import constrain
from jaxmem.model import Spec, last_places, next_logits
from jaxmem.sampling import insertion
from jaxmem.sampling.cache import Cache, fork, prefill, require_room, step
from jaxmem.sampling.insertion import Insertions, Turn
from jaxmem.sampling.invoking import forced, permitted
from jaxmem.sampling.logits import SamplerConfig, draw
from jaxmem.sampling.slots import Slot


@flax.struct.dataclass
class State:
    """One state carries everything from token to token.

    Attributes:
      cache: what prompts and continuations have seen.
      tokens: [B, G, N] int32 by slot, pad tokens where nothing was sampled yet, in memories, and behind the end.
      logprobs: [B, G, N] float32, 0 there and where a token was not sampled.
      kinds: [B, G, N] int8, a `Slot` each.
      last: [B, G] int32 latest token.
      count: [B, G] int32 slots in use, the stop token included.
      done: [B, G] bool, stopped.
      keys: [B, G] random keys of the continuations.
      seen: [B, G, V] bool for the repetition penalty, or None.
      index: int32, tokens taken so far by the continuations that go on.
      insertions: of VisMem, or None.
    """

    cache: Cache
    tokens: Array
    logprobs: Array
    kinds: Array
    last: Array
    count: Array
    done: Array
    keys: Array
    seen: Array | None
    index: Array
    insertions: Insertions | None

    @property
    def live(self) -> Array:
        """[B, G] bool: continuations that have not stopped and have a slot left."""
        return ~self.done & (self.count < self.tokens.shape[2])


@flax.struct.dataclass
class Generated:
    """What was sampled, by slot: tokens [B, N] int32 (pads behind the end and in memories), logprobs [B, N] float32,
    kinds [B, N] int8 (`Slot`), lengths [B] int32."""

    tokens: Array
    logprobs: Array
    kinds: Array
    lengths: Array


def _record(spec: Spec, settings: SamplerConfig, state: State, scores: Array) -> State:
    """Draws a token for every continuation that goes on and writes it down; scores [B, G, V]."""
    live, limit, insertions = state.live, state.tokens.shape[2], state.insertions
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(state.keys, state.index)
    flat = lambda leaf: None if leaf is None else leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
    scores = constrain(flat(scores), "scores")
    fits = free = None
    if insertions is not None:
        fits = insertion.fits(spec, settings.invoke, insertions, state.count, limit)
        free = fits & (settings.invoke.mode == "free")
    if spec.vismem is not None:
        never = jnp.zeros((*live.shape, 2), bool)
        scores = permitted(spec.vismem, scores, flat(never if free is None else free))
    drawn, logprob = (out.reshape(live.shape) for out in draw(settings, flat(keys), scores, flat(state.seen)))
    kinds = jnp.full(live.shape, Slot.TEXT, jnp.int8)
    if insertions is not None:
        assert fits is not None and free is not None and spec.vismem is not None
        invokes = jnp.asarray(spec.vismem.invoke_ids, jnp.int32)
        kinds = jnp.where(jnp.isin(drawn, invokes), Slot.INVOKE, kinds).astype(jnp.int8)
        if settings.invoke.mode == "random":
            other = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, 1)
            here, kind = forced(spec.vismem, settings.invoke, other, state.last, fits)
            drawn, logprob = jnp.where(here, invokes[kind], drawn), jnp.where(here, 0.0, logprob)
            kinds = jnp.where(here, Slot.FORCED, kinds).astype(jnp.int8)
        insertions = insertion.drawn(spec, insertions, drawn, state.count, free, live)
    tokens = jnp.where(live, drawn, settings.pad_token)
    stops = jnp.isin(tokens, jnp.asarray(settings.stop_tokens, jnp.int32)) if settings.stop_tokens else False
    here = (jnp.arange(limit) == state.count[..., None]) & live[..., None]
    put = lambda old, new: jnp.where(here, new[..., None], old)  # noqa: E731
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        logprobs=put(state.logprobs, logprob),
        kinds=put(state.kinds, kinds),
        last=tokens,
        count=state.count + live,
        done=state.done | (live & stops),
        seen=None if state.seen is None else state.seen | jax.nn.one_hot(drawn, state.seen.shape[-1], dtype=bool),
        index=state.index + 1,
        insertions=insertions,
    )


@functools.partial(jax.jit, static_argnames=("spec", "settings", "size"))
def start(spec: Spec, settings: SamplerConfig, size: int, base: Any, memory: Any, batch: Batch, keys: Array) -> State:
    """Prefills the prompts once and samples the first token of every continuation.

    Args:
      spec, settings: static.
      size: slots of prompt and continuation together (static).
      base, memory: the two trees.
      batch: prompts.
      keys: [B, G] random keys.
    """
    rows, group, vocab, new = *keys.shape, spec.vocab, settings.max_new_tokens
    hidden, cache = prefill(spec, base, memory, batch, size - new)
    seen = None
    if settings.repetition_penalty != 1:
        seen = jnp.broadcast_to(said(batch, vocab)[:, None], (rows, group, vocab))
    reserved, insertions = 0, None
    if spec.vismem is not None and settings.invoke.mode != "off":
        reserved = insertion.columns(spec.vismem, settings.invoke)
        insertions = insertion.begin(spec, settings.invoke, cache, hidden, group, new)
    state = State(
        cache=fork(cache, group, new, reserved),
        tokens=jnp.full((rows, group, new), settings.pad_token, jnp.int32),
        logprobs=jnp.zeros((rows, group, new), jnp.float32),
        kinds=jnp.zeros((rows, group, new), jnp.int8),
        last=jnp.broadcast_to(_last_tokens(batch)[:, None], (rows, group)),
        count=jnp.zeros((rows, group), jnp.int32),
        done=jnp.broadcast_to(cache.segment[:, None] == 0, (rows, group)),  # a row of padding has nothing to say
        keys=keys,
        seen=seen,
        index=jnp.int32(0),
        insertions=insertions,
    )
    scores = next_logits(spec, base, memory, hidden)
    return _record(spec, settings, state, jnp.broadcast_to(scores[:, None], (rows, group, vocab)))


def said(batch: Batch, vocab: int) -> Array:
    """[B, V] bool: the tokens of each prompt, for the repetition penalty; slots that hold a vector say nothing."""
    silent = jnp.asarray(batch.segments) == 0
    for places in (batch.prefix_rows, batch.query_rows):
        silent = silent if places is None else silent | (jnp.asarray(places) >= 0)
    rows, index = len(batch.tokens), jnp.where(silent, vocab, batch.tokens)
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], index].set(True, mode="drop")


def _last_tokens(batch: Batch) -> Array:
    """[B] int32 the prompts' last tokens: a memory may come in front of the first word of an answer."""
    return jnp.take_along_axis(jnp.asarray(batch.tokens), last_places(batch)[:, None], axis=1)[:, 0]


@jax.jit
def _all(done: Array) -> Array:
    """Has every continuation ended? A scalar that every host can read, wherever the rows lie."""
    return done.all()


def _inserted(
    spec: Spec, settings: SamplerConfig, base: Any, layers: Any, memory: Any, state: State, hidden: Array
) -> tuple[Array, State]:
    """The states [B, G, D] after memories came behind the invocation tokens among the last ones."""
    assert state.insertions is not None and state.cache.tail is not None
    tail = state.cache.tail
    turn = Turn(
        state.live, hidden, tail.layers, tail.segments, state.tokens, state.kinds, state.count, state.insertions
    )
    cache, turn = insertion.insert(
        spec,
        settings.invoke,
        base,
        layers,
        memory,
        state.cache,
        turn,
        state.last,
        state.index,
        state.keys,
    )
    state = dataclasses.replace(
        state, cache=cache, tokens=turn.tokens, kinds=turn.kinds, count=turn.count, insertions=turn.state
    )
    return turn.hidden, state


@functools.partial(jax.jit, static_argnames=("spec", "settings"), donate_argnames=("state",))
def proceed(spec: Spec, settings: SamplerConfig, base: Any, memory: Any, state: State, until: Array) -> State:
    """Samples on until `until` tokens stand in every continuation, or all have ended."""
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    angle_of = functools.partial(backbone(spec.backbone.model_type).rotary_angles, spec.backbone)

    def unfinished(state: State) -> Array:
        return (state.index < until) & state.live.any()

    def one_token(state: State) -> State:
        live = state.live
        hidden, cache = step(spec, base, layers, memory, state.cache, state.last, live, state.count - 1, angle_of)
        state = dataclasses.replace(state, cache=cache)
        if state.insertions is not None:
            hidden, state = _inserted(spec, settings, base, layers, memory, state, hidden)
        return _record(spec, settings, state, next_logits(spec, base, memory, hidden))

    return jax.lax.while_loop(unfinished, one_token, state)


def states(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    settings: SamplerConfig,
    key: Array | None = None,
    group: int = 1,
    every: int | None = None,
) -> Iterator[State]:
    """The state after every few tokens; a state is donated to the next one, so read it before you go on.

    Args:
      spec, settings: static.
      base, memory: the two trees.
      batch: prompts.
      key: one random key, or [B] keys of the prompts; None is a fixed one. A continuation's tokens depend on its own
        key alone, which follows from its prompt's and its place in the group.
      group: continuations G of every prompt.
      every: tokens between two items; None goes to the end at once.

    Raises:
      DataError: prompt and answer do not fit into the cache or the backbone's positions.
    """
    (rows, width), new = batch.tokens.shape, settings.max_new_tokens
    size = settings.cache_size or width + new
    require_room(spec, width, new, size)
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, rows) if jnp.ndim(key) == 0 else key
    members = jax.vmap(lambda one: jax.vmap(jax.random.fold_in, (None, 0))(one, jnp.arange(group)))(keys)
    state = start(spec, settings, size, base, memory, batch, members)
    while True:
        yield state
        index = int(state.index)
        if index >= new or bool(_all(~state.live)):
            return
        state = proceed(spec, settings, base, memory, state, min(new, index + (every or new)))


def stream(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    settings: SamplerConfig,
    key: Array | None = None,
    every: int | None = 8,
) -> Iterator[Generated]:
    """Yields what is there after every few tokens; the last item is the whole answer. Arguments as for `states`."""
    for state in states(spec, base, memory, batch, settings, key, every=every):
        found = hosts.fetch((state.tokens, state.logprobs, state.kinds, state.count))
        yield Generated(*(leaf[:, 0].copy() for leaf in found))  # the state's own memory goes to the next state


def generate(
    spec: Spec, base: Any, memory: Any, batch: Batch, settings: SamplerConfig, key: Array | None = None
) -> Generated:
    """Continues every prompt of a batch; arguments as for `states`."""
    *_, whole = stream(spec, base, memory, batch, settings, key, every=None)
    return whole
