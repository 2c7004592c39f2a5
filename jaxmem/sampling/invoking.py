"""When a continuation may call for a memory: settings, the masks of constrained decoding, and forced invocations.

Source: VisMem (arXiv 2511.11007), with the rules of constrained decoding that the paper leaves open: end tokens are
never sampled; an invocation needs ordinary tokens since the last memory, a place under the limit, and room for all of
its slots.
Axis letters: B prompts, G continuations of each, V tokens that can be sampled.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.errors import ConfigError
from jaxmem.memory.vismem import TYPES, VisMemConfig

MODES = ("free", "random", "off")
CONTENTS = ("memory", "zero", "noise", "shuffle")


@dataclasses.dataclass(frozen=True)
class InvokeConfig:
    """How memories are called for while decoding (static).

    Attributes:
      mode: "free": the policy samples invocation tokens; "random": they are forced at random places and never sampled
        (Stage I); "off": never, and the output is the backbone's.
      probability: of a forced invocation at a place where one may stand.
      anywhere: forced invocations may stand behind every token; else behind `delimiters` alone.
      delimiters: token ids whose text ends with a delimiter.
      max_invocations: per continuation.
      min_gap: ordinary tokens between an end token and the next invocation.
      disabled: types ("short", "long") that are switched off, by `disabled_mode`: "skip": the token stays, no memory
        and no end token follow; "mask": the token cannot be sampled.
      reverse: the other type's memory and end token follow each invocation (the penalty p_type).
      content: "memory", or a control that tells information from mere computation: "zero" vectors, "noise" of the
        memory's size, or "shuffle", memories formed of the next prompt's images.
      rows_at_once: continuations (of each of the mesh's data x fsdp ways) whose memories are formed together.
      prefix_cache: a former keeps the keys and values of the visual states.
    """

    mode: Literal["free", "random", "off"] = "free"
    probability: float = 0.5
    anywhere: bool = False
    delimiters: tuple[int, ...] = ()
    max_invocations: int = 5
    min_gap: int = 1
    disabled: tuple[str, ...] = ()
    disabled_mode: Literal["skip", "mask"] = "skip"
    reverse: bool = False
    content: Literal["memory", "zero", "noise", "shuffle"] = "memory"
    rows_at_once: int = 1
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        faults = {
            f"mode {self.mode!r} is none of {', '.join(MODES)}": self.mode not in MODES,
            f"content {self.content!r} is none of {', '.join(CONTENTS)}": self.content not in CONTENTS,
            f"disabled {self.disabled} may hold {' and '.join(TYPES)} alone": not set(self.disabled) <= set(TYPES),
            f"disabled_mode {self.disabled_mode!r} is none of skip, mask": self.disabled_mode not in ("skip", "mask"),
            f"probability must lie in [0, 1], got {self.probability}": not 0 <= self.probability <= 1,
            "max_invocations and rows_at_once must be at least 1, min_gap not negative": (
                min(self.max_invocations, self.rows_at_once) < 1 or self.min_gap < 0
            ),
            "mode 'random' needs delimiters, or anywhere=True": (
                self.mode == "random" and not self.anywhere and not self.delimiters
            ),
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("invoke: " + "; ".join(wrong))

    @property
    def skipped(self) -> tuple[bool, bool]:
        """Short, long: does nothing follow this type's token?"""
        off = self.disabled_mode == "skip"
        return tuple(off and name in self.disabled for name in TYPES)  # pyrefly: ignore

    @property
    def masked(self) -> tuple[bool, bool]:
        """Short, long: can this type's token never stand?"""
        return tuple(self.disabled_mode == "mask" and name in self.disabled for name in TYPES)  # pyrefly: ignore


def fitting(config: VisMemConfig, invoke: InvokeConfig, count: Array, invoked: Array, gap: Array, limit: int) -> Array:
    """[B, G, 2] bool: may a short, a long invocation stand in the next slot?

    Args:
      config, invoke: static.
      count: [B, G] slots in use.
      invoked: [B, G] invocations so far.
      gap: [B, G] ordinary tokens since the last memory.
      limit: slots of a continuation.
    """
    sizes = config.sizes[::-1] if invoke.reverse else config.sizes
    # A skipped type takes one slot, and one more so that an answer can follow.
    needed = [2 if off else size + 2 for size, off in zip(sizes, invoke.skipped, strict=True)]
    allowed = (invoked < invoke.max_invocations) & (gap >= invoke.min_gap)
    room = limit - count[..., None] >= jnp.asarray(needed)
    return allowed[..., None] & room & ~jnp.asarray(invoke.masked)


def permitted(config: VisMemConfig, scores: Array, fits: Array) -> Array:
    """Logits [..., V] with -inf for end tokens, and for invocation tokens that do not fit; fits [..., 2] bool."""
    never = jnp.zeros(fits.shape[:-1], bool)
    control = jnp.stack([fits[..., 0], never, fits[..., 1], never], axis=-1)
    return jnp.concatenate(
        [scores[..., : config.vocab], jnp.where(control, scores[..., config.vocab :], -jnp.inf)], axis=-1
    )


def forced(config: VisMemConfig, invoke: InvokeConfig, keys: Array, last: Array, fits: Array) -> tuple[Array, Array]:
    """Random invocations (section 3.4, Stage I): of either type with probability one half.

    Args:
      config, invoke: static.
      keys: [B, G] random keys.
      last: [B, G] int32 token in front of the place.
      fits: [B, G, 2] of `fitting`.

    Returns:
      [B, G] bool, is an invocation forced here; [B, G] int32 its type.
    """

    def chances(key: Array) -> tuple[Array, Array]:
        one, other = jax.random.split(key)
        return jax.random.uniform(one), jax.random.bernoulli(other).astype(jnp.int32)

    chance, kind = jax.vmap(jax.vmap(chances))(keys)
    here = jnp.ones(last.shape, bool) if invoke.anywhere else jnp.isin(last, jnp.asarray(invoke.delimiters, jnp.int32))
    fits_kind = jnp.take_along_axis(fits, kind[..., None], axis=-1)[..., 0]
    return here & (chance < invoke.probability) & fits_kind, kind
