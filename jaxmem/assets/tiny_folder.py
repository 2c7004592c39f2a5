"""The files of the tiny backbone's Hugging Face folder, except its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jaxmem.assets.tiny_tokenizer import tokenizer_config, train_tokenizer

VOCABULARY = 576  # 557 tokens, rounded up; the rest is free for tokens that a memory may add
_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def write_folder(folder: Path) -> None:
    """Writes tokenizer, chat template, image settings and configurations; makes the folder when it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")
    ids = tokenizer.get_vocab()
    files = {
        "config.json": backbone_config(ids),
        "generation_config.json": _generation_config(ids),
        "preprocessor_config.json": _image_settings("Qwen2VLImageProcessorFast"),
        "tokenizer_config.json": tokenizer_config(),
        "video_preprocessor_config.json": _image_settings("Qwen3VLVideoProcessor"),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def backbone_config(ids: dict[str, int]) -> dict[str, Any]:
    """`config.json`: the Qwen3-VL architecture with about a million parameters.

    Three decoder layers leave one in front of a memory in layers 1 and 2. A board of 8x8 patches meets the 8x8
    position table exactly.

    Args:
      ids: the tokenizer's vocabulary.
    """
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": "bfloat16",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 256,
            "max_position_embeddings": 4096,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 10000.0,
            "use_cache": True,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 128,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 128,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    """Greedy, ended by the end of the turn."""
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return {"do_sample": False, "eos_token_id": ends, "pad_token_id": ids["<|endoftext|>"]}


def _image_settings(kind: str) -> dict[str, Any]:
    """Image settings: as released, but from 32x32 pixels on, so that a 128x128 board stays as it is."""
    name = "video_processor_type" if "Video" in kind else "image_processor_type"
    return {
        name: kind,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def readme(results: str, parameters: int, seconds: float) -> str:
    """README.md of the folder.

    Args:
      results: a Markdown table.
      parameters: of the backbone.
      seconds: that training took, evaluation not counted.
    """
    return _README.format(results=results, parameters=parameters, minutes=seconds / 60)


_README = """# The tiny backbone

A Qwen3-VL in everything but size: {parameters:,} parameters (bfloat16), three decoder layers of width 128, a vision
tower of three blocks of width 64 with two DeepStack taps, interleaved M-RoPE, Qwen's chat template and a byte-level
BPE of Qwen's kind. It knows one thing, digit boards (`jaxmem/data/boards.py`): it reads named cells of a 4x4 board of
handwritten digits and adds them up, and it loses sight of the board as text comes between.

    python -m jaxmem.assets.build

makes everything in this folder from random weights and scikit-learn's bundled digits (1,397 for training, 400 for
testing). Training these weights took {minutes:.0f} minutes on two CPU cores; its phases are described in
`jaxmem/assets/tiny_phases.py`. Every run gives slightly other weights, because the order of floating-point sums does.

On test digits, four cells per board, weights as stored (rounded to bfloat16), arithmetic in float32; `read` is the
share of digits read (teacher forcing), `exact` the share of right final answers in free greedy decoding:

{results}

That it goes blind with distance is partly built in: in the last phase long texts were trained without sight, so that
copying, adding and stopping hold up at long range and what fails is mostly seeing. It shows what a visual memory is
for; its figures say nothing about large models.

Licence: Apache-2.0, like jaxmem. The digits come from the UCI set "Optical Recognition of Handwritten Digits".
"""
