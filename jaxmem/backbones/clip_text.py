"""The text towers of CLIP and SigLIP.

Axis letters: B texts, T tokens, W width, E width of the embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import encoder
from jaxmem.backbones.batch import Array
from jaxmem.backbones.encoder import EncoderConfig, hidden_states, normed
from jaxmem.backbones.layers import WEIGHT, attend
from jaxmem.errors import DataError

LEGACY_END = 2
"""The end token that CLIP's first config files state; it is wrong, and stands for the highest id of a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig(EncoderConfig):
    """A text tower.

    Attributes:
      vocab: rows of the embedding.
      positions: longest text in tokens.
      out_width: E.
      end_token: CLIP: tokens see those before them, and the text is read at its first end token, or, for
        `LEGACY_END`, at the first place of its highest id. None is SigLIP: all tokens, padding among them, see each
        other, and the text is read at its last place, so that texts must be padded to `positions`.
    """

    vocab: int
    positions: int
    out_width: int
    end_token: int | None = None


def init(key: Array, config: ClipTextConfig) -> Any:
    """Random float32 weights: maps and tables N(0, 0.02^2), biases 0, norms 1."""
    embed, table, blocks, projection = jax.random.split(key, 4)
    params = {
        "embed": WEIGHT(embed, (config.vocab, config.width)),
        "position_table": WEIGHT(table, (config.positions, config.width)),
        "blocks": encoder.init(blocks, config),
        "norm": {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)},
        "projection": {"kernel": WEIGHT(projection, (config.width, config.out_width))},
    }
    if config.end_token is None:
        params["projection"]["bias"] = jnp.zeros(config.out_width)
    return params


def forward(config: ClipTextConfig, params: Any, tokens: Array, layers: Sequence[int] = (-1,)) -> tuple[Array, ...]:
    """Hidden states of texts, before the norm behind the blocks.

    Args:
      config: static.
      params: from `init`; their dtype is the compute dtype.
      tokens: [B, T] int32, padded on the right.
      layers: static; see `encoder.resolve`.

    Returns:
      [B, T, W] for each of `layers`.

    Raises:
      ConfigError: a layer that does not exist.
      DataError: texts longer than the position table.
    """
    if tokens.ndim != 2 or tokens.shape[1] > config.positions:
        raise DataError(f"tokens {tokens.shape} are not [texts, at most {config.positions}]; cut the texts")
    length = tokens.shape[1]
    sees = jnp.ones((length, length), bool)
    sees = sees if config.end_token is None else jnp.tril(sees)
    x = params["embed"][tokens] + params["position_table"][:length]
    return hidden_states(config, params["blocks"], x, lambda q, k, v: attend(q, k, v, sees[None]), layers)


def pool(config: ClipTextConfig, params: Any, tokens: Array, state: Array) -> Array:
    """Embeddings of texts, not yet of length 1.

    Args:
      config: static.
      params: from `init`.
      tokens: [B, T]. With an end token, every text must hold it.
      state: [B, T, W], the last hidden state.

    Returns:
      [B, E].
    """
    if config.end_token is None:
        chosen = state[:, -1]
    else:
        ranked = tokens if config.end_token == LEGACY_END else tokens == config.end_token
        place = jnp.argmax(ranked, axis=1)[:, None, None]
        chosen = jnp.take_along_axis(state, place, axis=1)[:, 0]
    projection = params["projection"]
    found = normed(config, params["norm"], chosen) @ projection["kernel"]
    return found + projection["bias"] if "bias" in projection else found
