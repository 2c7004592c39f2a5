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
from jaxmem.model import Spec, logits
from jaxmem.sampling.cache import Cache, fork, prefill, require_room, step
from jaxmem.sampling.logits import SamplerConfig, draw


@flax.struct.dataclass
class State:
    """One state carries everything from token to token.

    Attributes:
      cache: what prompts and continuations have seen.
      tokens: [B, G, N] int32, pad tokens where nothing was sampled yet or the continuation has ended.
      logprobs: [B, G, N] float32, 0 there.
      count: [B, G] int32 sampled tokens, the stop token included.
      done: [B, G] bool.
      keys: [B, G] random keys of the continuations.
      seen: [B, G, V] bool for the repetition penalty, or None.
      index: int32, tokens sampled so far by the continuations that are not done.
    """

    cache: Cache
    tokens: Array
    logprobs: Array
    count: Array
    done: Array
    keys: Array
    seen: Array | None
    index: Array


@flax.struct.dataclass
class Generated:
    """What was sampled: tokens [B, N] int32 (pads behind the end), logprobs [B, N] float32, lengths [B] int32."""

    tokens: Array
    logprobs: Array
    lengths: Array


def _record(settings: SamplerConfig, state: State, scores: Array) -> State:
    """Draws a token for every continuation that goes on and writes it down; scores [B, G, V]."""
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(state.keys, state.index)
    flat = lambda leaf: None if leaf is None else leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
    scores = constrain(constrain(flat(scores), "next_logits"), "scores")
    drawn, logprob = (out.reshape(state.done.shape) for out in draw(settings, flat(keys), scores, flat(state.seen)))
    tokens = jnp.where(state.done, settings.pad_token, drawn)
    stops = jnp.isin(tokens, jnp.asarray(settings.stop_tokens, jnp.int32)) if settings.stop_tokens else False
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[..., None], state.index, axis=2)  # noqa: E731
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        logprobs=put(state.logprobs, jnp.where(state.done, 0.0, logprob)),
        count=state.count + ~state.done,
        done=state.done | stops,
        seen=None if state.seen is None else state.seen | jax.nn.one_hot(drawn, state.seen.shape[-1], dtype=bool),
        index=state.index + 1,
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
    rows, group, vocab, new = *keys.shape, spec.backbone.text.vocab, settings.max_new_tokens
    hidden, cache = prefill(spec, base, memory, batch, size - new)
    seen = None
    if settings.repetition_penalty != 1:
        index = jnp.where(jnp.asarray(batch.segments) > 0, batch.tokens, vocab)
        prompt = jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], index].set(True, mode="drop")
        seen = jnp.broadcast_to(prompt[:, None], (rows, group, vocab))
    state = State(
        cache=fork(cache, group, new),
        tokens=jnp.full((rows, group, new), settings.pad_token, jnp.int32),
        logprobs=jnp.zeros((rows, group, new), jnp.float32),
        count=jnp.zeros((rows, group), jnp.int32),
        done=jnp.broadcast_to(cache.segment[:, None] == 0, (rows, group)),  # a row of padding has nothing to say
        keys=keys,
        seen=seen,
        index=jnp.int32(0),
    )
    scores = logits(spec, base, hidden)
    return _record(settings, state, jnp.broadcast_to(scores[:, None], (rows, group, vocab)))


@jax.jit
def _all(done: Array) -> Array:
    """Has every continuation ended? A scalar that every host can read, wherever the rows lie."""
    return done.all()


@functools.partial(jax.jit, static_argnames=("spec", "settings"), donate_argnames=("state",))
def proceed(spec: Spec, settings: SamplerConfig, base: Any, memory: Any, state: State, until: Array) -> State:
    """Samples on until `until` tokens stand in every continuation, or all have ended."""
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    angle_of = functools.partial(backbone(spec.backbone.model_type).rotary_angles, spec.backbone)

    def unfinished(state: State) -> Array:
        return (state.index < until) & ~state.done.all()

    def one_token(state: State) -> State:
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, state.index - 1, axis=2, keepdims=False)
        hidden, cache = step(spec, base, layers, memory, state.cache, tokens, ~state.done, angle_of)
        return _record(settings, dataclasses.replace(state, cache=cache), logits(spec, base, hidden))

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
        if index >= new or bool(_all(state.done)):
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
        found = hosts.fetch((state.tokens, state.logprobs, state.count))
        yield Generated(*(leaf[:, 0].copy() for leaf in found))  # the state's own memory goes to the next state


def generate(
    spec: Spec, base: Any, memory: Any, batch: Batch, settings: SamplerConfig, key: Array | None = None
) -> Generated:
    """Continues every prompt of a batch; arguments as for `states`."""
    *_, whole = stream(spec, base, memory, batch, settings, key, every=None)
    return whole
