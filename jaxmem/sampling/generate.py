"""Generation: prefill, then one compiled loop until every row has ended.

Axis letters: B rows, N new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.registry import backbone
from jaxmem.model import Spec, logits
from jaxmem.sampling.cache import Cache, prefill, require_room, step
from jaxmem.sampling.logits import SamplerConfig, draw


@flax.struct.dataclass
class State:
    """One state carries everything from token to token.

    Attributes:
      cache: what the rows have seen.
      tokens: [B, N] int32, pad tokens where nothing was sampled yet or the row has ended.
      logprobs: [B, N] float32, 0 there.
      count: [B] int32 sampled tokens, the stop token included.
      done: [B] bool.
      keys: [B] random keys of the rows.
      seen: [B, V] bool for the repetition penalty, or None.
      index: int32, tokens sampled so far by the rows that are not done.
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
    """Draws a token for every row that goes on and writes it down."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.index)
    drawn, logprob = draw(settings, keys, scores, state.seen)
    tokens = jnp.where(state.done, settings.pad_token, drawn)
    stops = jnp.isin(tokens, jnp.asarray(settings.stop_tokens, jnp.int32)) if settings.stop_tokens else False
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(tokens)), drawn].set(True)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, tokens[:, None], state.index, axis=1),
        logprobs=jax.lax.dynamic_update_slice_in_dim(
            state.logprobs, jnp.where(state.done, 0.0, logprob)[:, None], state.index, axis=1
        ),
        count=state.count + ~state.done,
        done=state.done | stops,
        seen=seen,
        index=state.index + 1,
    )


@functools.partial(jax.jit, static_argnames=("spec", "settings", "size"))
def start(spec: Spec, settings: SamplerConfig, size: int, base: Any, memory: Any, batch: Batch, keys: Array) -> State:
    """Prefills a cache of `size` slots and samples the first token of every row."""
    hidden, cache = prefill(spec, base, memory, batch, size)
    rows, vocab = batch.tokens.shape[0], spec.backbone.text.vocab
    seen = None
    if settings.repetition_penalty != 1:
        index = jnp.where(jnp.asarray(batch.segments) > 0, batch.tokens, vocab)
        seen = jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], index].set(True, mode="drop")
    state = State(
        cache=cache,
        tokens=jnp.full((rows, settings.max_new_tokens), settings.pad_token, jnp.int32),
        logprobs=jnp.zeros((rows, settings.max_new_tokens), jnp.float32),
        count=jnp.zeros(rows, jnp.int32),
        done=cache.segment == 0,  # a row of padding has nothing to say
        keys=keys,
        seen=seen,
        index=jnp.int32(0),
    )
    return _record(settings, state, logits(spec, base, hidden))


@functools.partial(jax.jit, static_argnames=("spec", "settings"), donate_argnames=("state",))
def proceed(spec: Spec, settings: SamplerConfig, base: Any, memory: Any, state: State, until: Array) -> State:
    """Samples on until `until` tokens stand in every row, or all rows have ended."""
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    angle_of = functools.partial(backbone(spec.backbone.model_type).rotary_angles, spec.backbone)

    def unfinished(state: State) -> Array:
        return (state.index < until) & ~state.done.all()

    def one_token(state: State) -> State:
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, state.index - 1, axis=1, keepdims=False)
        hidden, cache = step(spec, base, layers, memory, state.cache, tokens, ~state.done, angle_of)
        return _record(settings, dataclasses.replace(state, cache=cache), logits(spec, base, hidden))

    return jax.lax.while_loop(unfinished, one_token, state)


def stream(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    settings: SamplerConfig,
    key: Array | None = None,
    every: int = 8,
) -> Iterator[Generated]:
    """Yields what is there after every few tokens; the last item is the whole answer.

    Args:
      spec, settings: static.
      base, memory: the two trees.
      batch: prompts.
      key: one random key, or [B] keys of the rows; None is a fixed one.
      every: tokens between two items.

    Raises:
      DataError: prompt and answer do not fit into the cache or the backbone's positions.
    """
    width, new = batch.tokens.shape[1], settings.max_new_tokens
    size = settings.cache_size or width + new
    require_room(spec, width, new, size)
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, batch.tokens.shape[0]) if jnp.ndim(key) == 0 else key
    state = start(spec, settings, size, base, memory, batch, keys)
    while True:
        yield Generated(np.array(state.tokens), np.array(state.logprobs), np.array(state.count))  # state is donated
        index = int(state.index)
        if index >= new or bool(np.all(state.done)):
            return
        state = proceed(spec, settings, base, memory, state, min(new, index + every))


def generate(
    spec: Spec, base: Any, memory: Any, batch: Batch, settings: SamplerConfig, key: Array | None = None
) -> Generated:
    """Continues every prompt of a batch; arguments as for `stream`."""
    *_, whole = stream(spec, base, memory, batch, settings, key, every=settings.max_new_tokens)
    return whole
