"""What config.json says of LLaVA-style backbones: a CLIP or SigLIP tower, a projector, and a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmem import config as configs
from jaxmem.backbones import causal_lm, clip_config, encoder
from jaxmem.backbones.config import BackboneConfig, require
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.vit import ViTConfig
from jaxmem.errors import ConfigError

NEXT, ONEVISION = "llava_next", "llava_onevision"
MODEL_TYPES = (NEXT, ONEVISION)
PROJECTOR = "projector"
"""The section of config.json that names another projector than the two linear maps of LLaVA."""


@dataclasses.dataclass(frozen=True)
class TileVision:
    """The vision side of a LLaVA-style backbone: images are cut to square tiles of the tower's size.

    Attributes:
      tower: CLIP or SigLIP.
      projector: from the tower's features to visual tokens.
      feature_layers: hidden states of the tower that the projector reads, joined on the channels (-2 in LLaVA-NeXT).
      class_token: the features keep CLIP's class token in front of the patches (`vision_feature_select_strategy`
        "full"); not for towers that have none.
      aspect: "anyres"; "anyres_max_K": more than K tiles' worth of tokens are scaled down; "single": one tile.
      pinpoints: (height, width) in pixels that an image may fill with tiles.
    """

    tower: ViTConfig
    projector: ProjectorConfig
    feature_layers: tuple[int, ...]
    class_token: bool
    aspect: str
    pinpoints: tuple[tuple[int, int], ...]

    @property
    def tile_patches(self) -> int:
        """Patches of a tile."""
        return self.tower.side**2

    @property
    def patch_dim(self) -> int:
        """C, length of one flattened patch."""
        return self.tower.patch_dim

    @property
    def unit(self) -> int:
        """Patches that belong together on a row: those of a tile."""
        return self.tile_patches

    @property
    def rows_per_patch(self) -> float:
        """Visual rows that a patch becomes."""
        return self.projector.tokens / self.tile_patches

    @property
    def depth_used(self) -> int:
        """Blocks of the tower that the projector's features pass."""
        return max(encoder.resolve((*self.feature_layers, *self.projector.layers), self.tower.depth))

    @property
    def window(self) -> int:
        """0: the tower's blocks look at whole tiles."""
        return 0


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads the `config.json` of a LLaVA-NeXT or LLaVA-OneVision.

    A section "projector" ({"name": ..., "ratio": ...}) replaces the two linear maps.

    Raises:
      ConfigError: a required key is missing, or a setting that is not computed.
    """
    kind = str(hf["model_type"])
    text, seen = require(hf, "text_config", "config.json"), require(hf, "vision_config", "config.json")
    tied = bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    decoder = causal_lm.text_config(text, "config.json text_config", tied)
    vision = _vision(kind, hf, clip_config.vision_config({"model_type": "clip_vision_model", **seen}), decoder.width)
    image = hf.get("image_token_index", hf.get("image_token_id"))
    video = hf.get("video_token_index", hf.get("video_token_id", -1))
    if image is None:
        raise ConfigError("config.json has no 'image_token_index'; it is the id of the placeholder of images")
    return BackboneConfig(kind, decoder, vision, image_token=image, video_token=-1 if video is None else video)


def _vision(kind: str, hf: Mapping[str, Any], tower: ViTConfig, width: int) -> TileVision:
    """The vision side."""
    given = hf.get("vision_feature_layer", -2 if kind == NEXT else -1)
    layers = tuple(given) if isinstance(given, Sequence) else (given,)
    encoder.resolve(layers, tower.depth)
    strategy = hf.get("vision_feature_select_strategy", "default" if kind == NEXT else "full")
    aspect = hf.get("vision_aspect_ratio", "anyres" if kind == NEXT else "anyres_max_9")
    pinpoints = tuple((int(height), int(width)) for height, width in require(hf, "image_grid_pinpoints", "config.json"))
    _check(tower, strategy, aspect, pinpoints)
    return TileVision(
        tower, _projector(hf, tower, layers, width), layers, strategy == "full" and tower.class_token, aspect, pinpoints
    )


def _projector(hf: Mapping[str, Any], tower: ViTConfig, layers: tuple[int, ...], width: int) -> ProjectorConfig:
    """The section "projector", or the two linear maps of LLaVA."""
    sizes = {"in_width": tower.width * len(layers), "out_width": width, "side": tower.side}
    common = {"act": hf.get("projector_hidden_act", "gelu"), "bias": hf.get("multimodal_projector_bias", True)}
    section = {"name": "mlp", **common, **(hf.get(PROJECTOR) or {})}
    if owned := sorted(set(section) & set(sizes)):
        raise ConfigError(f"config.json {PROJECTOR}: {', '.join(owned)} follow from the towers; leave them out")
    config = configs.build(ProjectorConfig, section | sizes, f"config.json {PROJECTOR}")
    if config.layers:
        encoder.resolve(config.layers, tower.depth)
    return config


def _check(tower: ViTConfig, strategy: str, aspect: str, pinpoints: Sequence[tuple[int, int]]) -> None:
    """Refuses what is not computed, by key."""
    size, scaled = tower.image_size, aspect.removeprefix("anyres_max_")
    faults = {
        f"vision_feature_select_strategy {strategy!r}: use 'default' or 'full'": strategy not in ("default", "full"),
        "vision_feature_select_strategy 'full' keeps the class token, which has no place in a grid of tiles; use"
        " 'default'": strategy == "full" and tower.class_token,
        "vision_feature_select_strategy 'default' drops the first patch of a tower without class token; use 'full'": (
            strategy == "default" and not tower.class_token
        ),
        f"vision_aspect_ratio {aspect!r}: use 'anyres', 'anyres_max_K' with a number of tiles, or 'single'": (
            aspect not in ("anyres", "single") and not scaled.isdigit()
        ),
        "image_grid_pinpoints is empty; it lists the (height, width) that an image may fill with tiles": not pinpoints,
        f"image_grid_pinpoints: all must be multiples of the tower's {size} pixels": any(
            side % size for point in pinpoints for side in point
        ),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("config.json: " + "; ".join(wrong))
