"""Which module computes which `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxmem.backbones import causal_lm, llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from jaxmem.backbones.config import BackboneConfig
from jaxmem.errors import ConfigError

BACKBONES: dict[str, ModuleType] = {
    **{lib.MODEL_TYPE: lib for lib in (qwen2_vl, qwen2_5_vl, qwen3_vl)},
    **dict.fromkeys(causal_lm.FAMILIES, causal_lm),
    **dict.fromkeys(llava.MODEL_TYPES, llava),
}


def backbone(model_type: str) -> ModuleType:
    """The module with a backbone's functions (see `qwen`).

    Raises:
      ConfigError: no such backbone; the message lists those there are.
    """
    if model_type not in BACKBONES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """The architecture that a parsed Hugging Face `config.json` describes.

    Raises:
      ConfigError: an unsupported model type, or a key that is missing or not implemented.
    """
    return backbone(str(hf.get("model_type"))).config_from_hf(hf)
