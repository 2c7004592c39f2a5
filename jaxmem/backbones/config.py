"""Architectures of the backbones as frozen, hashable dataclasses: static arguments of every compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (of Qwen3-VL). Sizes in elements, `taps` are 0-based block indices."""

    depth: int
    width: int
    mlp_width: int
    heads: int
    out_width: int
    taps: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    channels: int = 3
    table_side: int = 48
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: channels * frames * patch * patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder (of Qwen3-VL)."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    rope_section: tuple[int, int, int] = (24, 20, 20)
    max_positions: int = 262_144
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A vision-language backbone: two towers and the token ids that join them."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int

    @property
    def media_tokens(self) -> tuple[int, ...]:
        """Ids that only a prompt may hold; sampling never produces them."""
        return (self.image_token, self.video_token, self.vision_start_token, self.vision_end_token)


def require(source: Mapping[str, Any], key: str, where: str) -> Any:
    """`source[key]`, or a ConfigError that names the file section and the key."""
    if key not in source:
        raise ConfigError(f"{where} has no {key!r}; every released config.json states it")
    return source[key]
