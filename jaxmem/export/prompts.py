"""What an export is proven on: structured prompts, and what the model answers here.

Prompts have several images of different shapes, text before, between and behind them, and none; they are answered as
one padded batch here and one by one there. Images have sizes that processors leave as they are, so that what is
compared is the model, not two libraries' ways of resizing.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxmem.api import Model
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.pixels import ImageProcessor

TOKENS = 20
"""Tokens that are generated greedily."""
SEED = 0
_WORDS = "What is to be seen here, and where? "


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Gradients, stripes and noise, different along both axes."""
    rows, columns = np.mgrid[:height, :width]
    wave = np.stack([rows * 255 / height, columns * 255 / width, 128 + 127 * np.sin(rows / 5 + columns / 9)], axis=-1)
    noisy = wave + np.random.default_rng(seed).normal(0, 20, wave.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def chats(model: Model) -> dict[str, list[dict[str, Any]]]:
    """Prompts by name."""
    image = lambda *size: {"type": "image", "image": _fitting(model, *size)}  # noqa: E731
    words = lambda text: {"type": "text", "text": text}  # noqa: E731
    user = lambda content: [{"role": "user", "content": content}]  # noqa: E731
    contents = {"text": [words("What do they see in each picture?")]}
    if model.spec.backbone.vision is None:
        return {"text": user(contents["text"]), "long": user([words(_WORDS * 8)])}
    contents |= {
        "wide": [image(3, 1, 1), words(_WORDS)],
        "several": [words("First"), image(1, 2, 2), words("then"), image(2, 2, 3), words("and which is older?")],
        "long": [image(2, 3, 4), words(_WORDS * 8)],
    }
    return {name: user(content) for name, content in contents.items()}


def _fitting(model: Model, width: int, height: int, seed: int) -> Image.Image:
    """A picture of about this shape, in a size that the processor keeps."""
    processor = model.processor.image_processor
    if not isinstance(processor, ImageProcessor):  # tiles: resizing is the same to the bit
        return picture(40 * width + 7, 40 * height + 3, seed)
    return picture(*processor.image_size((width * 32, height * 32)), seed)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says to a prompt: logits [T, V] float32 of all tokens, and the ids of its greedy continuation."""

    logits: np.ndarray
    tokens: np.ndarray


def reference(model: Model, folder: Path) -> None:
    """Writes prompts and answers for `jaxmem.export.reload`: images as PNG files, `prompts.json`, `answers.npz`.

    Answers are those of float32 arithmetic, with the memory and without.
    """
    asked, exact = chats(model), in_float32(model)
    prompts: dict[str, Any] = {}
    for name, chat in asked.items():
        images = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
        files = [f"{name}_{number}.png" for number in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(folder / file)
        prompts[name] = {"images": files}
    arrays: dict[str, np.ndarray] = {}
    for state, answering in {"on": exact, "off": exact.without_memory()}.items():
        for name, answers in answer(answering, asked).items():
            arrays |= {f"{name}/{state}/logits": answers.logits, f"{name}/{state}/tokens": answers.tokens}
    for name, chat in asked.items():
        row = exact.processor.encode(chat, add_generation_prompt=True)
        arrays[f"{name}/ids"] = row.tokens
    backbone = exact.spec.backbone
    settings = {"banned": list(backbone.media_tokens), "tokens": TOKENS, "image_token": backbone.image_token}
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, **settings}), encoding="utf-8")
    np.savez(folder / "answers.npz", **arrays)


def in_float32(model: Model) -> Model:
    """The model with all of its weights in float32."""
    wide = lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return dataclasses.replace(model, base=jax.tree.map(wide, model.base), memory=jax.tree.map(wide, model.memory))


def answer(model: Model, asked: dict[str, list[dict[str, Any]]]) -> dict[str, Answers]:
    """Answers to all prompts, read as one batch that is padded on the left."""
    rows = [model.processor.encode(chat, add_generation_prompt=True) for chat in asked.values()]
    longest = lambda count: (_up(max(map(count, rows))),)  # noqa: E731
    buckets = Buckets(tokens=longest(len), patches=longest(lambda row: len(row.patches)))
    batch = collate(rows, buckets, model.processor.pad_token, "left")
    logits, valid = np.asarray(model.logits(batch)), np.asarray(batch.segments) > 0
    replies = model.generate(list(asked.values()), max_new_tokens=TOKENS, stop_tokens=(), buckets=buckets)
    pairs = zip(asked, logits, valid, replies, strict=True)
    return {name: Answers(scores[kept], np.array(reply.tokens)) for name, scores, kept, reply in pairs}


def _up(length: int, step: int = 16) -> int:
    """The next multiple."""
    return -(-length // step) * step
