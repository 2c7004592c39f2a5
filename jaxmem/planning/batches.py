"""Batches without arrays: the shapes of prompts and of the knowledge items that belong to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.llava_config import TileVision
from jaxmem.data.batching import Buckets
from jaxmem.training.settings import TrainConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths of the rows of a batch.

    Attributes:
      tokens: T of a row (of a prompt, in GRPO).
      patches: P of a row.
      items: knowledge items that are encoded with a row: their number, T and P.
      query: T and P of what an encoder beside the model reads of a row's prompt; without one (0, 0).
      question: rows mark the tokens of their question.
    """

    tokens: int
    patches: int
    items: tuple[int, int, int] = (0, 0, 0)
    query: tuple[int, int] = (0, 0)
    question: bool = False

    @classmethod
    def longest(cls, config: TrainConfig) -> Shape:
        """The longest buckets of the training data."""
        return cls(config.data.buckets.tokens[-1], config.data.buckets.patches[-1])


def item_lengths(buckets: Buckets) -> tuple[int, int, int]:
    """Number, T and P of the most and longest items of a row."""
    return buckets.items[-1], buckets.item_tokens[-1], buckets.item_patches[-1]


def abstract(
    leading: tuple[int, ...], shape: Shape, backbone: BackboneConfig, reader: BackboneConfig | None = None
) -> Batch:
    """A batch of ShapeDtypeStructs [*leading, ...], rows last of the leading axes; `reader` is what reads items and
    queries, the backbone itself when None."""
    t, p = shape.tokens, -(-shape.patches // backbone.patch_unit) * backbone.patch_unit
    p = 0 if backbone.vision is None else p
    ints: dict[str, Any] = {"tokens": (t,), "positions": (3, t), "segments": (t,), "visual_rows": (t,)}
    ints |= {"patch_segments": (p,), "patch_coords": (p, 2), "patch_table": (p, 4)}
    ints |= {"patch_windows": (p,)} if backbone.vision is not None and backbone.vision.window else {}
    ints |= {"patch_images": (p,)} if isinstance(backbone.vision, TileVision) else {}
    floats = {"loss_mask": (t,), "patches": (p, backbone.patch_dim), "patch_weights": (p, 4)}
    count, item_tokens, item_patches = shape.items
    ints |= ({"prefix_rows": (t,)} if count else {}) | ({"query_rows": (t,)} if shape.query[0] else {})
    fields: dict[str, Any] = {name: jax.ShapeDtypeStruct((*leading, *size), jnp.int32) for name, size in ints.items()}
    fields |= {name: jax.ShapeDtypeStruct((*leading, *size), jnp.float32) for name, size in floats.items()}
    if shape.question:
        fields["question"] = jax.ShapeDtypeStruct((*leading, t), jnp.bool_)
    if count:
        fields["items"] = abstract((*leading, count), Shape(item_tokens, item_patches), reader or backbone)
    if shape.query[0]:
        fields["query"] = abstract(leading, Shape(*shape.query), reader or backbone)
    return Batch(blind=jax.ShapeDtypeStruct(leading, jnp.bool_), **fields)
