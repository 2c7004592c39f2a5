"""Cross-entropy and log-probabilities of tokens whose logits never exist at once.

A vocabulary of 150,000 makes `[B, T, V]` the largest array of a training step by far. Here the logits of a few
positions at a time are made, used and thrown away, forwards and again backwards.
Axis letters: B rows, T tokens (N where every token has a state of its own), C tokens of one chunk, D model width,
V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.distributed.mesh import ROWS, constrain, ways


class TokenLoss(NamedTuple):
    """Sums over the supervised tokens of a batch; add them over batches, divide once.

    Attributes:
      nll: float32 scalar, weighted negative log-likelihood.
      weight: float32 scalar, sum of the weights.
      correct: int32 scalar, supervised tokens that were the most likely one.
      count: int32 scalar, supervised tokens (weight above 0).
    """

    nll: jax.Array
    weight: jax.Array
    correct: jax.Array
    count: jax.Array


def cross_entropy(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, weights: jax.Array, chunk: int = 2048
) -> TokenLoss:
    """Cross-entropy of every supervised token, given the hidden state before it.

    The sequence is walked in chunks of about `chunk` positions over all rows; a chunk in which nothing is supervised
    (a long prompt, padding) costs nothing. Softmax and sums are float32 whatever the dtype of the states.

    Args:
      hidden: [B, T, D] float states after the final norm.
      unembedding: [V, D] float.
      tokens: [B, T] int32.
      weights: [B, T] float weight of predicting the token that stands at an index (`Batch.loss_mask`). Index 0 has
        nothing before it and never counts.
      chunk: positions whose logits exist together, at least one per row; on a mesh, of each of its data x fsdp ways.

    Returns:
      TokenLoss.

    Raises:
      ValueError: the shapes do not belong together.
    """
    rows, length, width = hidden.shape
    if tokens.shape != (rows, length) or weights.shape != (rows, length) or unembedding.shape[1] != width:
        raise ValueError(
            f"hidden {hidden.shape}, unembedding {unembedding.shape}, tokens {tokens.shape} and weights {weights.shape}"
            " should be [B, T, D], [V, D], [B, T] and [B, T]"
        )
    unembedding, parts = constrain(unembedding, "head"), ways("sequence", "tensor")
    targets, weights = _next(tokens), _next(weights).astype(jnp.float32)
    chunks = jax.tree.map(lambda leaf: _chunks(leaf, chunk * ways(*ROWS) // rows, parts), (hidden, targets, weights))

    def body(total: TokenLoss, piece):
        here = jax.lax.cond(jnp.any(piece[2] > 0), lambda: _chunk_loss(unembedding, *piece), _nothing)
        return jax.tree.map(jnp.add, total, here), None

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), _nothing(), chunks)[0]


class Control(NamedTuple):
    """Tokens behind the tokenizer's, which may stand in some places alone (VisMem).

    Attributes:
      rows: [X, D] float, their rows of the head.
      bias: [X] float, added to their logits.
      allowed: [B, N, X] bool, which of them could be sampled.
      first: int32 scalar, the id of the first; rows of the head from there on stand for no token.
    """

    rows: jax.Array
    bias: jax.Array
    allowed: jax.Array
    first: jax.Array


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float = 1.0,
    chunk: int = 2048,
    control: Control | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token under softmax(logits / temperature), over all that could be sampled.

    Args:
      hidden: [B, N, D] float states in front of the tokens, after the final norm.
      unembedding: [V, D] float.
      tokens: [B, N] int32.
      mask: [B, N] tokens that are wanted; a chunk without any costs nothing.
      temperature: that of the sampling.
      chunk: see `cross_entropy`.
      control: tokens beside the vocabulary; None where the vocabulary [V] is all.

    Returns:
      (log-probabilities, entropies of their distributions), both [B, N] float32 in nats and 0 outside the mask. The
      entropies carry no gradient.

    Raises:
      ValueError: the shapes do not belong together.
    """
    rows, length, width = hidden.shape
    if tokens.shape != (rows, length) or mask.shape != (rows, length) or unembedding.shape[1] != width:
        raise ValueError(
            f"hidden {hidden.shape}, unembedding {unembedding.shape}, tokens {tokens.shape} and mask {mask.shape}"
            " should be [B, N, D], [V, D], [B, N] and [B, N]"
        )
    unembedding, parts = constrain(unembedding, "head"), ways("tensor")
    allowed = None if control is None else control.allowed
    pieces = jax.tree.map(
        lambda leaf: _chunks(leaf, chunk * ways(*ROWS) // rows, parts), (hidden, tokens, mask > 0, allowed)
    )

    score = functools.partial(_scored, unembedding, temperature, control)

    def body(_: None, piece: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        nothing = jnp.zeros(piece[1].shape, jnp.float32)
        return None, jax.lax.cond(jnp.any(piece[2]), lambda: score(*piece), lambda: (nothing, nothing))

    _, found = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, pieces)
    return _joined(found[0], parts)[:, :length], _joined(found[1], parts)[:, :length]


def _scored(
    unembedding: jax.Array,
    temperature: float,
    control: Control | None,
    hidden: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    allowed: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of one chunk [B, C]: (log-probabilities, entropies)."""
    logits = _logits(hidden, unembedding) / temperature
    ids, wanted = jnp.arange(logits.shape[-1]), tokens[..., None]
    if control is not None:
        logits = jnp.where(ids < control.first, logits, -jnp.inf)
    total, here = jax.nn.logsumexp(logits, axis=-1), ids == wanted
    chosen = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    free = jax.lax.stop_gradient(logits)
    if control is not None:
        own = _control_logits(control, hidden, allowed) / temperature
        chosen = _chosen_control(control, tokens, own, chosen)
        total = jnp.logaddexp(total, jax.nn.logsumexp(own, axis=-1))
        free = jnp.concatenate([free, jax.lax.stop_gradient(own)], axis=-1)
    level = jax.lax.stop_gradient(total)
    spread = jnp.exp(free - level[..., None]) * jnp.where(jnp.isfinite(free), free, 0.0)
    entropy = level - jnp.sum(spread, axis=-1)
    return jnp.where(mask, chosen - total, 0.0), jnp.where(mask, entropy, 0.0)


def _control_logits(control: Control, hidden: jax.Array, allowed: Any) -> jax.Array:
    """float32 [B, C, X], -inf where a token could not be sampled."""
    rows = control.rows.astype(hidden.dtype)
    own = jnp.einsum("bcd,xd->bcx", hidden, rows, preferred_element_type=jnp.float32) + control.bias
    return jnp.where(allowed, own, -jnp.inf)


def _chosen_control(control: Control, tokens: jax.Array, own: jax.Array, chosen: jax.Array) -> jax.Array:
    """The logits [B, C] of the tokens, where they are control tokens of `own` [B, C, X], else `chosen`."""
    place = tokens - control.first
    here = jnp.arange(own.shape[-1]) == place[..., None]
    mine = jnp.sum(jnp.where(here & jnp.isfinite(own), own, 0.0), axis=-1)
    return jnp.where(place >= 0, mine, chosen)


def _next(leaf: jax.Array) -> jax.Array:
    """[B, T] shifted one to the left; the last column has no successor and becomes 0."""
    return jnp.pad(leaf[:, 1:], ((0, 0), (0, 1)))


def _chunks(leaf: jax.Array, size: int, parts: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, C, ...], zero-padded at the end.

    Rows stay whole, so they may be sharded. So may T, over `parts` devices: a chunk has equally many of the tokens of
    each. C is `size` or the next size that allows it.
    """
    rows, length = leaf.shape[:2]
    each = -(-length // parts)
    size = max(1, min(size // parts, each))
    each += -each % size
    leaf = jnp.pad(leaf, ((0, 0), (0, parts * each - length), *((0, 0),) * (leaf.ndim - 2)))
    leaf = jnp.moveaxis(leaf.reshape(rows, parts, -1, size, *leaf.shape[2:]), 2, 0)
    return leaf.reshape(*leaf.shape[:2], parts * size, *leaf.shape[4:])


def _joined(chunks: jax.Array, parts: int) -> jax.Array:
    """[chunks, B, C] -> [B, T], padding included."""
    count, rows, size = chunks.shape
    return jnp.moveaxis(chunks.reshape(count, rows, parts, size // parts), 0, 2).reshape(rows, -1)


def _logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """[B, C, D], [V, D] -> float32 [B, C, V]."""
    hidden = constrain(hidden, "chunk")
    return constrain(jnp.einsum("bcd,vd->bcv", hidden, unembedding, preferred_element_type=jnp.float32), "logits")


def _nothing() -> TokenLoss:
    return TokenLoss(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))


def _chunk_loss(unembedding: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
    """The sums of one chunk: hidden [B, C, D], targets and weights [B, C]."""
    logits = _logits(hidden, unembedding)
    here = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    supervised = weights > 0
    return TokenLoss(
        nll=jnp.sum(jnp.where(supervised, nll * weights, 0.0)),
        weight=jnp.sum(weights),
        correct=jnp.sum((jnp.argmax(logits, axis=-1) == targets) & supervised),
        count=jnp.sum(supervised),
    )
