"""Tiny random Qwen-VLs in Hugging Face folders, made by transformers itself: the oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
QWEN2_VISION = {"depth": 3, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 4, "patch_size": 14}
QWEN2_5_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 4,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
}
TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}


def write_qwen3_vl(
    folder: str | Path,
    *,
    tied: bool = False,
    layers: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> transformers.Qwen3VLForConditionalGeneration:
    """Builds a tiny Qwen3-VL with random weights and saves it with `save_pretrained`.

    Every parameter is random, norm weights and biases included, so that a swapped or forgotten tensor shows.

    Args:
      folder: where config.json and the safetensors go.
      tied: one table for the embedding and the head.
      layers: decoder layers.
      dtype: of the parameters on disk ("float32", "bfloat16", "float16").
      seed: of the weights.
      max_shard_size: passed on to `save_pretrained`; small values give a sharded folder.
      **overrides: a token id by its name in config.json (`image_token_id=7`); a vision setting with the prefix
        `vision_` (`vision_depth=5`); anything else is a text setting (`hidden_size=80`). Two short forms:
        `mrope_section=(4, 2, 2)` and `rope_theta=5e6`. The vision tower's output width follows `hidden_size`.

    Returns:
      The torch model that was saved, in eval mode.
    """
    config = _config(tied, layers, dict(overrides))
    return _save(transformers.Qwen3VLForConditionalGeneration(config), folder, dtype, seed, max_shard_size)


def write_qwen2_vl(folder: str | Path, **settings: Any) -> transformers.Qwen2VLForConditionalGeneration:
    """The same for Qwen2-VL; token ids, `tied`, `layers`, `dtype`, `seed`, `max_shard_size` and overrides as above."""
    return _write_qwen2("Qwen2VL", QWEN2_VISION, "hidden_size", folder, **settings)


def write_qwen2_5_vl(folder: str | Path, **settings: Any) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """The same for Qwen2.5-VL, whose attention windows are 4 x 4 visual tokens."""
    return _write_qwen2("Qwen2_5_VL", QWEN2_5_VISION, "out_hidden_size", folder, **settings)


def _write_qwen2(
    family: str,
    vision: dict[str, Any],
    output: str,
    folder: str | Path,
    *,
    tied: bool = False,
    layers: int = 2,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Any:
    """A folder of one of the two families with a Qwen2 decoder; `output` names the tower's output width."""
    rope = {"rope_type": "default", "rope_theta": overrides.pop("rope_theta", 1e6)}
    rope["mrope_section"] = list(overrides.pop("mrope_section", (2, 3, 3)))
    tokens = {name: overrides.pop(name, default) for name, default in TOKENS.items()}
    seen = {key.removeprefix("vision_"): overrides.pop(key) for key in list(overrides) if key.startswith("vision_")}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | overrides
    text |= {"num_hidden_layers": layers, "rope_parameters": rope, "bos_token_id": 506, "eos_token_id": 505}
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision | {output: text["hidden_size"]} | seen,
        tie_word_embeddings=tied,
        **tokens,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    return _save(model, folder, dtype, seed, max_shard_size)


def _save(model: Any, folder: str | Path, dtype: str, seed: int, max_shard_size: str | int | None) -> Any:
    """The model in eval mode with every parameter random, saved."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (_scaled(name, noise)).to(getattr(torch, dtype))
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    return model


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Matrices keep the scale of their input, norm weights lie around 1, biases around 0."""
    if noise.ndim > 1:
        return noise / noise[0].numel() ** 0.5
    return 0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise


def _config(tied: bool, layers: int, overrides: dict[str, Any]) -> transformers.Qwen3VLConfig:
    """The configuration with `overrides` sorted into its three sections."""
    rope = {
        "rope_type": "default",
        "rope_theta": overrides.pop("rope_theta", 5e6),
        "mrope_section": list(overrides.pop("mrope_section", (4, 2, 2))),
        "mrope_interleaved": True,
    }
    tokens = {name: overrides.pop(name, default) for name, default in TOKENS.items()}
    vision = {key.removeprefix("vision_"): overrides.pop(key) for key in list(overrides) if key.startswith("vision_")}
    text = TEXT | overrides | {"num_hidden_layers": layers, "rope_parameters": rope}
    if sum(rope["mrope_section"]) != text["head_dim"] // 2:
        raise ValueError(f"mrope_section {rope['mrope_section']} must sum to head_dim // 2 = {text['head_dim'] // 2}")
    vision = VISION | {"out_hidden_size": text["hidden_size"]} | vision
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)
