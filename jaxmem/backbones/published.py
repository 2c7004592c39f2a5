"""Architectures of published checkpoints by name, for planning before anything is downloaded.

A folder's own `config.json` always counts more; these numbers are those of the released files.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig

_SMALL = {"depth": 24, "width": 1024, "mlp_width": 4096, "heads": 16, "taps": (5, 11, 17)}
_LARGE = {"depth": 27, "width": 1152, "mlp_width": 4304, "heads": 16, "taps": (8, 16, 24)}


def _qwen3_vl(layers: int, width: int, mlp: int, heads: int, tied: bool, vision: Mapping) -> BackboneConfig:
    text = TextConfig(layers, width, mlp, heads, kv_heads=8, head_dim=128, vocab=151_936, tied=tied)
    return BackboneConfig("qwen3_vl", text, VisionConfig(out_width=width, **vision), 151_655, 151_656, 151_652, 151_653)


PUBLISHED: Mapping[str, BackboneConfig] = {
    "Qwen3-VL-2B-Instruct": _qwen3_vl(28, 2048, 6144, 16, True, _SMALL),
    "Qwen3-VL-4B-Instruct": _qwen3_vl(36, 2560, 9728, 32, True, _SMALL),
    "Qwen3-VL-8B-Instruct": _qwen3_vl(36, 4096, 12288, 32, False, _LARGE),
    "Qwen3-VL-32B-Instruct": _qwen3_vl(64, 5120, 25600, 64, False, _LARGE),
}
"""Name of the folder on the hub to its architecture."""
