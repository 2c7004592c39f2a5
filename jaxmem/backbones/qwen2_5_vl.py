"""Qwen2.5-VL: the decoder of Qwen2-VL; a vision tower with RMSNorm, gated MLPs and attention in windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmem.backbones import qwen, qwen2_vl
from jaxmem.backbones.config import BackboneConfig, VisionConfig, require
from jaxmem.backbones.qwen import cells, embed, init, own_ports, rotary_angles, see, shapes

__all__ = ["MODEL_TYPE", "cells", "config_from_hf", "embed", "init", "own_ports", "rotary_angles", "see", "shapes"]

MODEL_TYPE = "qwen2_5_vl"


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads a Hugging Face `config.json`, flat or nested.

    Args:
      hf: the parsed file, of `model_type` qwen2_5_vl.

    Raises:
      ConfigError: a required key is missing, or a setting that this module does not compute.
    """
    seen = require(hf, "vision_config", "config.json")
    need = lambda key: require(seen, key, "config.json vision_config")  # noqa: E731
    shape = qwen.vision_shape(seen, need, 14)
    vision = VisionConfig(
        width=need("hidden_size"),
        mlp_width=need("intermediate_size"),
        out_width=need("out_hidden_size"),
        table_side=0,
        patch_bias=False,
        norm="rms",
        mlp="swiglu",
        window=need("window_size") // (shape["merge_size"] * shape["patch_size"]),
        full_blocks=tuple(need("fullatt_block_indexes")),
        **shape,
    )
    faults = {
        f"window_size {seen['window_size']} is smaller than one visual token": vision.window < 1,
        f"fullatt_block_indexes {vision.full_blocks} reach beyond the {vision.depth} blocks": (
            not set(vision.full_blocks) <= set(range(vision.depth))
        ),
    }
    speed = float(need("tokens_per_second"))
    return qwen2_vl.build(MODEL_TYPE, hf, vision, faults, timed_video=False, positions_per_second=speed)
