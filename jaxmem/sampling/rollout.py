"""Rollouts: groups of sampled completions, with all that a trainer must know of how they came about.

The prompt of a group, its images, cache and memory state included, is computed once.
Axis letters: B prompts, G completions of each, N new tokens.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp

from jaxmem.backbones.batch import Array, Batch
from jaxmem.distributed import hosts
from jaxmem.memory import former
from jaxmem.model import Spec
from jaxmem.sampling.generate import states
from jaxmem.sampling.logits import SamplerConfig


@flax.struct.dataclass
class Rollout:
    """What was sampled, as numpy arrays, whole on every host.

    Attributes:
      tokens: [B, G, N] int32, pads behind the end.
      logprobs: [B, G, N] float32 over the full vocabulary at the sampling temperature, before any filter; 0 behind
        the end.
      kinds: [B, G, N] int8, a `Slot` each.
      lengths: [B, G] int32 slots in use, the stop token included.
      truncated: [B, G] bool, the limit came before a stop token.
      permits: [B, G, N] int8, bits 0 and 1: could a short, a long invocation be sampled in this slot? None without
        VisMem, or where it is off.
      memories: [B, G, I, M, D] float32 vectors that were inserted, by invocation; None likewise.
    """

    tokens: Array
    logprobs: Array
    kinds: Array
    lengths: Array
    truncated: Array
    permits: Array | None = None
    memories: Array | None = None


def rollout(
    spec: Spec, base: Any, memory: Any, batch: Batch, settings: SamplerConfig, key: Array, group: int
) -> Rollout:
    """Samples `group` completions of every prompt.

    Args:
      spec, settings: static.
      base, memory: the weights that sample.
      batch: prompts, B rows. A row of padding gets completions of length 0.
      key: one random key, or [B] keys of the prompts.
      group: G.

    Raises:
      DataError: prompt and completion do not fit into the backbone's positions, or a prompt has more visual states
        than VisMem takes (`former.check_spans`).
    """
    if spec.vismem is not None:
        former.check_spans(spec.vismem, batch)
    *_, last = states(spec, base, memory, batch, settings, key, group)
    inserted = last.insertions
    own = None if inserted is None else (inserted.permits, inserted.memories.astype(jnp.float32))
    found, own = hosts.fetch(((last.tokens, last.logprobs, last.kinds, last.count, last.done), own))
    tokens, logprobs, kinds, lengths, done = found
    return Rollout(tokens, logprobs, kinds, lengths, ~done, *(own or ()))
