"""A tiny Qwen3-VL with a tokenizer, read from a folder that transformers wrote, and a VisMem on it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from typing import Any

import jaxmem
from jaxmem.data.batching import Buckets
from jaxmem.memory import vismem
from jaxmem.model import Spec
from tests.helpers import write_tokenizer
from tests.memory import vismem_world as v
from tests.tiny import write_qwen3_vl

KNOWN = 500
"""Tokens of the tokenizer: fewer than the 512 rows of the backbone's table, as published."""
SMALL = {"short": 2, "long": 4, "queries": 3, "builder_heads": 4, "rank": 3, "text_cap": 12, "builder_length": 128}
BUCKETS = Buckets(tokens=(128,), patches=(128,))
MEDIA = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@functools.cache
def pair(tied: bool = False) -> tuple[Any, Any]:
    """The model without a memory, and the torch model that it was read from."""
    with tempfile.TemporaryDirectory() as name:
        ids = write_tokenizer(name, vocab_size=KNOWN)
        media = {key: ids[token] for key, token in MEDIA.items()}
        shape = {"layers": 2, "vision_depth": 1, "vision_deepstack_visual_indexes": [0]}
        theirs = write_qwen3_vl(name, seed=5, tied=tied, **shape, **media)
        return jaxmem.load(name, min_pixels=32 * 32), theirs


def with_vismem(model: Any, eagerness: float = 1.0, **settings: Any) -> Any:
    """The model with a VisMem of random weights."""
    config = vismem.create(model.spec.backbone, vocab=KNOWN, **(SMALL | settings))
    memory = v.memory_of(config, eagerness=eagerness)
    return dataclasses.replace(model, spec=Spec(model.spec.backbone, (config,)), memory=memory)
