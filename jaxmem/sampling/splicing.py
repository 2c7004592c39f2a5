"""Recorded continuations with memories, as a training forward sees them: embeddings by slot, and what each memory was
formed of.

Axis letters: B prompts, G continuations of each, N slots, I memories of a continuation, M vectors of the longer memory,
Z text states of one memory, D model width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.batch import Array
from jaxmem.backbones.decoder import Remat
from jaxmem.distributed.mesh import members_as_rows, ways
from jaxmem.memory import former
from jaxmem.memory.former import Seen
from jaxmem.memory.vismem import VisMemConfig
from jaxmem.model import Read, Spec, embed_tokens
from jaxmem.sampling.slots import Slot


@flax.struct.dataclass
class Spliced:
    """Where the memories of recorded continuations stand (numpy, made on the host).

    Attributes:
      place: [B, G, N] int32: i * M + j for vector j of memory i, -1 for a slot with a token.
      types: [B, G, I] int32 of the memory that was formed: 0 short, 1 long, -1 where there is none.
      text: [B, G, I, Z] int32: the state in front of this slot belongs to the text that memory i is formed of; -1
        fills up on the left. The state behind a slot is the one in front of the next.
      control: [B, G, N, 4] bool, which control tokens could be sampled in a slot.
    """

    place: Array
    types: Array
    text: Array
    control: Array


def locate(config: VisMemConfig, tokens: np.ndarray, kinds: np.ndarray, permits: np.ndarray, most: int) -> Spliced:
    """Reads recorded slots.

    Args:
      config: static.
      tokens, kinds, permits: [B, G, N] of a rollout.
      most: memories of a continuation that there is room for, I.

    Returns:
      Spliced, with Z a power of 4 times 16 that holds the longest text, at most `text_cap`.
    """
    rows, group, slots = kinds.shape
    place = np.full(kinds.shape, -1, np.int32)
    types = np.full((rows, group, most), -1, np.int32)
    spans: dict[tuple[int, int, int], tuple[int, int]] = {}
    for row, member in np.argwhere((kinds == Slot.MEMORY).any(axis=-1)):
        found = _memories(config, tokens[row, member], kinds[row, member])
        first = 0
        for nth, (start, end, kind) in found.items():
            place[row, member, start:end] = nth * config.longest + np.arange(end - start)
            types[row, member, nth] = kind
            spans[row, member, nth] = (first, start)  # the state behind the invocation token, too
            first = end + 1
    size = text_room(config, max((last - first + 1 for first, last in spans.values()), default=1))
    text = np.full((rows, group, most, size), -1, np.int32)
    for where, (first, last) in spans.items():
        states = np.arange(max(first, last - size + 1), last + 1)
        text[where][size - len(states) :] = states
    control = np.zeros((rows, group, slots, 4), bool)
    control[..., 0], control[..., 2] = permits & 1, permits & 2
    return Spliced(place, types, text, control)


def text_room(config: VisMemConfig, longest: int) -> int:
    """Z where the longest text of a memory has so many states: few sizes, few programs."""
    size = 16
    while size < longest:
        size *= 4
    return min(size, config.text_cap)


def _memories(config: VisMemConfig, tokens: np.ndarray, kinds: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """{number of the invocation: (first vector, end token, type)} of one continuation [N], as rollouts number them:
    invocations of a type that is skipped count."""
    calls = np.cumsum(np.isin(kinds, (Slot.FORCED, Slot.INVOKE))) - 1
    found = {}
    for end in np.flatnonzero(kinds == Slot.END):
        kind = config.end_ids.index(int(tokens[end]))
        found[int(calls[end])] = (int(end) - config.sizes[kind], int(end), kind)
    return found


def embeddings(spec: Spec, base: Any, memory: Any, tokens: Array, memories: Array, place: Array) -> Array:
    """[B, G, N, D]: tokens [B, G, N] embedded, and memories [B, G, I, M, D] in their places."""
    x = embed_tokens(spec, base, memory, jnp.asarray(tokens))
    flat = memories.reshape(*memories.shape[:2], -1, memories.shape[-1]).astype(x.dtype)
    place = jnp.asarray(place)
    vectors = jnp.take_along_axis(flat, jnp.maximum(place, 0)[..., None], axis=2)
    return jnp.where((place >= 0)[..., None], vectors, x)


def formed(
    spec: Spec, base: Any, memory: Any, prompt: Read, states: Array, spliced: Spliced, *, remat: Remat = "full"
) -> Array:
    """All memories again, from the states that they were formed of.

    Args:
      spec, base, memory: as everywhere; gradients flow into VisMem's parameters.
      prompt: of `model.read`.
      states: [B, G, N, D] in front of the slots, computed with the memories as they were recorded.
      spliced: of `locate`.
      remat: what of a layer a backward pass recomputes.

    Returns:
      [B, G, I, M, D]; zeros where there is no memory.
    """
    config = spec.vismem
    assert config is not None, "memories are VisMem's"
    rows, group, most = spliced.types.shape
    visual = prompt.states[config.name]
    each = jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), visual)
    own = members_as_rows() if group % ways("sequence") == 0 else contextlib.nullcontext()
    flat = states.reshape(rows * group, *states.shape[2:])

    def one(piece: tuple[Array, Array]) -> Array:
        kind, index = (leaf.reshape(rows * group, *leaf.shape[2:]) for leaf in piece)

        def form() -> Array:
            valid = index >= 0
            found = jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)
            text = Seen(jnp.where(valid[..., None], found, 0), valid)
            made = former.form(
                config, spec.backbone, base, memory[config.name], each, text, jnp.maximum(kind, 0), remat=remat
            )
            return jnp.where((kind >= 0)[:, None, None], made, 0)

        nothing = jnp.zeros((rows * group, config.longest, config.width), states.dtype)
        return jax.lax.cond((kind >= 0).any(), form, lambda: nothing)

    pieces = jnp.moveaxis(jnp.asarray(spliced.types), 2, 0), jnp.moveaxis(jnp.asarray(spliced.text), 2, 0)
    with own:  # each device of the sequence forms memories of its own completions
        made = jax.lax.map(jax.checkpoint(one), pieces)
    return jnp.moveaxis(made.reshape(most, rows, group, config.longest, -1), 0, 2)
