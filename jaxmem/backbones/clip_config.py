"""What config.json says of CLIP and SigLIP folders, and of vision towers inside LLaVA-style backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmem.backbones.clip_text import ClipTextConfig
from jaxmem.backbones.vit import CHANNELS, ViTConfig
from jaxmem.errors import ConfigError

VISION_ONLY = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
MODEL_TYPES = ("clip", "siglip", *VISION_ONLY)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """One or two towers and how an image becomes one vector.

    Attributes:
      model_type: of config.json, one of `MODEL_TYPES`.
      vision: the vision tower.
      text: the text tower; None in a folder that holds a vision tower alone.
      pool: "class": the normed class token (CLIP); "attention": a learned query looks at all normed patches (SigLIP);
        "none": the folder cannot embed images (SigLIP without its head).
      projection: width of the map behind CLIP's pooling; 0 for none.
    """

    model_type: str
    vision: ViTConfig
    text: ClipTextConfig | None = None
    pool: Literal["class", "attention", "none"] = "class"
    projection: int = 0

    @property
    def family(self) -> str:
        """ "clip" or "siglip"."""
        return VISION_ONLY.get(self.model_type, self.model_type)

    @property
    def width(self) -> int:
        """E of image embeddings."""
        return self.projection or self.vision.width


_CLIP = {"num_hidden_layers": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
_SIGLIP = {"num_hidden_layers": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768}
_SIGLIP |= {"intermediate_size": 3072, "num_attention_heads": 12}
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77}
_TEXT |= {"vocab_size": 49_408, "eos_token_id": 49_407}
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
_PROJECTION = 512
_IMAGES = {"image_size": 224, "num_channels": CHANNELS}

DEFAULTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("clip", "text"): _CLIP | _TEXT,
    ("clip", "vision"): _CLIP | _VISION | _IMAGES,
    ("siglip", "text"): _SIGLIP | {"vocab_size": 32_000, "max_position_embeddings": 64, "projection_size": None},
    ("siglip", "vision"): _SIGLIP | _IMAGES | {"patch_size": 16},
}
"""What a released config.json leaves out: sections hold only what differs from these, which transformers defined."""


def config_from_hf(hf: Mapping[str, Any]) -> ClipConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed file, of a `model_type` in `MODEL_TYPES`. SigLIP 2 at a fixed resolution is of type siglip too.

    Raises:
      ConfigError: another model type, or a setting that is not computed.
    """
    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        hint = "; of SigLIP 2, the checkpoints of a fixed resolution (siglip) are, naflex is not" * (kind == "siglip2")
        raise ConfigError(
            f"config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}{hint}"
        )
    family, alone = VISION_ONLY.get(kind, kind), kind in VISION_ONLY
    seen = hf if alone else _section(hf, "vision")
    vision = vision_config(seen, family)
    text = None if alone else _text_config(hf, family)
    if family == "siglip":
        return ClipConfig(kind, vision, text, "attention" if seen.get("vision_use_head", True) else "none")
    projected = not alone or "CLIPVisionModelWithProjection" in (hf.get("architectures") or ())
    return ClipConfig(kind, vision, text, "class", hf.get("projection_dim", _PROJECTION) if projected else 0)


def vision_config(seen: Mapping[str, Any], family: str | None = None) -> ViTConfig:
    """A vision tower from the vision section of a `config.json`, that of a LLaVA-style backbone among them.

    Args:
      seen: the section.
      family: "clip" or "siglip"; read from the section's `model_type` when None.

    Raises:
      ConfigError: another family, or a setting that is not computed.
    """
    if family is None:
        family = VISION_ONLY.get(seen.get("model_type", ""))
    if family not in ("clip", "siglip"):
        kinds = ", ".join(VISION_ONLY)
        raise ConfigError(f"vision_config: model_type {seen.get('model_type')!r} is not supported; supported: {kinds}")
    seen, clip = {**DEFAULTS[family, "vision"], **seen}, family == "clip"
    if seen["num_channels"] != CHANNELS:
        raise ConfigError(
            f"vision_config: num_channels {seen['num_channels']} is not supported; images have {CHANNELS}"
        )
    return ViTConfig(
        **_blocks(seen),
        image_size=_side(seen, "image_size"),
        patch_size=_side(seen, "patch_size"),
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
    )


def _text_config(hf: Mapping[str, Any], family: str) -> ClipTextConfig:
    """The text tower."""
    text = {**DEFAULTS[family, "text"], **_section(hf, "text")}
    width = (
        hf.get("projection_dim", _PROJECTION) if family == "clip" else text["projection_size"] or text["hidden_size"]
    )
    end = text["eos_token_id"] if family == "clip" else None
    if family == "clip" and not isinstance(end, int):
        raise ConfigError(f"config.json: text_config.eos_token_id {end!r} must be one token id")
    sizes = {"vocab": text["vocab_size"], "positions": text["max_position_embeddings"]}
    return ClipTextConfig(**_blocks(text), **sizes, out_width=width, end_token=end)


def _section(hf: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """text_config or vision_config; files of early releases repeat it as *_config_dict, which counts more."""
    given = [hf.get(f"{part}_config_dict"), hf.get(f"{part}_config"), {}]
    return next(section for section in given if section is not None)


def _blocks(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of EncoderConfig."""
    return {
        "width": section["hidden_size"],
        "depth": section["num_hidden_layers"],
        "heads": section["num_attention_heads"],
        "mlp_width": section["intermediate_size"],
        "act": section["hidden_act"],
        "norm_eps": section["layer_norm_eps"],
    }


def _side(section: Mapping[str, Any], key: str) -> int:
    """A size in pixels; a list of two equal ones is one."""
    value = section[key]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) > 1:
        raise ConfigError(f"vision_config: {key} {value} is not square, which is not supported")
    return sides.pop()
