"""Knowledge items to arrays: how an item is written for CoMEM's encoder, and how its vectors stand before a prompt.

Axis letters: K items of a row, M vectors of an item, T tokens of a row, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxmem.data.example import PER_TOKEN, Example
from jaxmem.data.images import load_image
from jaxmem.data.processor import Processor
from jaxmem.errors import DataError
from jaxmem.memory.comem import CoMEMConfig


def encode_item(processor: Processor, config: CoMEMConfig, item: Any, where: str = "the item") -> Example:
    """One knowledge item as the encoder reads it (arXiv 2505.17670, appendix; the released code's format).

    A user turn with the images and a constant suffix, and an assistant turn with the text, without any system turn.

    Args:
      processor: of the backbone that reads items.
      config: says suffix, limits and image sizes.
      item: with `.images` and `.text`, or a mapping with "image" or "images" and "text".
      where: how errors call the item.

    Raises:
      DataError: neither images nor text, or an image that cannot be read.
    """
    images, text = _parts(item, where)
    pictures = [_squashed(load_image(image, f"image {i} of {where}"), config.squash) for i, image in enumerate(images)]
    if config.item_min_pixels or config.item_max_pixels:
        limits = processor.image_processor
        low, high = config.item_min_pixels or limits.min_pixels, config.item_max_pixels or limits.max_pixels
        resize = dataclasses.replace(limits, min_pixels=low, max_pixels=high)
        processor = dataclasses.replace(processor, image_processor=resize)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image} for image in pictures]},
        {"role": "assistant", "content": text[: config.text_limit]},
    ]
    start, pad, end = processor.image_placeholder
    user = f"{(start + pad + end) * len(pictures)}{config.suffix}"
    written = lambda parts: (  # noqa: E731
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{parts[1]['content']}<|im_end|>\n"
    )
    return processor.encode_as(chat, written, where)


def _parts(item: Any, where: str) -> tuple[tuple[Any, ...], str]:
    """Images and text of an item."""
    if isinstance(item, Mapping):
        one = item.get("image")
        images, text = item.get("images") or ([] if one is None else [one]), item.get("text") or ""
    else:
        images, text = item.images, item.text
    if not isinstance(text, str) or not (images or text.strip()):
        raise DataError(f"{where} has neither an image nor a text; an item needs one of them")
    return tuple(images), text


def _squashed(image: Image.Image, side: int) -> Image.Image:
    """A picture with a longer side than `side` as a square of it."""
    if not side or max(image.size) <= side:
        return image
    return image.resize((side, side), resample=Image.Resampling.LANCZOS)


def template(config: CoMEMConfig) -> dict[str, Any]:
    """What of the settings decides how an item is written: embeddings of different templates do not mix."""
    names = ("suffix", "text_limit", "squash", "item_min_pixels", "item_max_pixels")
    return {"version": 1} | {name: getattr(config, name) for name in names}


def behind_items(example: Example, items: Sequence[Example], config: CoMEMConfig, pad_token: int) -> Example:
    """A row behind the vectors of items that are encoded with it."""
    if not items:
        return example
    return dataclasses.replace(
        _behind(example, len(items), config.latents, config.order, pad_token), items=tuple(items)
    )


def behind_vectors(example: Example, vectors: np.ndarray, order: str, pad_token: int) -> Example:
    """A row behind known vectors [K, M, D], those of a memory bank."""
    if vectors.ndim != 3:
        raise DataError(f"the vectors of a row are [items, vectors, width], got {vectors.shape}")
    if not len(vectors):
        return example
    row = _behind(example, len(vectors), vectors.shape[1], order, pad_token)
    return dataclasses.replace(row, vectors=vectors.reshape(-1, vectors.shape[-1]))


def _behind(example: Example, count: int, each: int, order: str, pad_token: int) -> Example:
    """The row behind the slots of its items' vectors."""
    place = np.arange(count * each, dtype=np.int32)
    index = place if order == "rank" else place.reshape(count, each)[::-1].reshape(-1)
    rows = np.concatenate([index, np.full(len(example), -1)]).astype(np.int32)
    return dataclasses.replace(moved(example, count * each, pad_token), prefix_rows=rows)


def moved(example: Example, slots: int, pad_token: int) -> Example:
    """The row behind `slots` places for vectors, whose positions are 0, 1, 2, ... on all axes."""

    def before(name: str, leaf: np.ndarray, fill: int) -> np.ndarray:
        own = np.full((*leaf.shape[:-1], slots), pad_token if name == "tokens" else fill, leaf.dtype)
        return np.concatenate([own, leaf], axis=-1)

    held = {name: getattr(example, name) for name in PER_TOKEN if getattr(example, name) is not None}
    fields: dict[str, Any] = {name: before(name, leaf, PER_TOKEN[name]) for name, leaf in held.items()}
    place = np.broadcast_to(np.arange(slots, dtype=np.int32), (3, slots))
    return dataclasses.replace(
        example, **fields | {"positions": np.concatenate([place, example.positions + slots], axis=1)}
    )


def in_prompt(
    messages: Sequence[Mapping[str, Any]], items: Sequence[Any], where: str = "the chat", *, turns: bool = True
) -> list[Any]:
    """The chat behind its items as plain text and images (retrieval-augmented generation, the paper's baseline).

    Args:
      messages: the chat; system messages stay in front.
      items: best first.
      where: how errors call the chat.
      turns: each item is a user turn of its own, text first, as published; otherwise they open the first user turn,
        which saves what stands around a turn.
    """
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    shown = []
    for place, item in enumerate(items):
        images, text = _parts(item, f"item {place} of {where}")
        parts = [{"type": "image", "image": image} for image in images]
        shown.append([*([{"type": "text", "text": text}] if text else []), *parts])
    if turns or not rest:
        return [*system, *({"role": "user", "content": parts} for parts in shown), *rest]
    own = rest[0]["content"]
    own = [{"type": "text", "text": own}] if isinstance(own, str) else list(own)
    return [*system, {**rest[0], "content": [part for parts in [*shown, own] for part in parts]}, *rest[1:]]
