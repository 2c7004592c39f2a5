"""The prompts of the parity tests, and the torch model's answer to what our processor made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jaxmem.data.example import Example


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """[height, width, 3] uint8 with structure: gradients, stripes and noise, different along both axes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    wave = np.stack([rows * 255 / height, columns * 255 / width, 128 + 127 * np.sin(rows / 5 + columns / 9)], -1)
    return np.clip(wave + rng.normal(0, 20, wave.shape), 0, 255).astype(np.uint8)


def image(width: int, height: int, seed: int = 0) -> dict[str, Any]:
    """An image part."""
    return {"type": "image", "image": picture(width, height, seed)}


def text(words: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": words}


def user(*parts: Any) -> list[dict[str, Any]]:
    """A chat of one user turn."""
    return [{"role": "user", "content": list(parts)}]


VIDEO = {"type": "video", "video": [picture(96, 64, i) for i in range(5)], "fps": 2.0}
LARGE_VIDEO = {"type": "video", "video": [picture(196, 140, i) for i in range(5)], "fps": 2.0}
LONG = "the quick brown fox jumps over a lazy dog and then describes rows of numbers one by one. " * 50

PROMPTS: dict[str, list[dict[str, Any]]] = {
    "text": user(text("what do they see in each picture?")),
    "wide_and_tall": user(image(256, 64, 1), image(64, 224, 2), text("describe the streets")),
    "three_interleaved": user(
        text("first"), image(96, 96, 3), text("then"), image(160, 64, 4), image(32, 128, 5), text("and which is older?")
    ),
    "video": user(VIDEO, text("when does the fox jump?")),
    "turns": [
        *user(image(64, 64, 6), text("how many dogs?")),
        {"role": "assistant", "content": "seven"},
        *user(text("and now?"), image(96, 64, 7)),
    ],
    "long": user(image(128, 96, 8), text(LONG)),
    "large": user(text("which street"), image(364, 168, 9), text("is longer?")),
    "large_video": user(text("first"), LARGE_VIDEO, text("then what?")),
}
LARGE = ("large", "large_video")
COMMON = tuple(name for name in PROMPTS if name not in LARGE)
VIDEO_GRIDS = {"video": [(3, 4, 6)], "large_video": [(3, 10, 14)]}  # at 14 pixels a patch for the large one


def torch_inputs(name: str, example: Example) -> dict[str, torch.Tensor]:
    """What transformers' forward takes for one prompt, from the same tokens and pixels."""
    is_video = example.tokens == 501
    kind = np.where(example.visual_rows < 0, 0, np.where(is_video, 2, 1))
    inputs = {
        "input_ids": torch.tensor(example.tokens, dtype=torch.long)[None],
        "mm_token_type_ids": torch.tensor(kind, dtype=torch.int32)[None],
        "attention_mask": torch.ones(1, len(example), dtype=torch.long),
    }
    if len(example.patches):
        grids = VIDEO_GRIDS.get(name) or [(1, 2 * rows, 2 * columns) for rows, columns in example.images]
        suffix = "_videos" if name in VIDEO_GRIDS else ""
        inputs["pixel_values" + suffix] = torch.tensor(example.patches)
        inputs["video_grid_thw" if suffix else "image_grid_thw"] = torch.tensor(grids)
    return inputs
