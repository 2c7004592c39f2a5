"""Keys and values of knowledge items as a memory that needs no training (arXiv 2505.17670, "VLM-as-Memory", Table 2).

The untuned backbone reads every item by itself, with positions from 0. What a few of its layers then hold, rotated keys
and values, stands in front of the question's own keys in the same layers (`item_decoding`), and no other layer sees it.
Keys keep the rotation that their own item gave them, so the order of a row's items does not matter.

Axis letters: B rows, K items of a row, L tokens of an item, N layers that see the items, P keys in front of a row, R
query heads of a key head, G key heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.layers import Look
from jaxmem.errors import ConfigError
from jaxmem.model import Spec, read_prompt


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """What of the items the question sees (static). The layers, the scale and the question are the released code's.

    Attributes:
      layers: 0-based decoder layers that see the items, ascending.
      scale: of the items' keys and values; 1.0 is the paper, which does not mention it.
      keep: share of an item's tokens that stay, those that get most attention within it: of n tokens int(n * keep).
        1.0 keeps all; the paper's "+AS" is 0.25.
      attention: by which tokens are ranked, averaged over heads and queries: over "all" layers (the paper), or that of
        the "first" layer (the released code).
      pool: means of so many tokens, in their order, take the tokens' place; 1 leaves them.
      with_question: an item is read behind the question that it shall help with, so its keys serve that one alone.
      label: stands in front of an item's text.
      text_limit: characters of an item's text that are read.
    """

    layers: tuple[int, ...] = (17, 18, 19)
    scale: float = 1.5
    keep: float = 1.0
    attention: Literal["all", "first"] = "all"
    pool: int = 1
    with_question: bool = True
    label: str = "Given Information:"
    text_limit: int = 5000

    def __post_init__(self) -> None:
        faults = {
            f"layers {self.layers} must be at least one, ascending, each once, from 0": (
                not self.layers or min(self.layers) < 0 or list(self.layers) != sorted(set(self.layers))
            ),
            f"scale {self.scale} must be above 0": self.scale <= 0,
            f"keep {self.keep} must be above 0 and at most 1": not 0 < self.keep <= 1,
            f"attention {self.attention!r} is neither 'all' nor 'first'": self.attention not in ("all", "first"),
            f"pool {self.pool} must be at least 1": self.pool < 1,
            f"text_limit {self.text_limit} must be at least 1": self.text_limit < 1,
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("item keys: " + "; ".join(wrong))

    def check(self, spec: Spec) -> None:
        """Raises ConfigError when the backbone does not have the layers."""
        depth = spec.backbone.text.layers
        if beyond := [layer for layer in self.layers if layer >= depth]:
            raise ConfigError(
                f"item keys: the backbone has {depth} decoder layers, 0 to {depth - 1}, and layers names {beyond};"
                " choose others"
            )


@flax.struct.dataclass
class Prefix:
    """What stands in front of the rows in the chosen layers.

    Attributes:
      keys, values: [N, B, P, G, H], in the backbone's dtype.
      valid: [B, P] bool; the rest is padding, which nothing sees.
    """

    keys: Array
    values: Array
    valid: Array


def nothing(spec: Spec, config: KeysConfig, base: Any, rows: int) -> Prefix:
    """The prefix of rows without items: P = 0."""
    text = spec.backbone.text
    empty = jnp.zeros((len(config.layers), rows, 0, text.kv_heads, text.head_dim), base["embed"].dtype)
    return Prefix(empty, empty, jnp.zeros((rows, 0), bool))


def item_keys(spec: Spec, config: KeysConfig, base: Any, items: Batch) -> Prefix:
    """The keys and values of items, each read in a sequence of its own.

    One item of every row is read at a time, so no more than their keys of all layers exist at once.

    Args:
      spec, config: static.
      base: the backbone's weights.
      items: leaves [B, K, ...], padded on either side; an item of padding leaves nothing.

    Raises:
      ConfigError: the backbone does not have the layers.
    """
    config.check(spec)

    def one(item: Batch) -> tuple[Array, Array, Array]:
        """Keys, values [N, B, P / K, G, H] and validity of one item of every row."""
        keys, values, received = _read(spec, config, base, item)
        places, valid = most_received(received, jnp.asarray(item.segments) > 0, config.keep)
        some = lambda leaf: jnp.take_along_axis(leaf, places[None, :, :, None, None], axis=2)  # noqa: E731
        (keys, values), valid = pooled((some(keys), some(values)), valid, config.pool)
        return keys * jnp.asarray(config.scale, keys.dtype), values * jnp.asarray(config.scale, values.dtype), valid

    keys, values, valid = jax.lax.map(one, jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), items))
    side_by_side = lambda leaf: jnp.moveaxis(leaf, 0, 2).reshape(*leaf.shape[1:3], -1, *leaf.shape[4:])  # noqa: E731
    return Prefix(side_by_side(keys), side_by_side(values), jnp.swapaxes(valid, 0, 1).reshape(valid.shape[1], -1))


def _read(spec: Spec, config: KeysConfig, base: Any, items: Batch) -> tuple[Array, Array, Array]:
    """Keys and values [N, B, L, G, H] of the chosen layers, and the attention [B, L] that every token received.

    Layers behind the last one that matters are not run.
    """
    spec, text = Spec(spec.backbone), spec.backbone.text
    ranked = 0 if config.keep == 1 else 1 if config.attention == "first" else text.layers
    depth = max(ranked, config.layers[-1] + 1)
    prompt = read_prompt(spec, base, {}, items)
    among = decoder.among(prompt.stream, prompt.stream)

    def look(counts: Array) -> Look:
        def attend_and_keep(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
            score = lambda: received(query, key, decoder.visible(prompt.stream, prompt.stream))  # noqa: E731
            none = lambda: jnp.zeros(query.shape[:2], jnp.float32)  # noqa: E731
            return among(query, key, value)[0], (key, value, jax.lax.cond(counts, score, none) if ranked else none())

        return attend_and_keep

    _, ((keys, values, scores), _) = decoder.scan_layers(
        dataclasses.replace(text, layers=depth),
        base["layers"],
        prompt.x,
        prompt.angle,
        look,
        past=jnp.arange(depth) < ranked,
        ports=prompt.own,
        backward_from=depth,  # all layers run by index, so that the stack of weights is not cut
    )
    chosen = np.array(config.layers)
    return keys[chosen], values[chosen], scores.sum(0) / max(1, ranked)


def received(query: Array, key: Array, mask: Array) -> Array:
    """The attention that every key gets, averaged over heads and over the queries that see something.

    The weights of one key head exist at a time.

    Args:
      query: [B, L, G * R, H].
      key: [B, L, G, H].
      mask: [B, L, L] bool.

    Returns:
      [B, L] float32, of sum 1 in each row that holds a token.
    """
    heads, width = key.shape[2:]
    asks = mask.any(-1)

    def of_head(pair: tuple[Array, Array]) -> Array:
        scores = jnp.einsum("btrh,bsh->brts", *pair, preferred_element_type=jnp.float32) * width**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        return jnp.where(asks[:, None, :, None], weights, 0).sum((1, 2))

    parted = query.reshape(*query.shape[:2], heads, -1, width)
    total = jax.lax.map(of_head, (jnp.moveaxis(parted, 2, 0), jnp.moveaxis(key, 2, 0))).sum(0)
    return total / (query.shape[2] * jnp.maximum(1, asks.sum(-1, keepdims=True)))


def most_received(scores: Array, valid: Array, keep: float) -> tuple[Array, Array]:
    """Which tokens of an item stay: int(length * keep) of the highest scores, the earlier one of equals.

    Args:
      scores: [B, L] float32.
      valid: [B, L] bool.
      keep: above 0 and at most 1 (static).

    Returns:
      [B, int(L * keep)] int32 places in ascending order, and which of them count, as bool.
    """
    length = valid.shape[1]
    counts = np.array([int(tokens * keep) for tokens in range(length + 1)])
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=1, stable=True)
    stays = jnp.argsort(order, axis=1) < jnp.asarray(counts)[valid.sum(1)][:, None]
    places = jnp.sort(jnp.where(stays, jnp.arange(length), length), axis=1)[:, : int(counts[-1])]
    return jnp.minimum(places, length - 1).astype(jnp.int32), places < length


def pooled(pair: tuple[Array, Array], valid: Array, size: int) -> tuple[tuple[Array, Array], Array]:
    """Means over groups of `size` neighbours; the last group of a row may have fewer.

    Args:
      pair: keys and values [N, B, S, G, H].
      valid: [B, S] bool, the first ones of each row.
      size: 1 changes nothing (static).

    Returns:
      The same for ceil(S / size) groups; means are taken in float32.
    """
    if size == 1:
        return pair, valid
    count = -(-valid.shape[1] // size)

    def fold(leaf: Array, axis: int) -> Array:
        """The axis S as [groups, size]."""
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, count * size - leaf.shape[axis])
        return jnp.pad(leaf, widths).reshape(*leaf.shape[:axis], count, size, *leaf.shape[axis + 1 :])

    members = fold(valid, 1)

    def mean(leaf: Array) -> Array:
        own = members[None, ..., None, None]
        total = jnp.where(own, fold(leaf, 2).astype(jnp.float32), 0).sum(3)
        return (total / jnp.maximum(1, own.sum(3))).astype(leaf.dtype)

    return (mean(pair[0]), mean(pair[1])), members.any(-1)
