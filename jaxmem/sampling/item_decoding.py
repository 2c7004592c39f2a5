"""Decoding behind the keys of knowledge items (`item_prefix`): one compiled loop until every row has ended.

In the chosen layers a question sees [items | itself], in the others itself alone. Its positions start at 0, as if there
were no items (arXiv 2505.17670, "VLM-as-Memory", as released).

Axis letters: B rows, T tokens, S slots, P keys in front of a row, N new tokens, G key heads, H head width, D model
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import KeysValues, Stream
from jaxmem.backbones.layers import Look, attend_branches
from jaxmem.backbones.registry import backbone
from jaxmem.distributed.mesh import constrain
from jaxmem.model import Spec, embed_tokens, final_norm, last_places, next_logits, next_position, read_prompt
from jaxmem.sampling.cache import Cache, Tail, fork
from jaxmem.sampling.generate import said
from jaxmem.sampling.item_prefix import Prefix
from jaxmem.sampling.logits import SamplerConfig, draw


@flax.struct.dataclass
class State:
    """What goes from token to token.

    Attributes:
      cache: of the questions, forked into one continuation each; in the chosen layers the items' keys stand in front.
      tokens: [B, N] int32, pad tokens where nothing was sampled.
      logprobs: [B, N] float32, 0 there.
      last: [B] int32 latest token.
      count: [B] int32 tokens, the stop token included.
      done: [B] bool.
      seen: [B, V] bool for the repetition penalty, or None.
      index: int32, tokens taken by the rows that go on.
    """

    cache: Cache
    tokens: Array
    logprobs: Array
    last: Array
    count: Array
    done: Array
    seen: Array | None
    index: Array


@functools.partial(jax.jit, static_argnames=("spec", "settings", "seen_in"))
def answer(
    spec: Spec, settings: SamplerConfig, seen_in: tuple[int, ...], base: Any, batch: Batch, prefix: Prefix, keys: Array
) -> tuple[Array, Array, Array]:
    """Reads the questions behind the items' keys and continues them until every row has ended.

    Args:
      spec, settings: static.
      seen_in: the N layers that the prefix belongs to (static).
      base: the backbone's weights.
      batch: questions, right-padded.
      prefix: of `item_keys`.
      keys: [B] random keys.

    Returns:
      tokens [B, N] int32, their logprobs [B, N] float32 and the number of them, [B] int32.
    """
    rows, new, vocab = len(keys), settings.max_new_tokens, spec.vocab
    hidden, cache, front = prefill(spec, seen_in, base, batch, prefix)
    state = State(
        cache=fork(cache, 1, new),
        tokens=jnp.full((rows, new), settings.pad_token, jnp.int32),
        logprobs=jnp.zeros((rows, new), jnp.float32),
        last=jnp.zeros(rows, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        done=cache.segment == 0,  # a row of padding has nothing to say
        seen=said(batch, vocab) if settings.repetition_penalty != 1 else None,
        index=jnp.int32(0),
    )
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)  # of the only member of its group, as in `generate.states`
    state = _record(settings, own, state, next_logits(spec, base, {}, hidden))
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)

    def one_token(state: State) -> State:
        hidden, cache = _step(spec, seen_in, base, layers, state, front)
        return _record(settings, own, dataclasses.replace(state, cache=cache), next_logits(spec, base, {}, hidden))

    state = jax.lax.while_loop(lambda state: (state.index < new) & ~state.done.all(), one_token, state)
    return state.tokens, state.logprobs, state.count


def prefill(
    spec: Spec, seen_in: tuple[int, ...], base: Any, batch: Batch, prefix: Prefix
) -> tuple[Array, Cache, Stream]:
    """Reads the questions.

    Args:
      spec, seen_in, base, batch, prefix: as in `answer`.

    Returns:
      [B, D] normalised hidden state of each row's last token; the cache, whose keys in the chosen layers are P longer
      than its stream says; and the stream [B, P + T] of those layers.
    """
    text = spec.backbone.text
    prompt = read_prompt(spec, base, {}, batch)
    front = behind(prefix, prompt.stream)
    slots = np.full(text.layers, -1, np.int32)
    slots[list(seen_in)] = np.arange(len(seen_in))

    def look(slot: Array) -> Look:
        def attend_and_keep(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
            def with_items() -> Array:
                joined = (
                    jnp.concatenate([old[slot], own], 1) for old, own in ((prefix.keys, key), (prefix.values, value))
                )
                return decoder.among(prompt.stream, front)(query, *joined)[0]

            alone = lambda: decoder.among(prompt.stream, prompt.stream)(query, key, value)[0]  # noqa: E731
            return jax.lax.cond(slot >= 0, with_items, alone), (key, value)

        return attend_and_keep

    x, ((keys, values), _) = decoder.scan_layers(
        text, base["layers"], prompt.x, prompt.angle, look, past=jnp.asarray(slots), ports=prompt.own
    )

    def trunk(layer: int, own: Array, items: Array) -> Array:
        joined = own[layer] if slots[layer] < 0 else jnp.concatenate([items[slots[layer]], own[layer]], axis=1)
        return constrain(jnp.swapaxes(joined, 1, 2), "trunk_keys")

    places = last_places(batch)
    cache = Cache(
        layers=tuple((trunk(i, keys, prefix.keys), trunk(i, values, prefix.values)) for i in range(text.layers)),
        stream=prompt.stream,
        length=places + 1,
        position=next_position(spec, batch),
        segment=jnp.max(prompt.stream.segments, axis=1),
        states={},
    )
    last = jnp.take_along_axis(x, places[:, None, None], axis=1)[:, 0]
    return final_norm(spec, base, last), cache, front


def behind(prefix: Prefix, stream: Stream) -> Stream:
    """The stream [B, P + T] of a prefix and what follows it: every token of a row sees all of its items."""
    document = jnp.where(prefix.valid, jnp.max(stream.segments, axis=1)[:, None], 0)
    before = lambda front, leaf: jnp.concatenate([front.astype(leaf.dtype), leaf], axis=1)  # noqa: E731
    return dataclasses.replace(
        stream,
        order=before(jnp.full(document.shape, -1), stream.order),
        segments=before(document, stream.segments),
        is_visual=before(jnp.zeros(document.shape), stream.is_visual),
    )


def _step(
    spec: Spec, seen_in: tuple[int, ...], base: Any, layers: tuple[Any, ...], state: State, front: Stream
) -> tuple[Array, Cache]:
    """[B, D] normalised hidden states of the latest tokens, and the longer cache."""
    cache, tail = state.cache, state.cache.tail
    assert tail is not None, "the cache was forked in front of the loop"
    place = state.index - 1  # of the latest token in every row that goes on
    segments = jnp.where(state.done, 0, cache.segment)[:, None]
    stream = Stream(cache.length[:, None] + place, segments, jnp.zeros(segments.shape, bool), cache.stream.blind)
    written = jax.lax.dynamic_update_slice_in_dim(tail.segments, segments[..., None], place, axis=2)
    own_mask = ((written == segments[..., None]) & (segments > 0)[..., None])[:, :, None]
    masks = [decoder.visible(stream, keys)[:, :, None] for keys in (cache.stream, front)]

    def look(trunk: KeysValues, own: KeysValues, mask: Array) -> Look:
        def write_and_look(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
            put = lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
                leaf, part[:, :, :, None].astype(leaf.dtype), place, axis=3
            )
            kept = put(own[0], key), put(own[1], value)
            return attend_branches(query[:, :, None], trunk, kept, mask, own_mask)[:, :, 0], kept

        return write_and_look

    positions = jnp.broadcast_to((cache.position + place)[:, None, None], (len(segments), 3, 1))
    looks = [look(*pair, masks[i in seen_in]) for i, pair in enumerate(zip(cache.layers, tail.layers, strict=True))]
    x, kept = decoder.loop_layers(
        spec.backbone.text,
        layers,
        embed_tokens(spec, base, {}, state.last[:, None]),
        backbone(spec.backbone.model_type).rotary_angles(spec.backbone, positions),
        looks,
        place="token",
    )
    longer = dataclasses.replace(cache, tail=Tail(kept, written, tail.index + 1))
    return final_norm(spec, base, constrain(x, "token"))[:, 0], longer


def _record(settings: SamplerConfig, keys: Array, state: State, scores: Array) -> State:
    """Draws a token for every row that goes on and writes it down; keys [B], scores [B, V]."""
    live = ~state.done
    each = jax.vmap(jax.random.fold_in, (0, None))(keys, state.index)
    drawn, logprob = draw(settings, each, scores, state.seen)
    tokens = jnp.where(live, drawn, settings.pad_token)
    stops = jnp.isin(tokens, jnp.asarray(settings.stop_tokens, jnp.int32)) if settings.stop_tokens else False
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[:, state.index].set(tokens),
        logprobs=state.logprobs.at[:, state.index].set(jnp.where(live, logprob, 0)),
        last=tokens,
        count=state.count + live,
        done=state.done | (live & stops),
        seen=None if state.seen is None else state.seen | jax.nn.one_hot(drawn, state.seen.shape[-1], dtype=bool),
        index=state.index + 1,
    )
