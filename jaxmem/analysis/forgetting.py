"""Visual forgetting: how much attention falls on vision tokens, by decoder layer and by how few of them there are.

Of the answer's tokens A (given the true text before them) and the vision tokens V, with heads averaged, in layer l:
mass_l = mean over a in A of sum over v in V of attention_l(a, v), and density_l = mass_l / |V|, which can be compared
between compressions. The first token of a row takes much attention whatever it is; mass and density are also given
without it, the other weights scaled up to one.
Axis letters: B rows, R places, T tokens, K key heads, N query heads, H head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.analysis.attention import weights_at
from jaxmem.api import Model
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Observe
from jaxmem.data.batching import Buckets, collate
from jaxmem.model import Spec, observed


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """Attention on vision tokens, one number per layer.

    Attributes:
      tokens: mean |V| of a row.
      total: weight on all keys, which is 1.
      mass, density: see above.
      mass_without_sink, density_without_sink: the same without each row's first token.
    """

    tokens: float
    total: tuple[float, ...]
    mass: tuple[float, ...]
    density: tuple[float, ...]
    mass_without_sink: tuple[float, ...]
    density_without_sink: tuple[float, ...]


def shares(visual: Array, first: Array, places: Array) -> Observe:
    """What to observe of a layer: weights on all keys, on vision tokens, and on each row's first token.

    Args:
      visual: [B, T] bool, the keys that are vision tokens.
      first: [B] int32, each row's first token.
      places: [B, R] int32, the tokens that look.

    Returns:
      observe(query [B, T, N, H], keys [B, T, K, H], values, mask [B, T, T]) -> float32 [3, B, R], heads averaged.
    """

    def observe(query: Array, keys: Array, values: Array, mask: Array) -> Array:
        weights = weights_at(query, keys, mask, places)
        sink = jnp.arange(keys.shape[1]) == first[:, None]
        on = lambda chosen: jnp.where(chosen[:, None], weights, 0.0).sum(axis=-1)  # noqa: E731
        return jnp.stack([weights.sum(axis=-1), on(visual), on(sink & ~visual)])

    return observe


@functools.partial(jax.jit, static_argnames="spec")
def _shares(spec: Spec, base: Any, memory: Any, batch: Batch, places: Array) -> Array:
    """[L, 3, B, R]."""
    valid = jnp.asarray(batch.segments) > 0
    first = jnp.argmax(valid, axis=1).astype(jnp.int32)
    return observed(spec, base, memory, batch, shares(jnp.asarray(batch.is_visual), first, places))[1]


def measure(model: Model, chats: Sequence[Any], *, batch_size: int = 32) -> Forgetting:
    """Attention of the answers' tokens in chats with their answers.

    Args:
      model: backbone and memories.
      chats: messages with images that end with the assistant.
      batch_size: rows that are computed together.

    Raises:
      DataError: chats that cannot be encoded.
    """
    rows = [model.processor.encode(chat, where=f"chat {i}") for i, chat in enumerate(chats)]
    width = max(map(len, rows))
    answers = max(int((row.loss_mask > 0).sum()) for row in rows)
    buckets = Buckets((width,), (max(1, *(len(row.patches) for row in rows)),))
    found, counts = [], []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        filled = some + some[:1] * (batch_size - len(some))
        batch = collate(filled, buckets, model.processor.pad_token)
        places = np.zeros((batch_size, answers), np.int32)
        used = np.zeros((batch_size, answers), bool)
        for place, row in enumerate(some):
            asked = np.flatnonzero(row.loss_mask > 0) - 1  # the token in front predicts it
            places[place, : len(asked)], used[place, : len(asked)] = asked, True
            counts.append(int((row.visual_rows >= 0).sum()))
        taken = np.asarray(_shares(model.spec, model.base, model.memory, batch, places))
        found.append(taken[:, :, used])
    total, mass, sink = np.moveaxis(np.concatenate(found, axis=-1), 1, 0)  # [L, answers] each
    rest = mass / np.maximum(1 - sink, 1e-9)
    tokens = float(np.mean(counts))
    floats = lambda values: tuple(float(value) for value in values.mean(axis=-1))  # noqa: E731
    return Forgetting(tokens, floats(total), floats(mass), floats(mass / tokens), floats(rest), floats(rest / tokens))
