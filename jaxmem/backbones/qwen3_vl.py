"""Qwen3-VL, dense sizes: vision tower with DeepStack, interleaved M-RoPE, q/k-normalised GQA decoder.

A backbone is this module's functions over one parameter tree `base`:
embed [V, D], layers (stacked), norm, head [V, D] (absent when tied), visual (`vision.init`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import vision
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig, require
from jaxmem.backbones.decoder import DecoderLayer
from jaxmem.backbones.layers import attend
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.rope import angles, interleaved_axes
from jaxmem.backbones.vision import Visual
from jaxmem.errors import ConfigError

MODEL_TYPE = "qwen3_vl"


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed file, of `model_type` qwen3_vl.

    Raises:
      ConfigError: a required key is missing, or a setting that this module does not compute.
    """
    text, seen = require(hf, "text_config", "config.json"), require(hf, "vision_config", "config.json")
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    ids = {key: require(hf, f"{key}_id", "config.json") for key in _TOKENS}
    config = BackboneConfig(MODEL_TYPE, _text_config(text, bool(tied)), _vision_config(seen), **ids)
    _check(config, text, seen)
    return config


_TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token")


def _text_config(text: Mapping[str, Any], tied: bool) -> TextConfig:
    need = lambda key: require(text, key, "config.json text_config")  # noqa: E731
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    width, heads = need("hidden_size"), need("num_attention_heads")
    return TextConfig(
        layers=need("num_hidden_layers"),
        width=width,
        mlp_width=need("intermediate_size"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or width // heads,
        vocab=need("vocab_size"),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or need("rope_theta")),
        rope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        max_positions=text.get("max_position_embeddings", 262_144),
        tied=tied,
    )


def _vision_config(seen: Mapping[str, Any]) -> VisionConfig:
    need = lambda key: require(seen, key, "config.json vision_config")  # noqa: E731
    return VisionConfig(
        depth=need("depth"),
        width=need("hidden_size"),
        mlp_width=need("intermediate_size"),
        heads=need("num_heads"),
        out_width=need("out_hidden_size"),
        taps=tuple(need("deepstack_visual_indexes")),
        patch_size=seen.get("patch_size", 16),
        temporal_patch_size=seen.get("temporal_patch_size", 2),
        merge_size=seen.get("spatial_merge_size", 2),
        channels=seen.get("in_channels", 3),
        table_side=math.isqrt(need("num_position_embeddings")),
        rope_theta=float((seen.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
    )


def _check(config: BackboneConfig, text: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """Refuses what this module would compute wrongly, by key."""
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    t, v = config.text, config.vision
    faults = {
        "text_config.attention_bias: only bias-free attention is implemented": text.get("attention_bias", False),
        "text_config.hidden_act: only 'silu' is implemented": text.get("hidden_act", "silu") != "silu",
        "vision_config.hidden_act: only 'gelu_pytorch_tanh' is implemented": (
            seen.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh"
        ),
        f"text_config rope_type {rope.get('rope_type')!r}: only 'default' is implemented": (
            rope.get("rope_type", "default") != "default"
        ),
        f"mrope_section {t.rope_section} must sum to head_dim / 2 = {t.head_dim // 2}": (
            sum(t.rope_section) != t.head_dim // 2
        ),
        f"{t.heads} heads are not a multiple of {t.kv_heads} key heads": t.heads % t.kv_heads,
        f"vision width {v.width} is not a multiple of 4 x {v.heads} heads": v.width % (4 * v.heads),
        f"vision out_hidden_size {v.out_width} differs from hidden_size {t.width}": v.out_width != t.width,
        f"deepstack_visual_indexes {v.taps} reach beyond the {v.depth} blocks": max(v.taps, default=0) >= v.depth,
        f"{len(v.taps)} DeepStack taps need as many decoder layers, there are {t.layers}": len(v.taps) > t.layers,
        "num_position_embeddings must be a square": v.table_side**2 != seen["num_position_embeddings"],
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("config.json: " + "; ".join(wrong))


def init(key: Array, config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """Random weights in the layout of `base`: linear maps and tables N(0, 0.02^2), biases 0, norms 1."""
    t = config.text
    embed_key, head_key, layer_key, vision_key = jax.random.split(key, 4)
    x, angle, mask = jnp.zeros((1, 1, t.width)), jnp.zeros((1, 1, t.head_dim // 2)), jnp.ones((1, 1, 1), bool)
    arguments = (x, angle, lambda q, k, v: (attend(q, k, v, mask), None), lambda ffn, residual, normed: (ffn, {}))
    layer = lambda k: DecoderLayer(t).init(k, *arguments)["params"]  # noqa: E731
    base = {
        "embed": 0.02 * jax.random.normal(embed_key, (t.vocab, t.width)),
        "layers": jax.vmap(layer)(jax.random.split(layer_key, t.layers)),
        "norm": {"scale": jnp.ones(t.width)},
        "visual": vision.init(vision_key, config.vision),
    }
    if not t.tied:
        base["head"] = 0.02 * jax.random.normal(head_key, (t.vocab, t.width))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base)


def shapes(config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of `base` as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, dtype))


def see(config: BackboneConfig, base: Any, batch: Batch) -> Visual | None:
    """The images of every row through the vision tower; None for a batch whose patch axis is empty."""
    return vision.see(config.vision, base["visual"], batch) if batch.patches.shape[1] else None


def embed(base: Any, batch: Batch, visual: Visual | None) -> Array:
    """[B, T, D]: token embeddings, with visual rows in the place of the placeholders."""
    x = base["embed"][jnp.asarray(batch.tokens)]
    return x if visual is None else jnp.where(batch.is_visual[..., None], _rows_at(visual.rows, batch), x)


def _rows_at(rows: Array, batch: Batch) -> Array:
    """[B, M, D] -> [B, T, D], the visual row that each token stands for (any row for text)."""
    index = jnp.maximum(jnp.asarray(batch.visual_rows), 0)
    return jnp.take_along_axis(rows, index[..., None], axis=1)


def own_ports(visual: Visual | None, batch: Batch) -> Ports:
    """DeepStack: feature i is added to the visual positions after decoder layer i."""
    if visual is None or not visual.deepstack.shape[0]:
        return Ports()

    def add(features: Array, residual: Array, normed: Array | None) -> Array:
        return residual + jnp.where(batch.is_visual[..., None], _rows_at(features, batch), 0)

    return Ports(after_layer=(Port(visual.deepstack, add, tuple(range(visual.deepstack.shape[0]))),))


def rotary_angles(config: BackboneConfig, positions: Array) -> Array:
    """[B, 3, T] positions -> [B, T, head_dim/2] radians, interleaved M-RoPE."""
    return angles(positions, interleaved_axes(config.text.rope_section), config.text.rope_theta)
