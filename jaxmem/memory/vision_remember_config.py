"""Settings of Vision Remember (arXiv 2506.03928), and those that fit a backbone.

Where the paper's text is silent, its choice is a field.
Letters: D width of the decoder, W of the tower, C of the fused features, K keys of a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmem import config as configs
from jaxmem.backbones import encoder, registry
from jaxmem.backbones.config import BackboneConfig, VisionConfig
from jaxmem.backbones.vision import Cells
from jaxmem.errors import ConfigError
from jaxmem.memory.resampling import LayerSettings

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "vr_v1": {"fusion": "concat", "bidirectional": False},
    "vr_v2": {"fusion": "concat_linear", "bidirectional": True},
}


@dataclasses.dataclass(frozen=True)
class VisionRememberConfig:
    """One Vision Remember. `create` fills what follows from the backbone.

    Attributes:
      width, tower_width: D and W.
      layers: 0-based decoder layers behind which it acts.
      levels: hidden states of the tower, as transformers counts them (0 enters the first block).
      cells: which patches a visual row stands for.
      tile_patches: patches of a tile; 0 where a frame is no tile (Qwen-VL family).
      halo: patches around a window that it sees too; None is 1 where a window is a single patch, else 0.
      fusion: levels joined on the channels ("concat"), and mapped to W ("concat_linear"), or summed by learned weights
        ("weighted_sum").
      level_norm: a LayerNorm for "each" level, or one over the "joined" levels.
      inner, heads: of the attention.
      local: each token sees its window; False: its whole tile or frame (for projectors without a grid).
      impl, positions, saliency: of the cross-attention (`LayerSettings`); of whole tiles, "direct" and "none".
      bidirectional: tokens of an image ask each other and the question (v2).
      text_token: what stands for the question, by its tokens in the first user turn and never by answers: their mean
        behind a LayerNorm, the last of them, their mean by learned weights, or none.
      order: of the two.
      ffn: an MLP behind them, under the gate of the cross-attention.
      gate: its first value, tanh(gate) multiplies what is added; 0 leaves the backbone as it is.
      gate_shape: one number, or one per channel ("vector").
      initialiser: of maps, "normal" N(0, 0.02^2), or "fan_in" N(0, 1/in), for narrow backbones.
    """

    width: int
    tower_width: int
    layers: tuple[int, ...]
    levels: tuple[int, ...]
    cells: Cells
    tile_patches: int = 0
    halo: int | None = None
    fusion: Literal["concat", "concat_linear", "weighted_sum"] = "concat"
    level_norm: Literal["each", "joined"] = "each"
    inner: int = 1024
    heads: int = 16
    local: bool = True
    impl: Literal["direct", "absorbed"] = "direct"
    positions: Literal["bias", "embedding", "none"] = "bias"
    saliency: Literal["none", "bias"] = "none"
    bidirectional: bool = False
    text_token: Literal["question_mean", "last_prompt_token", "attn_pool", "none"] = "question_mean"
    order: Literal["self_then_cross", "cross_then_self"] = "self_then_cross"
    ffn: bool = False
    gate: float = 0.0
    gate_shape: Literal["scalar", "vector"] = "scalar"
    initialiser: Literal["normal", "fan_in"] = "normal"
    name: str = "vision_remember"

    @property
    def margin(self) -> int:
        """Patches around a window."""
        return int(self.cells.ratio == 1) if self.halo is None else self.halo

    @property
    def features(self) -> int:
        """C."""
        return self.tower_width * (len(self.levels) if self.fusion == "concat" else 1)

    @property
    def layer(self) -> LayerSettings:
        """Of the attention layers."""
        keys = (self.cells.ratio + 2 * self.margin) ** 2 if self.local else 0
        positions = self.positions if self.local else "none"
        return LayerSettings(
            self.width,
            self.features,
            keys,
            self.inner,
            self.heads,
            self.impl,
            positions,
            self.saliency,
            self.initialiser,
        )

    @property
    def asks(self) -> bool:
        """Does it read the question of a prompt?"""
        return self.bidirectional and self.text_token != "none"


def create(backbone: BackboneConfig, *, preset: str = "vr_v1", **overrides: Any) -> VisionRememberConfig:
    """The Vision Remember that fits a backbone.

    Args:
      backbone: gives sizes, and the region that a visual row stands for. Default levels are 13, 18 and 23 of CLIP's 24
        blocks, 15, 20 and 26 of SigLIP's, else in proportion; default layers are 4, 8 and 12 of 28, in proportion.
      preset: "vr_v1" (concatenated levels, cross-attention) or "vr_v2" (mapped levels, attention of tokens too).
      **overrides: fields of VisionRememberConfig; what follows from the backbone can be stated, but not changed.

    Raises:
      ConfigError: an unknown preset or field, or values that do not fit the backbone; the message says what would.
    """
    if preset not in PRESETS:
        raise ConfigError(f"vision_remember has no preset {preset!r}; it has {', '.join(PRESETS)}")
    if backbone.vision is None:
        raise ConfigError(f"vision_remember needs a vision tower, and {backbone.model_type} is a decoder alone")
    known = _known(backbone, local=overrides.get("local", True))
    choices = sorted({field.name for field in dataclasses.fields(VisionRememberConfig)} - set(known))
    if unknown := sorted(set(overrides) - {*choices, *known}):
        raise ConfigError(f"vision_remember has no setting {', '.join(unknown)}; it has {', '.join(choices)}")
    settings: dict[str, Any] = {
        "layers": tuple(sorted({max(1, round(backbone.text.layers * part / 7)) - 1 for part in (1, 2, 3)})),
        "levels": _levels(_depth(backbone)),
        **known,
        **PRESETS[preset],
        **overrides,
    }
    config = configs.build(VisionRememberConfig, settings, "vision_remember")
    if wrong := [f"{key} {getattr(config, key)!r}" for key in known if getattr(config, key) != known[key]]:
        raise ConfigError(
            f"vision_remember: {', '.join(wrong)} must be the backbone's, "
            + ", ".join(f"{key} {value!r}" for key, value in known.items())
        )
    _check(config, backbone)
    return config


def _known(backbone: BackboneConfig, *, local: bool) -> dict[str, Any]:
    """The fields that follow from the backbone."""
    family, lib = isinstance(backbone.vision, VisionConfig), registry.backbone(backbone.model_type)
    return {
        "width": backbone.text.width,
        "tower_width": backbone.vision.width if family else backbone.vision.tower.width,
        "cells": lib.cells(backbone) if local else _no_cells(lib, backbone),
        "tile_patches": 0 if family else backbone.vision.tile_patches,
        "name": "vision_remember",
    }


def _no_cells(lib: Any, backbone: BackboneConfig) -> Cells:
    """What a row stands for where nobody asks: the rows in front of the first still count."""
    try:
        return lib.cells(backbone)
    except ConfigError:
        return Cells(side=backbone.vision.tower.side, ratio=1, first=1)


def _depth(backbone: BackboneConfig) -> int:
    """Blocks of the tower."""
    return backbone.vision.depth if isinstance(backbone.vision, VisionConfig) else backbone.vision.tower.depth


def _levels(depth: int) -> tuple[int, ...]:
    """The published levels, in proportion."""
    known = {24: (13, 18, 23), 26: (15, 20, 26), 27: (15, 20, 26)}
    return known.get(depth) or tuple(sorted({max(1, round(depth * part / 24)) for part in (13, 18, 23)}))


def _check(config: VisionRememberConfig, backbone: BackboneConfig) -> None:
    c, layers, depth = config, backbone.text.layers, _depth(backbone)
    levels = encoder.resolve(c.levels, depth)
    aspect = getattr(backbone.vision, "aspect", "anyres")
    faults = {
        f"layers {c.layers} must be different and within 0..{layers - 1}": (
            not c.layers or len(set(c.layers)) < len(c.layers) or not all(0 <= at < layers for at in c.layers)
        ),
        f"levels {c.levels}: of this tower the outputs of blocks 1 to {depth} are kept": (
            0 in levels and not c.tile_patches
        ),
        f"levels {c.levels}: each can be looked at once": len(set(levels)) < len(levels),
        f"inner {c.inner} is not a multiple of {c.heads} heads": c.heads < 1 or c.inner < 1 or c.inner % c.heads,
        f"halo {c.halo}: a window of one patch makes every weight 1; set halo=1 (3x3 patches)": (
            c.local and c.cells.ratio == 1 and c.margin == 0
        ),
        f"halo {c.halo} must not be negative": c.margin < 0,
        "halo: this tower's patches lie in blocks, not in square tiles; leave it at 0": (
            c.margin and not c.cells.side and c.local
        ),
        "local=False: whole tiles have no windows, so leave out impl='absorbed', positions='embedding' and"
        " saliency='bias'": (
            not c.local and (c.impl == "absorbed" or c.positions == "embedding" or c.saliency == "bias")
        ),
        f"vision_aspect_ratio {aspect!r} scales grids of tokens, whose regions are then no whole windows; set it to"
        " 'anyres' in config.json": aspect.startswith("anyres_max"),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("vision_remember: " + "; ".join(wrong))
