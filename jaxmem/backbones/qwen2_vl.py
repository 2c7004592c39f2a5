"""Qwen2-VL: vision tower with LayerNorm, quick-GELU and whole frames, M-RoPE in three runs, q/k/v-biased GQA decoder.

What it shares with Qwen2.5-VL is here: the decoder, and `config.json` in the flat layout of the published files (the
decoder's keys at the top) and in the nested one that newer releases of transformers write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmem.backbones import qwen
from jaxmem.backbones.config import BackboneConfig, VisionConfig, require
from jaxmem.backbones.qwen import cells, embed, init, own_ports, rotary_angles, see, shapes

__all__ = [
    "MODEL_TYPE",
    "build",
    "cells",
    "config_from_hf",
    "embed",
    "init",
    "own_ports",
    "rotary_angles",
    "see",
    "shapes",
]

MODEL_TYPE = "qwen2_vl"


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads a Hugging Face `config.json` in either layout.

    Args:
      hf: the parsed file, of `model_type` qwen2_vl.

    Raises:
      ConfigError: a required key is missing, or a setting that this module does not compute.
    """
    seen = require(hf, "vision_config", "config.json")
    need = lambda key: require(seen, key, "config.json vision_config")  # noqa: E731
    width = need("embed_dim")
    vision = VisionConfig(
        width=width,
        mlp_width=int(width * seen.get("mlp_ratio", 4)),
        out_width=need("hidden_size"),
        table_side=0,
        patch_bias=False,
        mlp="quick_gelu",
        **qwen.vision_shape(seen, need, 14),
    )
    return build(MODEL_TYPE, hf, vision, {}, timed_video=False)


def build(
    model_type: str, hf: Mapping[str, Any], vision: VisionConfig, faults: Mapping[str, Any], **settings: Any
) -> BackboneConfig:
    """The backbone of a Qwen2 decoder and a vision tower.

    Args:
      model_type: of the backbone.
      hf: the parsed file.
      vision: the tower.
      faults: message to condition, what else is refused.
      **settings: further fields of BackboneConfig.

    Raises:
      ConfigError: see `config_from_hf`.
    """
    nested = hf.get("text_config")
    where, text = ("config.json", hf) if nested is None else ("config.json text_config", nested)
    tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    family = {"rope_interleaved": False, "qk_norm": False, "qkv_bias": True}
    decoder = qwen.text_config(text, where, tied, (16, 24, 24), 32_768, **family)
    t, seen, rope = decoder, hf["vision_config"], qwen.rope_settings(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    own = {
        f"{where} use_sliding_window: only attention to all earlier tokens is implemented": (
            text.get("use_sliding_window") or set(text.get("layer_types") or ()) - {"full_attention"}
        ),
        f"{where} rope type {kind!r}: only 'mrope' and 'default' are implemented": kind not in ("mrope", "default"),
        f"{t.heads} heads of {t.head_dim} must fill hidden_size {t.width}": t.heads * t.head_dim != t.width,
        f"the vision tower's output width {vision.out_width} differs from hidden_size {t.width}": (
            vision.out_width != t.width
        ),
    }
    qwen.refuse(qwen.common_faults(t, vision, text, seen) | own | dict(faults))
    return BackboneConfig(model_type, decoder, vision, **qwen.token_ids({**text, **hf}), **settings)
