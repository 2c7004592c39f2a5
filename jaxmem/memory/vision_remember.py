"""Vision Remember (arXiv 2506.03928): between decoder layers, vision tokens resample multi-level features of the tower.

A projector that makes few tokens throws features away. Behind some decoder layers every vision token asks the features
of its own region once more (`resampling.CrossAttention`); in v2 the tokens first ask each other and the question
(`resampling.SelfAttention`). Everything happens while prompts are read: their keys and values remember what was seen,
and generated tokens cost nothing.

Parameters: fusion (norms of the levels, and the map of "concat_linear" or the weights of "weighted_sum") and blocks,
with a leading axis of layers: cross, and where they are on, bidirectional, ffn and text.
Axis letters: B rows, T tokens, M visual rows, P patches, K keys of a window, W tower width, C fused width, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.vision import Visual
from jaxmem.errors import ConfigError
from jaxmem.memory import vision_rows
from jaxmem.memory.resampling import EPS, MASKED, CrossAttention, FeedForward, SelfAttention, WholeTiles
from jaxmem.memory.vision_remember_config import PRESETS, VisionRememberConfig, create

__all__ = [
    "PRESETS", "VisionRememberConfig", "append", "create", "fuse", "init", "ports", "prepare", "prompt_ports", "take"
]  # fmt: skip


def init(key: Array, config: VisionRememberConfig, base: Any = None) -> Any:
    """Fresh float32 parameters: maps N(0, 0.02^2), gates as configured, norms 1, biases and positions 0."""
    fuse, *blocks = jax.random.split(key, 1 + len(config.layers))
    levels, width = len(config.levels), config.tower_width
    norms = (levels, width) if config.level_norm == "each" else (levels * width,)
    fusion: dict[str, Any] = {"norm": {"scale": jnp.ones(norms), "bias": jnp.zeros(norms)}}
    if config.fusion == "concat_linear":
        fusion["kernel"] = config.layer.maps(fuse, (levels * width, width))
    if config.fusion == "weighted_sum":
        fusion["weights"] = jnp.full(levels, 1 / levels, jnp.float32)
    parts = [_init_block(one, config) for one in blocks]
    return {"fusion": fusion, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)}


def _init_block(key: Array, config: VisionRememberConfig) -> Any:
    """The parameters of one block."""
    cross, both, ffn = jax.random.split(key, 3)
    s, x = config.layer, jnp.zeros((1, 1, config.width))
    gate = jnp.full((config.width,) if config.gate_shape == "vector" else (), config.gate, jnp.float32)
    ones = lambda *shape: jnp.ones(shape, bool)  # noqa: E731
    if config.local:
        made = CrossAttention(s).init(cross, x, jnp.zeros((1, 1, s.keys, s.features)), ones(1, 1, s.keys))
    else:
        made = WholeTiles(s).init(cross, x, jnp.zeros((1, 1, s.features)), ones(1, 1, 1))
    block: dict[str, Any] = {"cross": {**made["params"], "gate": gate}}
    if config.bidirectional:
        made = SelfAttention(s).init(both, x, None, jnp.ones((1, 1), jnp.int32))
        block["bidirectional"] = {**made["params"], "gate": gate}
        if config.text_token == "attn_pool":
            block["text"] = {"query": jnp.zeros(config.width)}
        if config.text_token == "question_mean":
            block["text"] = {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)}
    if config.ffn:
        block["ffn"] = FeedForward(s).init(ffn, x)["params"]
    return block


def fuse(config: VisionRememberConfig, params: Any, levels: tuple[Array, ...]) -> Array:
    """The fused features [B, P, C] of hidden states [B, P, W]: once per prompt, for all blocks."""
    stacked = jnp.stack(levels, axis=2)  # [B, P, levels, W]
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731
    scale, bias = params["norm"]["scale"], params["norm"]["bias"]
    if config.level_norm == "each":
        normed = _layer_norm(stacked, scale, bias)
    else:
        normed = _layer_norm(flat(stacked), scale, bias).reshape(stacked.shape)
    if config.fusion == "weighted_sum":
        return jnp.einsum("bplw,l->bpw", normed, params["weights"].astype(normed.dtype))
    joined = flat(normed)
    return joined @ params["kernel"].astype(joined.dtype) if config.fusion == "concat_linear" else joined


def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """LayerNorm over the last axis in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + EPS)
    return (wide * scale + bias).astype(x.dtype)


def prompt_ports(config: VisionRememberConfig, params: Any, base: Any, visual: Visual | None, batch: Batch) -> Ports:
    """The port behind the chosen layers, for the tokens of prompts alone.

    Args:
      config: static.
      params: from `init`.
      base: the backbone's weights, which it does not need.
      visual: what the tower gave, with `config.levels`; None for a batch without images.
      batch: the prompts; with a text token, `question` marks the question's tokens.

    Raises:
      ConfigError: the rows do not say where their question stands.
    """
    if visual is None:
        return Ports()
    if config.asks and batch.question is None:
        raise ConfigError(
            "vision_remember reads the question and the batch does not mark it: encode with a processor whose"
            " mark_question is on (Model.attach sets it), or set text_token='none'"
        )
    tokens = vision_rows.places(batch, visual.rows.shape[1], config.cells)
    features = fuse(config, params["fusion"], tuple(visual.levels[level] for level in config.levels))
    seen, mask = _windows(config, features, batch, tokens.shape[1])
    images = jnp.where(tokens >= 0, _images(config, batch, tokens.shape[1]), 0)

    def act(slot: Any, x: Array, normed: Array | None) -> Array:
        return _remember(config, slot, x, tokens, seen, mask, images, batch)

    return Ports(after_layer=(Port(params["blocks"], act, config.layers),))


def _windows(config: VisionRememberConfig, features: Array, batch: Batch, count: int) -> tuple[Array, Array]:
    """What each visual row may ask: windows [B, M, K, C] and their mask [B, M, K]; or all features and [B, M, P]."""
    if not config.local:
        return features, _same_tile(config, batch, count)
    inside = (jnp.asarray(batch.patch_segments) > 0)[..., None]
    packed, exists = vision_rows.regions(config.cells, features, config.margin)
    within = vision_rows.regions(config.cells, inside, config.margin)[0][..., 0]
    return packed, jnp.where(within.any(axis=-1, keepdims=True), within, exists)  # all bar: what there is


def _same_tile(config: VisionRememberConfig, batch: Batch, count: int) -> Array:
    """[B, M, P] bool: patches of a row's own tile, or of its frame in the Qwen-VL family; `count` is M."""
    segments = jnp.asarray(batch.patch_segments)
    rows, patches = segments.shape
    if not config.tile_patches:
        own = segments.reshape(rows, count, -1)[:, :, 0]
        return (own[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    tiles = patches // config.tile_patches
    same = jnp.arange(count)[:, None] // (count // tiles) == jnp.arange(patches) // config.tile_patches
    return same[None] & (segments > 0)[:, None]


def _images(config: VisionRememberConfig, batch: Batch, count: int) -> Array:
    """[B, M] int32: the image (a video's frame) that each visual row belongs to, 1, 2, ...; 0 in padding."""
    images = jnp.asarray(batch.patch_segments if batch.patch_images is None else batch.patch_images)
    size = config.tile_patches or config.cells.ratio**2
    own = images.reshape(len(images), -1, size).max(axis=-1)
    return jnp.repeat(own, count // own.shape[1], axis=1)


def _remember(
    config: VisionRememberConfig,
    slot: Any,
    x: Array,
    tokens: Array,
    seen: Array,
    mask: Array,
    images: Array,
    batch: Batch,
) -> Array:
    """The residual stream [B, T, D] with the rows of vision tokens rewritten; every other row stays as it is."""
    asking = vision_rows.taken(x, tokens)
    gate = lambda part: jnp.tanh(slot[part]["gate"]).astype(x.dtype)  # noqa: E731

    def cross(z: Array) -> Array:
        module = CrossAttention if config.local else WholeTiles
        return z + gate("cross") * module(config.layer).apply({"params": slot["cross"]}, z, seen, mask)

    def both(z: Array) -> Array:
        text = _text(config, slot.get("text"), x, batch) if config.asks else None
        found = SelfAttention(config.layer).apply({"params": slot["bidirectional"]}, z, text, images)
        return z + gate("bidirectional") * found

    steps = [both, cross] if config.order == "self_then_cross" else [cross, both]
    z = asking
    for step in steps if config.bidirectional else [cross]:
        z = step(z)
    if config.ffn:
        added: Any = FeedForward(config.layer).apply({"params": slot["ffn"]}, z)
        z = z + gate("cross") * added
    return vision_rows.put(x, tokens, z)


def _text(config: VisionRememberConfig, own: Any, x: Array, batch: Batch) -> Array:
    """[B, 1, D] what stands for the question, from its tokens' states alone."""
    marked = jnp.asarray(batch.question) & (jnp.asarray(batch.segments) > 0)
    if config.text_token == "last_prompt_token":
        last = jnp.max(jnp.where(marked, jnp.arange(marked.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)
    wide = x.astype(jnp.float32)
    scores = wide @ own["query"] * config.width**-0.5 if config.text_token == "attn_pool" else jnp.zeros(marked.shape)
    shares = jnp.where(marked, jax.nn.softmax(jnp.where(marked, scores, MASKED), axis=-1), 0)
    mean = jnp.einsum("bt,btd->bd", shares, wide)[:, None]
    if config.text_token == "attn_pool":
        return mean.astype(x.dtype)
    return _layer_norm(mean, own["scale"], own["bias"]).astype(x.dtype)


def prepare(config: VisionRememberConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing: what was seen lies in the keys and values of a prompt."""


def append(old: None, new: None) -> None:
    """Nothing (`prepare`)."""


def take(state: None, rows: Array) -> None:
    """Nothing (`prepare`)."""


def ports(config: Any, params: Any, state: Any, stream: Stream, dropout: Array | None = None) -> Ports:
    """None: generated tokens see nothing anew (`prompt_ports`)."""
    return Ports()
