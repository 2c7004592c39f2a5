"""Tiny random LLaVA-NeXTs, LLaVA-OneVisions and decoders in Hugging Face folders, made by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from tests.helpers import write_tokenizer
from tests.tiny import TEXT, _save

TILE = {"next": 28, "onevision": 30}  # of the latter two pixels of each row belong to no patch
VISION = {"hidden_size": 36, "intermediate_size": 52, "num_attention_heads": 4, "patch_size": 7}
TEMPLATE = """{#- ChatML with one bare placeholder per image, as LLaVA-style folders write it. -#}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) %}
        {%- if part.type == 'text' %}{{ part.text }}
        {%- else %}{{ '<|image_pad|>\n' }}{% endif %}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
FAMILIES = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
}


def text_config(family: str, **settings: Any) -> Any:
    """A tiny decoder's configuration."""
    sizes = TEXT | {"num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | settings
    return FAMILIES[family](**sizes)


def write_decoder(folder: Path, family: str = "qwen2", *, seed: int = 0, tied: bool = False, **settings: Any) -> Any:
    """A decoder alone, with its tokenizer."""
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").unlink()
    config = text_config(family, tie_word_embeddings=tied, **settings)
    return _save(transformers.AutoModelForCausalLM.from_config(config), folder, "float32", seed, None)


def pinpoints(kind: str) -> list[list[int]]:
    """(height, width) of what an image may fill."""
    if kind == "next":
        return [[side * TILE[kind] for side in pair] for pair in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    return [[TILE[kind] * rows, TILE[kind] * columns] for rows in range(1, 7) for columns in range(1, 7)]


def write_llava(
    kind: str,
    folder: Path,
    *,
    family: str = "qwen2",
    seed: int = 0,
    tied: bool = False,
    layers: int = 4,
    weights: bool = True,
    text: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A whole folder.

    Args:
      kind: "next" (CLIP) or "onevision" (SigLIP).
      folder: gets all files.
      family: of the decoder.
      seed: of the weights.
      tied: one table for embedding and head.
      layers: blocks of the tower.
      weights: build the torch model; False writes config.json alone.
      text: settings of the decoder.
      **settings: of config.json.

    Returns:
      The torch model in eval mode (None without weights).
    """
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    seen = VISION | {"image_size": TILE[kind], "num_hidden_layers": layers}
    tower = transformers.CLIPVisionConfig if kind == "next" else transformers.SiglipVisionConfig
    seen |= {"vision_use_head": False} if kind == "onevision" else {}
    common = {
        "vision_config": tower(**seen),
        "text_config": text_config(family, tie_word_embeddings=tied, **(text or {})),
        "image_grid_pinpoints": pinpoints(kind),
        "image_token_index" if kind == "next" else "image_token_id": 500,
        "tie_word_embeddings": tied,
    }
    if kind == "next":
        config = transformers.LlavaNextConfig(**common, **settings)
        model = transformers.LlavaNextForConditionalGeneration
    else:
        config = transformers.LlavaOnevisionConfig(**common, video_token_id=501, **settings)
        model = transformers.LlavaOnevisionForConditionalGeneration
    _write_images(kind, folder)
    if not weights:
        config.save_pretrained(folder)
        return None
    return _save(model(config), folder, "float32", seed, None)


def _write_images(kind: str, folder: Path) -> None:
    """preprocessor_config.json, as transformers writes it."""
    tile = {"height": TILE[kind], "width": TILE[kind]}
    if kind == "next":
        settings = {"size": {"shortest_edge": TILE[kind]}, "crop_size": tile, "do_center_crop": True}
        settings |= {"image_processor_type": "LlavaNextImageProcessor"}
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    else:
        settings, mean, std = (
            {"size": tile, "image_processor_type": "LlavaOnevisionImageProcessor"},
            [0.5] * 3,
            [0.5] * 3,
        )
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"), True)
    settings |= {"image_mean": mean, "image_std": std, "image_grid_pinpoints": pinpoints(kind), **steps}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def amend(folder: Path, **settings: Any) -> None:
    """Changes keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
