"""A LLaVA-style backbone from a decoder's folder and a vision tower's folder, with a projector that is yet to train.

What comes out is a Hugging Face folder of `model_type` llava_next: of the published sizes some exist only as parts.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import llava, registry
from jaxmem.backbones.clip_config import DEFAULTS, VISION_ONLY, ClipConfig
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.llava_config import NEXT, PROJECTOR
from jaxmem.checkpoints import clip_folder, huggingface
from jaxmem.checkpoints.weights import read_json, write_json
from jaxmem.errors import CheckpointError, ConfigError

IMAGE = "<image>"
_TILINGS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # (rows, columns) of LLaVA-NeXT


def assemble(
    text: str | Path,
    vision: str | Path,
    output: str | Path,
    *,
    projector: Mapping[str, Any] | None = None,
    weights: Any = None,
    aspect: str = "anyres",
    seed: int = 0,
    dtype: Any = None,
    chat_template: str | None = None,
) -> BackboneConfig:
    """Writes the folder.

    Args:
      text: Hugging Face folder of a decoder (`jaxmem.backbones.causal_lm`), with its tokenizer.
      vision: of a CLIP or SigLIP, with its preprocessor_config.json.
      output: must not exist yet, or be empty.
      projector: of `ProjectorConfig`, such as {"name": "avgpool", "ratio": 2}; LLaVA's two maps when None.
      weights: of the projector, in the layout of `projectors.init`; fresh ones when None.
      aspect: "anyres" or "single".
      seed: of projector and newline, whose maps are N(0, 0.02^2).
      dtype: of the weights; None keeps what each part stores.
      chat_template: Jinja source; LLaVA's ChatML when None.

    Returns:
      The configuration of what was written.

    Raises:
      CheckpointError: a folder without what it needs, or an output that holds something.
      ConfigError: parts or a projector that do not fit.
    """
    text, vision, output = Path(text), Path(vision), Path(output)
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty; choose another folder")
    hf_text = huggingface.read_config(text)
    decoder = registry.config_from_hf(hf_text)
    if decoder.vision is not None:
        raise ConfigError(f"{text} is a {decoder.model_type}, which sees already; give the folder of a decoder alone")
    tokenizer, image = _tokenizer(text, chat_template)
    seen, tower = clip_folder.load(vision, dtype=dtype)
    vocab = max(decoder.text.vocab, image + 1)
    hf = _config(hf_text, _section(vision, seen), seen, dict(projector or {}), aspect, image, vocab)
    config = registry.config_from_hf(hf)
    base = huggingface.load_backbone(text, decoder, dtype=dtype)
    base = _grown(base, vocab)
    between = llava.fresh(jax.random.key(seed), config) | ({} if weights is None else {"projector": weights})
    between = jax.tree.map(lambda leaf: leaf.astype(base["embed"].dtype), between)
    output.mkdir(parents=True, exist_ok=True)
    huggingface.save_backbone(output, base | between | {"visual": tower["visual"]}, config, hf_config=hf)
    tokenizer.save_pretrained(str(output))
    (output / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(output / "preprocessor_config.json", _images(vision, seen, hf))
    if (text / "generation_config.json").is_file():
        shutil.copy(text / "generation_config.json", output)
    return config


def _tokenizer(text: Path, chat_template: str | None) -> tuple[Any, int]:
    """The decoder's tokenizer with a token that stands for an image, and its id."""
    import transformers  # heavy: only when a tokenizer is wanted

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(text), local_files_only=True)
    if chat_template is None and "<|im_end|>" not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{text}: the tokenizer has no <|im_end|>, which LLaVA's ChatML needs; give chat_template"
        )
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    source = importlib.resources.files("jaxmem") / "assets" / "llava_template.jinja"
    tokenizer.chat_template = chat_template or source.read_text(encoding="utf-8")
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE)


def _section(vision: Path, seen: ClipConfig) -> dict[str, Any]:
    """The tower's section of config.json, with everything stated."""
    hf = read_json(vision / "config.json")
    kind = next(name for name, family in VISION_ONLY.items() if family == seen.family)
    own = hf if seen.model_type in VISION_ONLY else hf.get("vision_config") or {}
    kept = {key: value for key, value in own.items() if key not in ("architectures", "transformers_version")}
    return {**DEFAULTS[seen.family, "vision"], **kept, "model_type": kind}


def _config(
    text: Mapping[str, Any],
    section: Mapping[str, Any],
    seen: ClipConfig,
    projector: dict[str, Any],
    aspect: str,
    image: int,
    vocab: int,
) -> dict[str, Any]:
    """config.json of the whole."""
    size = seen.vision.image_size
    decoder = {key: value for key, value in text.items() if key not in ("architectures", "transformers_version")}
    hf = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": NEXT,
        "image_token_index": image,
        "image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in _TILINGS],
        "vision_feature_layer": -2,  # of SigLIP too: its last block is not used
        "vision_feature_select_strategy": "default" if seen.vision.class_token else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "text_config": decoder | {"vocab_size": vocab},
        "vision_config": dict(section),
    }
    if aspect != "anyres":
        hf["vision_aspect_ratio"] = aspect
    return hf | ({PROJECTOR: projector} if projector else {})


def _grown(base: dict[str, Any], vocab: int) -> dict[str, Any]:
    """The decoder's tables with rows for new tokens: the mean of the others."""

    def grow(table: Any) -> Any:
        missing = vocab - len(table)
        mean = jnp.mean(table.astype(jnp.float32), axis=0, keepdims=True).astype(table.dtype)
        return jnp.concatenate([table, jnp.repeat(mean, missing, axis=0)]) if missing else table

    return base | {name: grow(base[name]) for name in ("embed", "head") if name in base}


def _images(vision: Path, seen: ClipConfig, hf: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of the whole."""
    file = vision / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; copy it from the tower's Hugging Face repository")
    given = json.loads(file.read_text(encoding="utf-8"))
    if absent := [key for key in ("image_mean", "image_std") if key not in given]:
        raise CheckpointError(f"{file} has no {', '.join(absent)}; they are what the tower was trained with")
    size = seen.vision.image_size
    steps = dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"), True
    )
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_mean": given["image_mean"],
        "image_std": given["image_std"],
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_grid_pinpoints": hf["image_grid_pinpoints"],
        "resample": given.get("resample", 3),
        "rescale_factor": given.get("rescale_factor", 1 / 255),
        **steps,
    }


def main(
    *,
    text: str | None,
    vision: str | None,
    output: str | None,
    projector: str,
    ratio: int,
    aspect: str,
    seed: int,
    dtype: str | None,
) -> int:
    """`jaxmem assemble`: see `assemble`; prints what was written."""
    if absent := [f"--{name}" for name, given in (("text", text), ("vision", vision), ("output", output)) if not given]:
        raise ConfigError(f"assemble needs {', '.join(absent)}")
    assert text and vision and output
    section = {"name": projector} | ({"ratio": ratio} if ratio != 1 else {})
    config = assemble(text, vision, output, projector=section, aspect=aspect, seed=seed, dtype=dtype)
    seen = config.vision
    print(
        f"{output}: {config.text.layers} decoder layers of width {config.text.width}, {seen.tower.depth} vision blocks"
        f" of width {seen.tower.width}, {seen.projector.name}: {seen.projector.tokens} tokens per tile of"
        f" {seen.tower.image_size} pixels. The projector is random: train it first."
    )
    return 0
