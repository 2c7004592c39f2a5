"""Tiny random backbones in Hugging Face folders with a CoMEM whose factors are far from nothing, and items for it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmem
from jaxmem.data.batching import Buckets
from tests.backbones.prompts import image, picture, text, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer
from tests.tiny import write_qwen2_5_vl, write_qwen2_vl, write_qwen3_vl

WRITERS = {
    "qwen2_vl": (write_qwen2_tokenizer, write_qwen2_vl),
    "qwen2_5_vl": (write_qwen2_tokenizer, write_qwen2_5_vl),
    "qwen3_vl": (write_tokenizer, write_qwen3_vl),
}
FAMILIES = tuple(WRITERS)
SMALL = {"latents": 3, "depth": 2, "heads": 4, "rank": 2, "dropout": 0.0}
BUCKETS = Buckets(tokens=(96, 256), patches=(96,), items=(1, 2, 3, 10, 50), item_tokens=(64,), item_patches=(32, 96))
ITEMS = [
    {"text": "the fox jumps", "image": picture(96, 64, 1)},
    {"text": "seven wizards describe rows of numbers and animals", "image": picture(32, 64, 2)},
    {"text": "", "images": [picture(64, 32, 3), picture(32, 32, 4)]},
    {"text": "people in streets and houses"},
]
QUESTIONS = [
    user(image(96, 64, 5), text("what do they see?")),
    user(text("a lazy dog, but which one of them, and when?")),
    [{"role": "system", "content": "answer"}, *user(text("first"), image(32, 64, 6), image(64, 32, 7), text("then?"))],
]


@functools.cache
def pair(family: str) -> tuple[Any, Any]:
    """The bare model, and the torch model that it was read from."""
    write_words, write = WRITERS[family]
    with tempfile.TemporaryDirectory() as folder:
        write_words(folder)
        theirs = write(folder, seed=5)
        return jaxmem.load(folder, min_pixels=28 * 28), theirs


def noisy(tree: Any, seed: int = 1) -> Any:
    """CoMEM's parameters with noise in every leaf that starts at zero, and larger maps."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
        if name.endswith("lora_b"):
            return 0.3 * noise
        if name.endswith(("bias", "scale")):
            return leaf + 0.2 * noise
        return noise / leaf.shape[-2] ** 0.5 if name.endswith("kernel") else leaf

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def model(family: str = "qwen3_vl", **settings: Any) -> Any:
    """A model with a CoMEM that changes everything it touches."""
    fresh = pair(family)[0].attach("comem", **(SMALL | settings))
    return dataclasses.replace(fresh, memory={"comem": noisy(fresh.memory["comem"])})


def items(count: int, seed: int = 0) -> list[Any]:
    """Some items, with repetitions when there are many."""
    rng = np.random.default_rng(seed)
    return [ITEMS[i] for i in rng.integers(len(ITEMS), size=count)]


def batch_of(model: Any, questions: Any, known: Any, **settings: Any) -> Any:
    """Prompts behind their items."""
    return model.batch(questions, items=known, buckets=BUCKETS, **settings)
