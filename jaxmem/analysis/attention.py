"""How much of the backbone's attention falls on the image: the quantity that dilutes as text grows (the PVM paper).

Attention weights are never materialised for a whole prompt: only the rows asked for are computed, and of those only
the sum over visual keys leaves the layer. Axis letters: B rows, R places, T tokens, K key heads, N query heads,
H head width, L layers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.api import Model
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Observe
from jaxmem.model import Spec, observed


def image_mass(is_visual: Array, places: Array) -> Observe:
    """What to observe of a layer: Omega, the softmax mass on visual keys, averaged over heads.

    Args:
      is_visual: [B, T] bool, the keys that stand for the image.
      places: [B, R] int32, the tokens whose attention is wanted. The token at `place` predicts the one behind it.

    Returns:
      observe(query [B, T, N, H], keys [B, T, K, H], values, mask [B, T, T]) -> float32 [B, R].
    """

    def observe(query: Array, keys: Array, values: Array, mask: Array) -> Array:
        weights = weights_at(query, keys, mask, places)
        return jnp.where(is_visual[:, None], weights, 0.0).sum(-1)

    return observe


def weights_at(query: Array, keys: Array, mask: Array, places: Array) -> Array:
    """float32 [B, R, T], what some tokens of a layer give to each key, averaged over heads.

    Args:
      query: [B, T, N, H].
      keys: [B, T, K, H].
      mask: [B, T, T] bool.
      places: [B, R] int32.
    """
    rows = jnp.arange(query.shape[0])[:, None]
    asking, seen = query[rows, places], mask[rows, places]
    heads, width = keys.shape[2:]
    asking = asking.reshape(*asking.shape[:2], heads, -1, width)
    scores = jnp.einsum("brkgh,bskh->brkgs", asking, keys, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(seen[:, :, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).mean((2, 3))


@functools.partial(jax.jit, static_argnames="spec")
def _masses(spec: Spec, base: Any, memory: Any, batch: Batch, places: Array) -> Array:
    return observed(spec, base, memory, batch, image_mass(batch.is_visual, places))[1]


def image_masses(model: Model, batch: Batch, places: Array) -> np.ndarray:
    """The image's attention mass in every decoder layer, float32 [L, B, R].

    Args:
      model: backbone and memories.
      batch: prompts with images.
      places: [B, R] int32 indices of tokens.
    """
    return np.asarray(_masses(model.spec, model.base, model.memory, batch, jnp.asarray(places)))
