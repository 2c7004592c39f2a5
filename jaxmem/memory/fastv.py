"""FastV (arXiv 2403.06764), as a baseline without training: image tokens that get little attention are dropped.

The first K decoder layers see everything. From 0-based layer K on, a prompt's image tokens that got least attention in
layer K - 1 (over its heads' mean, from the last token of the prompt) are seen by no token: not by the rest of the
prompt, and not by what is generated behind it. The tokens that stay keep their positions. Newlines of a grid of tiles
count as image tokens, as published.

To know that attention, the first K layers of a prompt are run once more than without it. What is dropped is masked, so
this says what FastV does to answers, not what it saves.

Axis letters: B rows, T tokens, S slots that can be seen, L layers, N heads, K key heads, H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import config as configs
from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.ports import Ports
from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FastVConfig:
    """What is dropped, and from where on.

    Attributes:
      layer: K, decoder layers that see all tokens; attention is that of the last of them.
      keep: how many image tokens of a prompt stay: a whole number is R, with a point it is a share, of n tokens
        int(n * keep). All stay where there are no more than R.
    """

    layer: int = 2
    keep: int | float = 0.5
    name: str = "fastv"

    @property
    def layers(self) -> tuple[int, ...]:
        """No layer has parameters of it."""
        return ()


def create(backbone: BackboneConfig, **overrides: Any) -> FastVConfig:
    """The pruning of a backbone.

    Raises:
      ConfigError: an unknown field, a layer that the decoder does not have, or a number of tokens that cannot be kept.
    """
    fields = {field.name for field in dataclasses.fields(FastVConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"fastv has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    config, depth = configs.build(FastVConfig, overrides, "fastv"), backbone.text.layers
    share = isinstance(config.keep, float)
    faults = {
        f"fastv needs a vision tower, and {backbone.model_type} is a decoder alone": backbone.vision is None,
        f"layer {config.layer} must be within 1..{depth - 1}: attention of a layer in front of it decides what the"
        " layers from it on see": not 1 <= config.layer < depth,
        f"keep {config.keep} must be a share above 0 and at most 1.0, or a whole number of tokens": (
            not 0 < config.keep <= 1 if share else config.keep < 1
        ),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("fastv: " + "; ".join(wrong))
    return config


def among(memories: Sequence[Any]) -> FastVConfig | None:
    """The pruning among a model's memories, if there is one.

    Raises:
      ConfigError: there is VisMem too, whose memories are read while tokens are generated.
    """
    found = next((config for config in memories if isinstance(config, FastVConfig)), None)
    if found is not None and any(config.name == "vismem" for config in memories):
        raise ConfigError("fastv and vismem cannot be attached together: VisMem reads image tokens that FastV drops")
    return found


def init(key: Array, config: FastVConfig, base: Any = None) -> dict[str, Any]:
    """No parameters."""
    return {}


def asking(batch: Batch) -> Array:
    """[B] the token whose attention decides: the row's last, or the one in front of the answer that the row ends with.

    What is dropped must not depend on an answer that is only being read. At most one token, a line break, may stand
    behind the answer; more is the opening of a turn.
    """
    index = jnp.arange(batch.tokens.shape[1])
    valid, taught = jnp.asarray(batch.segments) > 0, jnp.asarray(batch.loss_mask) > 0
    last = jnp.max(jnp.where(valid, index, 0), axis=1)
    end = jnp.max(jnp.where(taught, index, -1), axis=1)
    front = jnp.max(jnp.where(valid & ~taught & (index < end[:, None]), index, 0), axis=1)
    return jnp.where((end >= 0) & (last - end <= 1), front, last)


def dropped(
    config: FastVConfig,
    text: TextConfig,
    layers: Any,
    x: Array,
    angle: Array,
    stream: Stream,
    ports: Ports,
    batch: Batch,
) -> Array:
    """Which tokens of prompts are seen by none from layer K on.

    Args:
      config, text: static.
      layers: the decoder's weights, leading axis L.
      x, angle: [B, T, D] embeddings and [B, T, H / 2] rotary angles.
      stream: of the tokens.
      ports: what acts on the prompt.
      batch: the prompts.

    Returns:
      [B, T] bool.
    """
    place = asking(batch)
    one = stream.some(jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, place[:, None], axis=1), stream.tokens))
    sees, look = decoder.visible(one, stream)[:, 0], decoder.among(stream, stream)

    def look_and_score(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        own = jnp.take_along_axis(query, place[:, None, None, None], axis=1)[:, 0]
        return look(query, key, value)[0], received(own, key, sees)

    _, (scores, _) = decoder.scan_layers(
        dataclasses.replace(text, layers=config.layer),
        layers,
        x,
        angle,
        look_and_score,
        ports=ports,
        backward_from=config.layer,  # all layers run by index, so that the stack of weights is not cut
    )
    same = stream.segments == one.segments
    return least(config, jax.lax.stop_gradient(scores[-1]), stream.is_visual & same & (stream.order <= one.order))


def received(query: Array, key: Array, sees: Array) -> Array:
    """[B, T] float32, the attention that each key gets of one token, averaged over heads.

    Args:
      query: [B, N, H].
      key: [B, T, K, H].
      sees: [B, T] bool.
    """
    parted = query.reshape(len(query), key.shape[2], -1, key.shape[-1])
    scores = jnp.einsum("bkgh,bskh->bkgs", parted, key, preferred_element_type=jnp.float32) * key.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return weights.mean(axis=(1, 2))


def least(config: FastVConfig, scores: Array, images: Array) -> Array:
    """The image tokens that do not stay: all but the highest scores, the earlier one of equals.

    Args:
      config: static.
      scores: [B, T] float32.
      images: [B, T] bool, which tokens count.

    Returns:
      [B, T] bool.
    """
    lengths = range(images.shape[1] + 1)
    share = isinstance(config.keep, float)
    counts = np.array([int(tokens * config.keep) if share else config.keep for tokens in lengths])
    order = jnp.argsort(jnp.where(images, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return images & (rank >= jnp.asarray(counts)[images.sum(1)][:, None])


def seen(stream: Stream, lost: Array, late: Array | bool) -> Stream:
    """The keys [B, S] that a layer's tokens may see: all of `stream`, or where `late` those that were not dropped.

    `lost` is [B, T] and belongs to the first T slots; what stands behind them was never dropped.
    """
    behind = stream.segments.shape[1] - lost.shape[1]
    gone = jnp.pad(lost, ((0, 0), (0, behind))) & late
    return dataclasses.replace(stream, segments=jnp.where(gone, 0, stream.segments))


def keys_by_layer(
    memories: Sequence[Any], stream: Stream, states: dict[str, Any], text: TextConfig
) -> tuple[Callable[[Any], Stream], np.ndarray | None]:
    """What the tokens of every layer may see of `stream`.

    Args:
      memories: of the model.
      stream: the keys.
      states: per memory name, its per-prompt state.
      text: static.

    Returns:
      A function from what the second says of a layer to its keys, and the second: [L] bool, or None where nothing is
      dropped and all layers see all.
    """
    config = among(memories)
    lost = None if config is None else states[config.name]
    if config is None or lost is None:
        return lambda late: stream, None
    return lambda late: seen(stream, lost, late), np.arange(text.layers) >= config.layer


def prepare(config: FastVConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> Array | None:
    """[B, T] bool, of which nothing is dropped yet; None without images."""
    return None if visual is None else jnp.zeros(rows.shape, bool)


def append(old: Array | None, new: Array | None) -> Array | None:
    """What is dropped after another turn; raises ConfigError when that turn brings images of its own."""
    if new is not None:
        raise ConfigError("fastv: a later turn cannot bring images of its own; read the whole chat at once")
    return old


def take(state: Array | None, rows: Array) -> Array | None:
    """What is dropped of some rows [W] of the batch."""
    return None if state is None else state[rows]


def ports(config: FastVConfig, params: Any, state: Any, stream: Stream, dropout: Array | None = None) -> Ports:
    """None: it changes what layers see, not what they compute."""
    return Ports()
