"""Architectures of the backbones as frozen, hashable dataclasses: static arguments of every compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision tower of the Qwen-VL family. Sizes in elements, blocks are counted from 0.

    Attributes:
      taps: blocks whose outputs enter the decoder as DeepStack features; none before Qwen3-VL.
      table_side: the learned position table has table_side^2 rows; 0 for a tower without one.
      norm: "layer" with scale and bias, or "rms".
      mlp: of a block: fc2(act(fc1(x))) with tanh-GELU or x * sigmoid(1.702 x), or down(silu(gate(x)) * up(x)).
      patch_bias: does the patch embedding have a bias?
      window: side of an attention window in visual tokens; 0 lets every block look at whole frames.
      full_blocks: with windows, the blocks that look at whole frames all the same.
    """

    depth: int
    width: int
    mlp_width: int
    heads: int
    out_width: int
    taps: tuple[int, ...] = ()
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    channels: int = 3
    table_side: int = 48
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu_tanh", "quick_gelu", "swiglu"] = "gelu_tanh"
    patch_bias: bool = True
    window: int = 0
    full_blocks: tuple[int, ...] = ()

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

    @property
    def unit(self) -> int:
        """Patches that belong together on a row: those of a visual token."""
        return self.merge_unit

    @property
    def rows_per_patch(self) -> float:
        """Visual rows that a patch becomes."""
        return 1 / self.merge_unit

    @property
    def window_patches(self) -> int:
        """Patches of a whole attention window."""
        return self.window**2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A decoder of the Qwen family.

    Attributes:
      rope_section: frequencies that follow time, height and width.
      rope_interleaved: they alternate (Qwen3-VL), or stand in three runs (Qwen2-VL).
      qk_norm: queries and keys are normalised per head.
      qkv_bias: the maps to queries, keys and values have biases.
    """

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
    rope_interleaved: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A backbone: a decoder, a vision tower or none, and the token ids that join them.

    Attributes:
      vision: `VisionConfig` in the Qwen-VL family; None for a decoder alone.
      image_token, video_token, vision_start_token, vision_end_token: -1 where the backbone has no such token.
      timed_video: each temporal patch of a video is an image of its own behind a text that says its time (Qwen3-VL);
        else a video is one run of placeholders.
      positions_per_second: temporal positions of one second of such a run; None counts temporal patches.
    """

    model_type: str
    text: TextConfig
    vision: Any = None
    image_token: int = -1
    video_token: int = -1
    vision_start_token: int = -1
    vision_end_token: int = -1
    timed_video: bool = True
    positions_per_second: float | None = None

    @property
    def media_tokens(self) -> tuple[int, ...]:
        """Ids that only a prompt may hold; sampling never produces them."""
        ids = (self.image_token, self.video_token, self.vision_start_token, self.vision_end_token)
        return tuple(id_ for id_ in ids if id_ >= 0)

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch; 0 without a vision tower."""
        return 0 if self.vision is None else self.vision.patch_dim

    @property
    def patch_unit(self) -> int:
        """Patches that belong together: those of a visual token, or of a tile; 1 without a vision tower."""
        return 1 if self.vision is None else self.vision.unit

    def visual_rows(self, patches: float) -> float:
        """Visual rows that so many patches become."""
        return 0.0 if self.vision is None else patches * self.vision.rows_per_patch


def require(source: Mapping[str, Any], key: str, where: str) -> Any:
    """`source[key]`, or a ConfigError that names the file section and the key."""
    if key not in source:
        raise ConfigError(f"{where} has no {key!r}; every released config.json states it")
    return source[key]
