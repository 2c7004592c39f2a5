"""Architectures of published checkpoints by name, for planning before anything is downloaded.

A folder's own `config.json` always counts more; these numbers are those of the released files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.backbones.llava_config import TileVision
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.vit import ViTConfig

_IDS = (151_655, 151_656, 151_652, 151_653)
_SMALL = {"depth": 24, "width": 1024, "mlp_width": 4096, "heads": 16, "taps": (5, 11, 17)}
_LARGE = {"depth": 27, "width": 1152, "mlp_width": 4304, "heads": 16, "taps": (8, 16, 24)}


def _qwen3_vl(layers: int, width: int, mlp: int, heads: int, tied: bool, vision: Mapping) -> BackboneConfig:
    text = TextConfig(layers, width, mlp, heads, kv_heads=8, head_dim=128, vocab=151_936, tied=tied)
    return BackboneConfig("qwen3_vl", text, VisionConfig(out_width=width, **vision), *_IDS)


def _qwen2(sizes: Sequence[int], tied: bool, positions: int) -> TextConfig:
    layers, width, mlp, heads, kv_heads = sizes
    return TextConfig(
        layers, width, mlp, heads, kv_heads, head_dim=128, vocab=151_936 if tied else 152_064, tied=tied,
        rope_theta=1e6, rope_section=(16, 24, 24), rope_interleaved=False, max_positions=positions,
        qk_norm=False, qkv_bias=True,
    )  # fmt: skip


def _qwen2_vl(*sizes: int, tied: bool = False) -> BackboneConfig:
    text = _qwen2(sizes, tied, 32_768)
    vision = VisionConfig(
        32, 1280, 5120, 16, text.width, patch_size=14, table_side=0, mlp="quick_gelu", patch_bias=False
    )
    return BackboneConfig("qwen2_vl", text, vision, *_IDS, timed_video=False)


def _qwen2_5_vl(*sizes: int, tower: int, tied: bool = False) -> BackboneConfig:
    text = _qwen2(sizes, tied, 128_000)
    vision = VisionConfig(
        32, 1280, tower, 16, text.width, patch_size=14, table_side=0, norm="rms", mlp="swiglu", patch_bias=False,
        window=4, full_blocks=(7, 15, 23, 31),
    )  # fmt: skip
    return BackboneConfig("qwen2_5_vl", text, vision, *_IDS, timed_video=False, positions_per_second=2.0)


def _causal(*sizes: int) -> BackboneConfig:
    """A Qwen2.5 without a tower, whose tokens have one place each."""
    text = _qwen2(sizes, False, 32_768)
    return BackboneConfig("qwen2", dataclasses.replace(text, rope_section=(text.head_dim // 2, 0, 0)))


def _llava_vr(layers: int, width: int, mlp: int, heads: int, kv_heads: int, ratio: int) -> BackboneConfig:
    """Qwen2 and CLIP-L/14 at 336 pixels, joined by `jaxmem assemble --projector=avgpool`."""
    half = width // heads // 2
    text = TextConfig(
        layers, width, mlp, heads, kv_heads, head_dim=2 * half, vocab=151_936, tied=True, rope_theta=1e6,
        rope_section=(half, 0, 0), rope_interleaved=False, max_positions=32_768, qk_norm=False, qkv_bias=True,
    )  # fmt: skip
    tower = ViTConfig(
        width=1024, depth=24, heads=16, mlp_width=4096, act="quick_gelu", norm_eps=1e-5, image_size=336, patch_size=14
    )
    points = tuple((336 * rows, 336 * columns) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    projector = ProjectorConfig("avgpool", 1024, width, tower.side, ratio=ratio)
    vision = TileVision(tower, projector, (-2,), False, "anyres", points)
    return BackboneConfig("llava_next", text, vision, image_token=151_646)


PUBLISHED: Mapping[str, BackboneConfig] = {
    "Qwen2-VL-2B-Instruct": _qwen2_vl(28, 1536, 8960, 12, 2, tied=True),
    "Qwen2-VL-7B-Instruct": _qwen2_vl(28, 3584, 18944, 28, 4),
    "Qwen2-VL-72B-Instruct": _qwen2_vl(80, 8192, 29568, 64, 8),
    "Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(36, 2048, 11008, 16, 2, tower=3420, tied=True),
    "Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(28, 3584, 18944, 28, 4, tower=3420),
    "Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(64, 5120, 27648, 40, 8, tower=3456),
    "Qwen2.5-VL-72B-Instruct": _qwen2_5_vl(80, 8192, 29568, 64, 8, tower=3456),
    "Qwen2.5-7B-Instruct": _causal(28, 3584, 18944, 28, 4),
    "Qwen3-VL-2B-Instruct": _qwen3_vl(28, 2048, 6144, 16, True, _SMALL),
    "Qwen3-VL-4B-Instruct": _qwen3_vl(36, 2560, 9728, 32, True, _SMALL),
    "Qwen3-VL-8B-Instruct": _qwen3_vl(36, 4096, 12288, 32, False, _LARGE),
    "Qwen3-VL-32B-Instruct": _qwen3_vl(64, 5120, 25600, 64, False, _LARGE),
    "LLaVA-VR-2B": _llava_vr(28, 1536, 8960, 12, 2, ratio=2),
}
"""Name of the folder on the hub to its architecture."""
