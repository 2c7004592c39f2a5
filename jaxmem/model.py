"""A backbone with its memories as pure functions of two trees: `base` (frozen) and `memory` (trainable).

Axis letters: B rows, T tokens, G continuations of a row, N tokens of one, D model width, V vocabulary.
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
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Observe, Stream
from jaxmem.backbones.layers import Look, rms_normalise
from jaxmem.backbones.ports import Ports
from jaxmem.backbones.registry import backbone
from jaxmem.memory.mlp_branch import MLPConfig
from jaxmem.memory.pvm import PVMConfig
from jaxmem.memory.registry import memory as memory_module

MemoryConfig = PVMConfig | MLPConfig


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is computed, without weights: hashable, a static argument of every compiled program."""

    backbone: BackboneConfig
    memories: tuple[MemoryConfig, ...] = ()

    @property
    def first_port_layer(self) -> int:
        """The lowest decoder layer that a memory acts on: below it no gradient of a memory flows."""
        return min((layer for config in self.memories for layer in config.layers), default=0)


@flax.struct.dataclass
class Prompt:
    """A batch made ready for the decoder: what is computed once per prompt.

    Attributes:
      x: [B, T, D] embeddings with the visual rows in place.
      angle: [B, T, head_dim / 2] rotary angles.
      stream: places, documents and kinds of the tokens.
      states: per memory name, its per-prompt state (None where the prompt has no image).
      own: the backbone's own ports (DeepStack): they act on prompts, never on generated tokens.
    """

    x: Array
    angle: Array
    stream: Stream
    states: dict[str, Any]
    own: Ports


def init_memory(key: Array, spec: Spec) -> dict[str, Any]:
    """Fresh memories, {name: parameters}: with gates at zero the model equals its backbone."""
    keys = jax.random.split(key, max(1, len(spec.memories)))
    return {c.name: memory_module(c.name).init(k, c) for k, c in zip(keys, spec.memories, strict=False)}


def read_prompt(spec: Spec, base: Any, memory: Any, batch: Batch, start: Array | int = 0) -> Prompt:
    """Looks at the images, embeds the tokens and prepares the memories.

    Args:
      spec: static.
      base, memory: the two trees.
      batch: prompts; `positions` are absolute.
      start: [B] or scalar, the place of the first token in its row's sequence (a later turn starts behind the last).
    """
    lib = backbone(spec.backbone.model_type)
    visual, stream = lib.see(spec.backbone, base, batch), decoder.stream_of(batch, start)
    rows = None if visual is None else visual.rows
    states = {
        c.name: memory_module(c.name).prepare(c, memory[c.name], rows, jnp.asarray(batch.visual_rows), stream)
        for c in spec.memories
    }
    angle = lib.rotary_angles(spec.backbone, batch.positions)
    return Prompt(lib.embed(base, batch, visual), angle, stream, states, lib.own_ports(visual, batch))


def memory_ports(
    spec: Spec, memory: Any, states: dict[str, Any], stream: Stream, dropout: Array | None = None
) -> Ports:
    """The ports of all memories for the tokens of `stream`."""
    joined = Ports()
    for config in spec.memories:
        module = memory_module(config.name)
        joined = joined + module.ports(config, memory[config.name], states[config.name], stream, dropout)
    return joined


def hidden_states(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    *,
    remat: bool = False,
    backward_from: int = 0,
    dropout: Array | None = None,
) -> Array:
    """The decoder's output after the final norm, [B, T, D]: the forward of training.

    Args:
      spec: static.
      base: backbone weights.
      memory: {name: parameters}.
      batch: see `Batch`.
      remat: recompute layers in the backward pass.
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
    remat: bool = False,
    backward_from: int = 0,
    dropout: Array | None = None,
) -> tuple[Array, Any]:
    """`hidden_states`, and what `observe(query, keys, values, mask)` says of each layer, stacked over layers."""
    look = lambda stream: decoder.dense(decoder.visible(stream, stream), observe)  # noqa: E731
    return _forward(spec, base, memory, batch, look, remat, backward_from, dropout)


def continuation_states(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    tokens: Array,
    lengths: Array,
    *,
    remat: bool = False,
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
    rows, group, new = tokens.shape
    trunk = batch.tokens.shape[1]
    look = lambda stream: decoder.branching(stream, trunk, group)  # noqa: E731
    extended = _continued(batch, tokens, lengths)
    states, _ = _forward(spec, base, memory, extended, look, remat, backward_from, None)
    index = last_places(batch)[:, None, None]
    first = jnp.take_along_axis(states, index, axis=1)[:, None]
    later = states[:, trunk:].reshape(rows, group, new, -1)[:, :, :-1]
    return jnp.concatenate([jnp.broadcast_to(first, (rows, group, 1, first.shape[-1])), later], axis=2)


def last_places(batch: Batch) -> Array:
    """[B] index of each row's last valid token (0 for a row of padding)."""
    valid = jnp.asarray(batch.segments) > 0
    return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)


def next_position(batch: Batch) -> Array:
    """[B] rotary position of the token behind each row, equal on all axes."""
    valid = jnp.asarray(batch.segments) > 0
    return 1 + jnp.max(jnp.where(valid[:, None], jnp.asarray(batch.positions), -1), axis=(1, 2))


def _continued(batch: Batch, tokens: Array, lengths: Array) -> Batch:
    """Prompts [B, T] with their continuations [B, G, N] side by side behind them: [B, T + G * N]."""
    rows, _, new = tokens.shape
    place = jnp.arange(new, dtype=jnp.int32)
    document = jnp.max(jnp.asarray(batch.segments), axis=1)[:, None, None]
    segments = jnp.where(place < lengths[..., None], document, 0)
    positions = jnp.broadcast_to(next_position(batch)[:, None, None] + place, tokens.shape)
    flat = lambda leaf: leaf.reshape(rows, -1)  # noqa: E731
    behind = lambda old, new: jnp.concatenate([jnp.asarray(old), new.astype(old.dtype)], axis=-1)  # noqa: E731
    return dataclasses.replace(
        batch,
        tokens=behind(batch.tokens, flat(tokens)),
        positions=behind(batch.positions, jnp.repeat(flat(positions)[:, None], 3, axis=1)),
        segments=behind(batch.segments, flat(segments)),
        loss_mask=behind(batch.loss_mask, jnp.zeros((rows, tokens[0].size))),
        visual_rows=behind(batch.visual_rows, jnp.full((rows, tokens[0].size), -1)),
    )


def _forward(
    spec: Spec,
    base: Any,
    memory: Any,
    batch: Batch,
    look: Callable[[Stream], Look],
    remat: bool,
    backward_from: int,
    dropout: Array | None,
) -> tuple[Array, Any]:
    """All layers over a batch whose tokens see what `look(stream)` shows them, and the final norm."""
    prompt = read_prompt(spec, base, memory, batch)
    x, (kept, _) = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        prompt.x,
        prompt.angle,
        look(prompt.stream),
        ports=prompt.own + memory_ports(spec, memory, prompt.states, prompt.stream, dropout),
        remat=remat,
        backward_from=backward_from,
    )
    return final_norm(spec, base, x), kept


def final_norm(spec: Spec, base: Any, x: Array) -> Array:
    """RMSNorm in front of the head, [..., D]."""
    return rms_normalise(x, spec.backbone.text.norm_eps) * base["norm"]["scale"].astype(x.dtype)


def unembedding(spec: Spec, base: Any) -> Array:
    """[V, D] rows of the head: the token embeddings themselves when tied."""
    return base["embed"] if spec.backbone.text.tied else base["head"]


def logits(spec: Spec, base: Any, hidden: Array) -> Array:
    """float32 [..., V] from normalised hidden states [..., D]; training computes them in chunks instead."""
    return jnp.einsum("...d,vd->...v", hidden, unembedding(spec, base), preferred_element_type=jnp.float32)
