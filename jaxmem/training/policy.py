"""The policy-gradient losses of GRPO and its relatives: one function and a table.

Every loss is a sum over sampled tokens of a clipped surrogate of the ratio between the new and the sampling policy,
divided once by a number that the table names. Sums and divisors add over microbatches, so accumulation is exact.

Axis letters: R rows (completions), N new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.config import choose
from jaxmem.errors import ConfigError

Normaliser = Literal["sequence", "microbatch", "constant", "tokens"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One line of the table of losses.

    Attributes:
      ratio: "token", or "sequence": the geometric mean of a row's token ratios stands for all its tokens.
      surrogate: "clip" is the pessimistic clipped ratio of PPO; "cispo" weighs the log-probability by a capped,
        constant ratio, so that no token loses its gradient.
      normaliser: what the sum of token losses is divided by: "sequence" averages tokens within a row, then rows;
        "microbatch" averages the tokens of each microbatch, then microbatches; "constant" divides by rows times the
        longest allowed completion; "tokens" averages all tokens of the step.
      source: where it was published.
    """

    ratio: Literal["token", "sequence"]
    surrogate: Literal["clip", "cispo"]
    normaliser: Normaliser
    source: str


LOSSES: Mapping[str, Recipe] = {
    "grpo": Recipe("token", "clip", "sequence", "DeepSeekMath, arXiv 2402.03300"),
    "bnpo": Recipe("token", "clip", "microbatch", "Beta normalization policy optimization, arXiv 2506.02864"),
    "dr_grpo": Recipe("token", "clip", "constant", "Understanding R1-Zero-like training, arXiv 2503.20783"),
    "dapo": Recipe("token", "clip", "tokens", "DAPO, arXiv 2503.14476"),
    "gspo": Recipe("sequence", "clip", "sequence", "Group sequence policy optimization, arXiv 2507.18071"),
    "cispo": Recipe("token", "cispo", "tokens", "MiniMax-M1, arXiv 2506.13585"),
}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss.

    Attributes:
      kind: a key of `LOSSES`.
      clip_low: ratios below 1 - clip_low are clipped where the advantage is negative.
      clip_high: ratios above 1 + clip_high are clipped where it is positive; None takes clip_low. For "cispo" the
        ratio itself is capped at clip_high, so it has no default there.
      dual_clip: largest ratio that counts where the advantage is negative (above 1 + clip_high); None sets no limit.
      kl_weight: weight of the divergence from the reference policy (k3 estimator); 0 needs no reference.
      normaliser: replaces the table's.
    """

    kind: str = "dapo"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_weight: float = 0.0
    normaliser: Normaliser | None = None

    def __post_init__(self) -> None:
        recipe = choose(LOSSES, self.kind, "loss.kind")
        if recipe.surrogate == "cispo" and self.clip_high is None:
            raise ConfigError("loss.clip_high: cispo caps the ratio itself at this value; set it, for example to 5.0")
        faults = {
            f"loss.clip_low must lie in [0, 1], got {self.clip_low}": not 0 <= self.clip_low <= 1,
            f"loss.clip_high must not be negative, got {self.high}": self.high < 0,
            f"loss.kl_weight must not be negative, got {self.kl_weight}": self.kl_weight < 0,
            f"loss.dual_clip {self.dual_clip} must exceed 1 + clip_high = {1 + self.high}": (
                self.dual_clip is not None and self.dual_clip <= 1 + self.high
            ),
            "loss.dual_clip: cispo has a single cap, clip_high": (
                self.dual_clip is not None and recipe.surrogate == "cispo"
            ),
            f"loss.normaliser {self.normaliser!r} weighs rows by their length, which contradicts the sequence-level"
            f' ratio of {self.kind!r}; leave it at None or "sequence"': (
                recipe.ratio == "sequence" and self.normaliser not in (None, "sequence")
            ),
            f"loss.normaliser {self.normaliser!r} is none of sequence, microbatch, constant, tokens": (
                self.normaliser not in (None, "sequence", "microbatch", "constant", "tokens")
            ),
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("; ".join(wrong))

    @property
    def recipe(self) -> Recipe:
        """The table's line, with `normaliser` replaced if asked."""
        recipe = LOSSES[self.kind]
        return dataclasses.replace(recipe, normaliser=self.normaliser or recipe.normaliser)

    @property
    def high(self) -> float:
        """The upper clip in force."""
        return self.clip_low if self.clip_high is None else self.clip_high


class PolicySums(NamedTuple):
    """Scalars of a microbatch that add over microbatches: the step's loss is `loss / denominator`.

    They have the dtype of the log-probabilities, float32 at least; counts are float32.

    Attributes:
      loss, denominator: numerator and divisor of the loss.
      tokens: sampled tokens that count.
      kl: sum of k3 over the tokens that count.
      clipped_low, clipped_high: tokens whose ratio was clipped from below and from above.
    """

    loss: jax.Array
    denominator: jax.Array
    tokens: jax.Array
    kl: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array


def policy_loss(
    config: LossConfig,
    logprobs: jax.Array,
    old: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    max_length: int,
    reference: jax.Array | None = None,
) -> PolicySums:
    """The loss of sampled completions.

    Args:
      config: which loss (static).
      logprobs: [R, N] float32 of the sampled tokens under the policy that trains; differentiable.
      old: [R, N] float32 under the policy that sampled.
      advantages: [R] float32.
      mask: [R, N] 1 where a sampled token counts. Rows that shall not count (truncated, groups without signal) are 0
        throughout, and then absent from every divisor.
      max_length: longest allowed completion, for the normaliser "constant".
      reference: [R, N] float32 under the reference policy; needed when `kl_weight` is not 0.

    Returns:
      PolicySums.

    Raises:
      ValueError: `kl_weight` without a reference.
    """
    dtype = jnp.promote_types(logprobs.dtype, jnp.float32)
    logprobs, mask, advantages = logprobs.astype(dtype), mask.astype(dtype), advantages.astype(dtype)[:, None]
    counted = jnp.where(mask > 0, logprobs - jax.lax.stop_gradient(old), 0.0)
    log_ratio = counted
    if config.recipe.ratio == "sequence":
        mean = jnp.sum(counted * mask, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        log_ratio = jnp.broadcast_to(mean, counted.shape)
    loss, low, high = _surrogate(config, jnp.exp(log_ratio), logprobs, advantages)
    divergence = jnp.zeros_like(loss)
    if config.kl_weight:
        if reference is None:
            raise ValueError("kl_weight is not 0, so policy_loss needs the reference's log-probabilities")
        divergence = k3(logprobs, jax.lax.stop_gradient(reference), mask)
        loss = loss + config.kl_weight * divergence
    numerator, denominator = _normalised(config.recipe.normaliser, jnp.where(mask > 0, loss, 0.0), mask, max_length)
    total = lambda leaf: jax.lax.stop_gradient(jnp.sum(leaf * mask))  # noqa: E731
    return PolicySums(numerator, denominator, jnp.sum(mask), total(divergence), total(low), total(high))


def k3(logprobs: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = reference - logprobs: an unbiased, never negative estimate of KL(policy || reference).

    All [R, N]; 0 outside the mask. Source: Schulman, "Approximating KL divergence" (2020).
    """
    difference = jnp.where(mask > 0, reference - logprobs, 0.0)
    return jnp.exp(difference) - difference - 1.0


def _surrogate(
    config: LossConfig, ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token losses [R, N], and where the ratio was clipped from below and from above (0 or 1)."""
    if config.recipe.surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, config.high))
        above = (ratio > config.high) & (advantages > 0)
        return -weight * advantages * logprobs, jnp.zeros_like(ratio), above.astype(jnp.float32)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.high)
    free = ratio if config.dual_clip is None else jnp.minimum(ratio, config.dual_clip)
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.high) & (advantages > 0)
    return -jnp.minimum(free * advantages, clipped * advantages), low.astype(jnp.float32), high.astype(jnp.float32)


def _normalised(normaliser: str, loss: jax.Array, mask: jax.Array, max_length: int) -> tuple[jax.Array, jax.Array]:
    """(numerator, divisor) of token losses [R, N] that are 0 outside the mask."""
    lengths = jnp.sum(mask, axis=1)
    rows, tokens = jnp.sum((lengths > 0).astype(jnp.float32)), jnp.sum(lengths)
    if normaliser == "sequence":
        return jnp.sum(jnp.sum(loss, axis=1) / jnp.maximum(lengths, 1.0)), rows
    if normaliser == "microbatch":
        return jnp.sum(loss) / jnp.maximum(tokens, 1.0), (tokens > 0).astype(jnp.float32)
    if normaliser == "constant":
        return jnp.sum(loss), rows * max_length
    return jnp.sum(loss), tokens
