"""From logits to a token: penalties, filters and the draw. Filters follow the semantics of transformers' generate.

Axis letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.errors import ConfigError
from jaxmem.sampling.invoking import InvokeConfig


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to continue a prompt (static).

    Attributes:
      max_new_tokens: at most so many tokens per row.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of the most likely tokens whose probability reaches p.
      min_p: keep tokens at least min_p times as likely as the most likely one.
      repetition_penalty: > 1 makes tokens of the prompt and of the answer less likely to come again.
      stop_tokens: ids that end a row (they are kept as its last token).
      banned_tokens: ids that are never sampled: media placeholders belong to prompts alone.
      pad_token: what stands behind a row's end.
      cache_size: slots of the cache; None makes it as large as prompt and answer need.
      invoke: how memories are called for, of a model that has VisMem. Their slots count in `max_new_tokens`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    cache_size: int | None = None
    invoke: InvokeConfig = InvokeConfig()

    def __post_init__(self) -> None:
        faults = {
            "max_new_tokens must be at least 1": self.max_new_tokens < 1,
            "temperature must not be negative": self.temperature < 0,
            "top_k must not be negative": self.top_k < 0,
            "top_p must lie in (0, 1]": not 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": not 0 <= self.min_p <= 1,
            "repetition_penalty must be positive": self.repetition_penalty <= 0,
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("sampling: " + "; ".join(wrong))


def penalise(logits: Array, seen: Array, penalty: float) -> Array:
    """Divides positive and multiplies negative logits of tokens `seen` [B, V] by the penalty (arXiv 1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """-inf below each row's k-th largest logit."""
    smallest = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """-inf outside the nucleus: the most likely tokens up to and including the one that reaches probability p."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    dropped = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before >= p, axis=-1, inplace=False)
    return jnp.where(dropped, -jnp.inf, logits)


def keep_min_p(logits: Array, p: float) -> Array:
    """-inf for tokens less than p times as likely as the most likely one."""
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def draw(settings: SamplerConfig, keys: Array, logits: Array, seen: Array | None) -> tuple[Array, Array]:
    """The next token of every row.

    Args:
      settings: static.
      keys: [B] random keys, one per row, so that a row does not depend on its batch.
      logits: [B, V] float32.
      seen: [B, V] bool tokens that the penalty concerns; None without a penalty.

    Returns:
      tokens [B] int32 and their log-probabilities [B] float32 over all logits that are not -inf at the sampling
      temperature (at 1 for greedy), before any filter: what a trainer's forward gives for the same token.
    """
    scale = settings.temperature or 1.0
    scores = logits if seen is None else penalise(logits, seen, settings.repetition_penalty)
    if settings.banned_tokens:
        scores = scores.at[:, jnp.asarray(settings.banned_tokens)].set(-jnp.inf)
    if settings.temperature == 0:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        scores = scores / scale
        scores = keep_top_k(scores, settings.top_k) if settings.top_k else scores
        scores = keep_top_p(scores, settings.top_p) if settings.top_p < 1 else scores
        scores = keep_min_p(scores, settings.min_p) if settings.min_p else scores
        tokens = jax.vmap(jax.random.categorical)(keys, scores)
    raw = logits / scale
    chosen = jnp.take_along_axis(raw, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(raw, axis=-1)
