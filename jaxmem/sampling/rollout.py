"""Rollouts: groups of sampled completions, with all that a trainer must know of how they came about.

The prompt of a group, its images, cache and memory state included, is computed once.
Axis letters: B prompts, G completions of each, N new tokens.
"""

from __future__ import annotations

import enum
from typing import Any

import flax.struct
import numpy as np

from jaxmem.backbones.batch import Array, Batch
from jaxmem.distributed import hosts
from jaxmem.model import Spec
from jaxmem.sampling.generate import states
from jaxmem.sampling.logits import SamplerConfig


class Slot(enum.IntEnum):
    """What a slot of a completion holds, and so whether the policy answers for it: only sampled text has a ratio."""

    EMPTY = 0
    TEXT = 1
    FORCED = 2
    MEMORY = 3


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
    """

    tokens: Array
    logprobs: Array
    kinds: Array
    lengths: Array
    truncated: Array


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
      DataError: prompt and completion do not fit into the backbone's positions.
    """
    *_, last = states(spec, base, memory, batch, settings, key, group)
    tokens, lengths, logprobs, done = hosts.fetch((last.tokens, last.count, last.logprobs, last.done))
    sampled = np.arange(tokens.shape[2]) < lengths[..., None]
    kinds = np.where(sampled, np.int8(Slot.TEXT), np.int8(Slot.EMPTY))
    return Rollout(tokens, logprobs, kinds, lengths, ~done)
