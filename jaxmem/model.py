"""A backbone with its memories as pure functions of two trees: `base` (frozen) and `memory` (trainable).

Axis letters: B rows, T tokens, G continuations of a row, N tokens of one, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch, rows_at, shown_rows
from jaxmem.backbones.decoder import KeysValues, Observe, Remat, Stream
from jaxmem.backbones.layers import Look, rms_normalise
from jaxmem.backbones.ports import Ports, by_slot
from jaxmem.backbones.registry import backbone
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError
from jaxmem.memory import comem, fastv, vismem
from jaxmem.memory.registry import memory as memory_module
from jaxmem.spec import MemoryConfig, Spec


@flax.struct.dataclass
class Prompt:
    """A batch made ready for the decoder: what is computed once per prompt.

    Attributes:
      x: [B, T, D] embeddings with the visual rows in place.
      angle: [B, T, head_dim / 2] rotary angles.
      stream: places, documents and kinds of the tokens.
      states: per memory name, its per-prompt state (None where the prompt has no image).
      own: ports that act on prompts, never on generated tokens: the backbone's own (DeepStack) and those of memories
        that look at its features again (`Spec.looking`).
    """

    x: Array
    angle: Array
    stream: Stream
    states: dict[str, Any]
    own: Ports


def init_memory(key: Array, spec: Spec, base: Any = None) -> dict[str, Any]:
    """Fresh memories, {name: parameters}, for a backbone with the weights `base`, where known: with gates at zero the
    model equals its backbone."""
    keys = jax.random.split(key, max(1, len(spec.memories)))
    return {c.name: memory_module(c.name).init(k, c, base) for k, c in zip(keys, spec.memories, strict=False)}


def read_prompt(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    start: Array | int = 0,
    *,
    remat: Remat = False,
    dropout: Array | None = None,
) -> Prompt:
    """Looks at the images, embeds the tokens, puts vectors in front and prepares the memories.

    Args:
      spec: static.
      base, memory: the two trees.
      batch: prompts; `positions` are absolute.
      start: [B] or scalar, the place of the first token in its row's sequence (a later turn starts behind the last).
      remat, dropout: as in `hidden_states`, for the encoder of knowledge items.
    """
    lib, tower = backbone(spec.backbone.model_type), _tower(spec, base, memory, batch)
    visual = lib.see(spec.backbone, tower, batch, remat=remat not in (False, "none"), levels=spec.levels)
    stream, own = decoder.stream_of(batch, start), lib.own_ports(visual, batch)
    for config in spec.looking:
        own = own + memory_module(config.name).prompt_ports(config, _own(memory, config), base, visual, batch)
    rows = None if visual is None else shown_rows(visual.rows, batch)
    states = {
        c.name: memory_module(c.name).prepare(c, _own(memory, c), rows, jnp.asarray(batch.visual_rows), stream)
        for c in spec.memories
    }
    positions = batch.positions if spec.comem is None else comem.positions(spec.comem, batch)
    x = lib.embed(base, batch, visual)
    if batch.prefix_rows is not None:
        front = prefix(spec, base, memory, batch, remat=remat, dropout=dropout)
        x = jnp.where(jnp.asarray(batch.prefix_rows)[..., None] >= 0, rows_at(front, batch.prefix_rows), x)
    if batch.query_rows is not None:
        asked = query(spec, base, memory, batch, remat=remat, dropout=dropout)
        x = jnp.where(jnp.asarray(batch.query_rows)[..., None] >= 0, rows_at(asked, batch.query_rows), x)
    angle = lib.rotary_angles(spec.backbone, positions)
    if (config := fastv.among(spec.memories)) is not None and visual is not None:
        acting = own + memory_ports(spec, memory, states, stream)
        lost = fastv.dropped(config, spec.backbone.text, base["layers"], x, angle, stream, acting, batch)
        states[config.name] = lost
    return Prompt(x, angle, stream, states, own)


def _own(memory: Any, config: MemoryConfig) -> Any:
    """The parameters of a memory; trees leave out one that has none."""
    return memory.get(config.name, {})


def prefix(
    spec: Spec, base: Any, memory: Any, batch: Batch, *, remat: Remat = False, dropout: Array | None = None
) -> Array:
    """The vectors [B, S, D] that stand in front of the prompts; the port of CoMEM, and of a memory bank.

    Raises:
      ConfigError: items are still to be encoded and there is no CoMEM, or vectors have another width than the model.
    """
    if spec.comem is None and batch.vectors is None:
        raise ConfigError("the batch has knowledge items to encode and the model has no CoMEM; attach one")
    if spec.comem is None:
        found = jnp.asarray(batch.vectors).astype(base["embed"].dtype)
    else:
        own = memory[spec.comem.name]
        found = comem.vectors(spec.comem, spec.backbone, base, own, batch, remat=remat, dropout=dropout)
        found = found.astype(base["embed"].dtype)
    if found.shape[-1] != spec.backbone.text.width:
        raise ConfigError(
            f"vectors of width {found.shape[-1]} cannot stand in front of prompts of a model of width"
            f" {spec.backbone.text.width}: use the encoder of this model, or one with target_width"
        )
    return found


def query(
    spec: Spec, base: Any, memory: Any, batch: Batch, *, remat: Remat = False, dropout: Array | None = None
) -> Array:
    """The states [B, Q, D] of the prompts as CoMEM's encoder reads them; ConfigError without one."""
    if spec.comem is None:
        raise ConfigError("the batch has prompts for an encoder to read and the model has no CoMEM; attach one")
    found = comem.query(spec.comem, base, memory[spec.comem.name], batch, remat=remat, dropout=dropout)
    return found.astype(base["embed"].dtype)


def _tower(spec: Spec, base: Any, memory: Any, batch: Batch) -> Any:
    """The weights that see the images of prompts: the backbone's, or with the released code's switch the encoder's."""
    if spec.comem is None or spec.comem.query_tower == "frozen" or batch.prefix_rows is None:
        return base
    return comem.weights(spec.comem, base, memory[spec.comem.name])


def memory_ports(
    spec: Spec, memory: Any, states: dict[str, Any], stream: Stream, dropout: Array | None = None
) -> Ports:
    """The ports of all memories for the tokens of `stream`."""
    joined = Ports()
    for config in spec.memories:
        module = memory_module(config.name)
        joined = joined + module.ports(config, _own(memory, config), states[config.name], stream, dropout)
    return joined


def hidden_states(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    *,
    remat: Remat = False,
    backward_from: int = 0,
    dropout: Array | None = None,
) -> Array:
    """The decoder's output after the final norm, [B, T, D]: the forward of training.

    Args:
      spec: static.
      base: backbone weights.
      memory: {name: parameters}.
      batch: see `Batch`.
      remat: what of a layer is recomputed in the backward pass (`decoder.REMAT`).
      backward_from: where only memories train, `spec.first_port_layer` saves the backward pass below it; 0 when
        backbone weights train.
      dropout: random key for a memory's dropout; None in evaluation.
    """
    return observed(spec, base, memory, batch, None, remat=remat, backward_from=backward_from, dropout=dropout)[0]


def observed(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    observe: Observe | None,
    *,
    remat: Remat = False,
    backward_from: int = 0,
    dropout: Array | None = None,
) -> tuple[Array, Any]:
    """`hidden_states`, and what `observe(query, keys, values, mask)` says of each layer, stacked over layers."""
    prompt = read_prompt(spec, base, memory, batch, remat=remat, dropout=dropout)
    keys, late = fastv.keys_by_layer(spec.memories, prompt.stream, prompt.states, spec.backbone.text)
    x, (kept, _) = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        prompt.x,
        prompt.angle,
        lambda layer: decoder.among(prompt.stream, keys(*layer), observe),
        past=(late,),
        ports=prompt.own + memory_ports(spec, memory, prompt.states, prompt.stream, dropout),
        remat=remat,
        backward_from=backward_from,
    )
    return final_norm(spec, base, x), kept


@flax.struct.dataclass
class Read:
    """What a pass over prompts leaves for whatever follows them.

    Attributes:
      last: [B, D] state of each row's last token, after the final norm.
      past: keys and values [L, B, T, K, H] of every layer.
      stream: of the prompts' tokens.
      states: per memory name, its per-prompt state.
    """

    last: Array
    past: KeysValues
    stream: Stream
    states: dict[str, Any]


def read(spec: Spec, base: Any, memory: Any, batch: Batch, *, remat: Remat = False, backward_from: int = 0) -> Read:
    """Reads prompts once, for all of their continuations; arguments as for `hidden_states`."""
    prompt = read_prompt(spec, base, memory, batch, remat=remat)
    ports = prompt.own + memory_ports(spec, memory, prompt.states, prompt.stream)
    keys, late = fastv.keys_by_layer(spec.memories, prompt.stream, prompt.states, spec.backbone.text)
    keep = lambda leaf: constrain(leaf, "kept_keys")  # noqa: E731

    def look(layer: Any) -> Look:
        among = decoder.among(prompt.stream, keys(*layer))
        return lambda query, key, value: (among(query, key, value)[0], (keep(key), keep(value)))

    x, (past, remembered) = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        prompt.x,
        prompt.angle,
        look,
        past=(late,),
        ports=ports,
        remat=remat,
        backward_from=backward_from,
    )
    states = dict(prompt.states)
    for name, kept in by_slot(ports, remembered).items():
        states[name] = memory_module(name).keep(states[name], kept)
    if spec.vismem is not None:
        states |= {spec.vismem.name: seen(spec, base, batch, prompt.x, x)}
    last = jnp.take_along_axis(x, last_places(batch)[:, None, None], axis=1)[:, 0]
    return Read(final_norm(spec, base, last), past, prompt.stream, states)


def seen(spec: Spec, base: Any, batch: Batch, embedded: Array, x: Array) -> Any:
    """What VisMem keeps of prompts: embeddings and outputs [B, T, D] of the decoder."""
    assert spec.vismem is not None, "only VisMem looks at a prompt's last states"
    return vismem.seen(spec.vismem, batch, embedded, final_norm(spec, base, x))


def continuation_states(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    tokens: Array,
    lengths: Array,
    *,
    remat: Remat = False,
    backward_from: int = 0,
) -> Array:
    """The states that predict the tokens of G continuations per prompt, of which each prompt is computed once.

    Args:
      spec, base, memory, remat, backward_from: as in `hidden_states`.
      batch: prompts [B, T], padded on either side.
      tokens: [B, G, N] int32.
      lengths: [B, G] int32; tokens behind them are not looked at.

    Returns:
      [B, G, N, D]; entry n is the state in front of token n, after the final norm.
    """
    prompt = read(spec, base, memory, batch, remat=remat, backward_from=backward_from)
    x = embed_tokens(spec, base, memory, tokens)
    return follow(spec, base, memory, batch, prompt, x, lengths, remat=remat, backward_from=backward_from)


def follow(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    prompt: Read,
    embedded: Array,
    lengths: Array,
    *,
    remat: Remat = False,
    backward_from: int = 0,
) -> Array:
    """`continuation_states` of prompts that were read, for continuations given as embeddings [B, G, N, D]."""
    rows, group, new = embedded.shape[:3]
    stream = _continuing(batch, prompt.stream, lengths, new)
    behind = jnp.broadcast_to((next_position(spec, batch)[:, None] + jnp.arange(new))[:, None], (rows, group, new))
    positions = jnp.broadcast_to(behind.reshape(rows, 1, -1), (rows, 3, group * new))
    keys, late = fastv.keys_by_layer(spec.memories, prompt.stream, prompt.states, spec.backbone.text)
    x, _ = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        embedded.reshape(rows, group * new, -1),
        backbone(spec.backbone.model_type).rotary_angles(spec.backbone, positions),
        lambda layer: decoder.branching(keys(layer[0]), stream, group)(layer[1]),
        past=(late, prompt.past),
        ports=memory_ports(spec, memory, prompt.states, stream),
        remat=remat,
        backward_from=backward_from,
    )
    later = final_norm(spec, base, x).reshape(rows, group, new, -1)[:, :, :-1]
    first = jnp.broadcast_to(prompt.last[:, None, None], (rows, group, 1, later.shape[-1]))
    return jnp.concatenate([first, later], axis=2)


def _continuing(batch: Batch, trunk: Stream, lengths: Array, new: int) -> Stream:
    """The stream [B, G * N] of continuations of `new` slots each, side by side behind their prompts."""
    rows, group = lengths.shape
    place = jnp.arange(new, dtype=jnp.int32)
    document = jnp.max(trunk.segments, axis=1)[:, None, None]
    segments = jnp.where(place < lengths[..., None], document, 0).reshape(rows, -1)
    order = jnp.broadcast_to(last_places(batch)[:, None, None] + 1 + place, (rows, group, new)).reshape(rows, -1)
    return Stream(order.astype(jnp.int32), segments, jnp.zeros(segments.shape, bool), trunk.blind)


def last_places(batch: Batch) -> Array:
    """[B] index of each row's last valid token (0 for a row of padding)."""
    valid = jnp.asarray(batch.segments) > 0
    return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)


def next_position(spec: Spec, batch: Batch) -> Array:
    """[B] rotary position of the token behind each row, equal on all axes."""
    valid = jnp.asarray(batch.segments) > 0
    after = 1 + jnp.max(jnp.where(valid[:, None], jnp.asarray(batch.positions), -1), axis=(1, 2))
    return after if spec.comem is None else comem.next_position(spec.comem, batch, after)


def final_norm(spec: Spec, base: Any, x: Array) -> Array:
    """RMSNorm in front of the head, [..., D]."""
    return rms_normalise(x, spec.backbone.text.norm_eps) * base["norm"]["scale"].astype(x.dtype)


def unembedding(spec: Spec, base: Any) -> Array:
    """[V, D] rows of the head: the token embeddings themselves when tied."""
    return base["embed"] if spec.backbone.text.tied else base["head"]


def logits(spec: Spec, base: Any, hidden: Array) -> Array:
    """float32 [..., V] from normalised hidden states [..., D]; training computes them in chunks instead."""
    return jnp.einsum("...d,vd->...v", hidden, unembedding(spec, base), preferred_element_type=jnp.float32)


def next_logits(spec: Spec, base: Any, memory: Any, hidden: Array) -> Array:
    """`logits` of everything that can be sampled, [..., spec.vocab]: with VisMem its four tokens behind the
    tokenizer's, and no rows that stand for no token.

    On a mesh they are computed by rows of the head, and lie as they are drawn from: whole for each continuation.
    """
    scores, config = logits(spec, base, hidden), spec.vismem
    shape = scores.shape
    scores = constrain(constrain(scores.reshape(-1, shape[-1]), "next_logits"), "scores").reshape(shape)
    if config is None:
        return scores
    own = vismem.control_logits(config, memory[config.name], hidden)
    return jnp.concatenate([scores[..., : config.vocab], own], axis=-1)


def embed_tokens(spec: Spec, base: Any, memory: Any, tokens: Array) -> Array:
    """Embeddings [..., D] of sampled tokens [...], VisMem's among them."""
    config = spec.vismem
    if config is None:
        return base["embed"][tokens]
    return vismem.embed(config, memory[config.name], base["embed"], tokens)
