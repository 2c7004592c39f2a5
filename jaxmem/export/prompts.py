"""What an export is proven on: structured prompts, and what the model answers here.

Prompts have several images of different shapes, text before, between and behind them, and none; they are answered as
one padded batch here and one by one there. Images have sizes that processors leave as they are, so that what is
compared is the model, not two libraries' ways of resizing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxmem.api import Model
from jaxmem.data.batching import Buckets
from jaxmem.data.pixels import ImageProcessor
from jaxmem.sampling.invoking import InvokeConfig

TOKENS = 20
"""Tokens that are generated greedily."""
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


ITEMS: dict[str, tuple[int, ...]] = {"text": (), "wide": (0,), "several": (0, 1), "long": (1,)}
"""Which of `items` stand in front of each prompt, where the memory is CoMEM."""


def items(model: Model) -> list[dict[str, Any]]:
    """Knowledge items: an image with a text, and a text."""
    return [
        {"image": _fitting(model, 2, 1, 5), "text": "A street with seven houses, and a fox."},
        {"text": "The older of the two was built in 1873."},
    ]


@dataclasses.dataclass(frozen=True)
class State:
    """One way to ask all prompts.

    Attributes:
      model: what answers.
      known: are there items in front of the prompts?
      options: of the sampling, here.
      there: what torch sets on its model, and gives to `generate`: {"use_memory", "invoke_bias", "generate"}.
    """

    model: Model
    known: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    there: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def states(model: Model) -> dict[str, State]:
    """By name: "on" and "off" is the memory; "called" is a VisMem that the model cannot but call for."""
    found = {"off": State(model.without_memory(), there={"use_memory": False})}
    if model.spec.memories:
        found["on"] = State(model, known=model.spec.comem is not None, there={"use_memory": True})
    if (config := model.spec.vismem) is not None:
        eager = dataclasses.replace(config, invoke_bias=1e3)
        bounds = {"max_invocations": 2, "min_gap": 3}
        options = {"invoke": InvokeConfig(**bounds), "max_new_tokens": TOKENS + 2 * config.longest}
        there = {"use_memory": True, "invoke_bias": eager.invoke_bias, "generate": bounds}
        spec = dataclasses.replace(model.spec, memories=(eager,))
        found["called"] = State(dataclasses.replace(model, spec=spec), False, options, there)
    return found


def reference(model: Model, folder: Path) -> None:
    """Writes prompts and answers for `jaxmem.export.reload`: images as PNG files, `prompts.json`, `answers.npz`.

    Answers are those of float32 arithmetic: of every state and prompt, the ids of the prompt, logits [T, V] of all its
    tokens, and the ids of its greedy continuation.
    """
    asked, exact = chats(model), in_float32(model)
    about: dict[str, Any] = {"prompts": {}, "states": {}, "items": []}
    for name, chat in asked.items():
        shown = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
        about["prompts"][name] = {"images": _save(shown, folder, name), "items": ITEMS[name]}
    arrays: dict[str, Any] = {}
    for state, asking in states(exact).items():
        about["states"][state] = dict(asking.there)
        for name, answers in answer(asking, asked).items():
            arrays |= {f"{name}/{state}/{key}": array for key, array in answers.items()}
    if exact.spec.comem is not None:
        for number, item in enumerate(items(model)):
            images = _save([item["image"]] if "image" in item else [], folder, f"item_{number}")
            about["items"].append({"images": images, "text": item["text"]})
    backbone = exact.spec.backbone
    about |= {"banned": list(backbone.media_tokens), "image_token": backbone.image_token}
    (folder / "prompts.json").write_text(json.dumps(about), encoding="utf-8")
    np.savez(folder / "answers.npz", **arrays)


def _save(images: list[Image.Image], folder: Path, name: str) -> list[str]:
    """Writes images as files, whose names it returns."""
    files = [f"{name}_{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(folder / file)
    return files


def in_float32(model: Model) -> Model:
    """The model with all of its weights in float32."""
    wide = lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return dataclasses.replace(model, base=jax.tree.map(wide, model.base), memory=jax.tree.map(wide, model.memory))


def answer(state: State, asked: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, np.ndarray]]:
    """Answers to all prompts, read as one batch that is padded on the left.

    Returns:
      Of each: its "ids", "logits", the "tokens" of the answer, and the "limit", how many places it could take.
    """
    model, prompts = state.model, list(asked.values())
    rows = [model.processor.encode(chat, add_generation_prompt=True) for chat in prompts]
    stock = items(model) if state.known else []
    vectors = model.encode_items(stock, batch=len(stock)) if stock else np.zeros((0, 0, 0))
    known = [vectors[list(ITEMS[name])] for name in asked] if stock else None
    front = max(len(ITEMS[name]) for name in asked) * vectors.shape[1]
    longest = lambda count: (_up(max(map(count, rows))),)  # noqa: E731
    buckets = Buckets(tokens=(_up(front + max(map(len, rows))),), patches=longest(lambda row: max(1, len(row.patches))))
    batch = model.batch(prompts, buckets=buckets, padding="left", items=known)
    own = np.asarray(batch.segments) > 0
    if batch.prefix_rows is not None:
        own &= np.asarray(batch.prefix_rows) < 0
    columns = None if model.spec.vismem is None else model.spec.vismem.vocab
    logits = np.asarray(model.logits(batch))[..., :columns]
    options = {"max_new_tokens": TOKENS, "stop_tokens": (), **state.options}
    limit = np.array(options["max_new_tokens"])
    replies = model.generate(prompts, buckets=buckets, items=known, **options)
    return {
        name: {"ids": row.tokens, "logits": scores[kept], "tokens": np.array(reply.tokens), "limit": limit}
        for name, row, scores, kept, reply in zip(asked, rows, logits, own, replies, strict=True)
    }


def _up(length: int, step: int = 16) -> int:
    """The next multiple."""
    return -(-length // step) * step
