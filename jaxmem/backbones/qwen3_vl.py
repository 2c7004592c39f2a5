"""Qwen3-VL, dense sizes: vision tower with DeepStack, interleaved M-RoPE, q/k-normalised GQA decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxmem.backbones import qwen
from jaxmem.backbones.config import BackboneConfig, VisionConfig, require
from jaxmem.backbones.qwen import cells, embed, init, own_ports, rotary_angles, see, shapes

__all__ = ["MODEL_TYPE", "cells", "config_from_hf", "embed", "init", "own_ports", "rotary_angles", "see", "shapes"]

MODEL_TYPE = "qwen3_vl"


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed file, of `model_type` qwen3_vl.

    Raises:
      ConfigError: a required key is missing, or a setting that this module does not compute.
    """
    text, seen = require(hf, "text_config", "config.json"), require(hf, "vision_config", "config.json")
    tied = bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    text = {"rms_norm_eps": 1e-6, **text}
    decoder = qwen.text_config(text, "config.json text_config", tied, (24, 20, 20), 262_144)
    config = BackboneConfig(MODEL_TYPE, decoder, _vision_config(seen), **qwen.token_ids(hf))
    _check(config, text, seen)
    return config


def _vision_config(seen: Mapping[str, Any]) -> VisionConfig:
    need = lambda key: require(seen, key, "config.json vision_config")  # noqa: E731
    return VisionConfig(
        width=need("hidden_size"),
        mlp_width=need("intermediate_size"),
        out_width=need("out_hidden_size"),
        taps=tuple(need("deepstack_visual_indexes")),
        table_side=math.isqrt(need("num_position_embeddings")),
        **qwen.vision_shape(seen, need, 16),
    )


def _check(config: BackboneConfig, text: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """Refuses what this module would compute wrongly, by key."""
    t, v, kind = config.text, config.vision, qwen.rope_settings(text).get("rope_type", "default")
    faults = {
        "text_config.attention_bias: only bias-free attention is implemented": text.get("attention_bias", False),
        f"text_config rope_type {kind!r}: only 'default' is implemented": kind != "default",
        f"vision out_hidden_size {v.out_width} differs from hidden_size {t.width}": v.out_width != t.width,
        f"deepstack_visual_indexes {v.taps} reach beyond the {v.depth} blocks": max(v.taps, default=0) >= v.depth,
        f"{len(v.taps)} DeepStack taps need as many decoder layers, there are {t.layers}": len(v.taps) > t.layers,
        "num_position_embeddings must be a square": v.table_side**2 != seen["num_position_embeddings"],
    }
    qwen.refuse(qwen.common_faults(t, v, text, seen) | faults)
