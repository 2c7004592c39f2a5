"""A tiny random Qwen3-VL with PVM, its batches and its records, for the tests of training."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.memory import pvm
from jaxmem.model import Spec, init_memory

IMAGE, START, END, VOCAB = 90, 92, 93, 96
BACKBONE = BackboneConfig(
    model_type="qwen3_vl",
    text=TextConfig(
        layers=3, width=32, mlp_width=48, heads=2, kv_heads=1, head_dim=16, vocab=VOCAB, rope_section=(4, 2, 2)
    ),
    vision=VisionConfig(depth=1, width=16, mlp_width=24, heads=2, out_width=32, taps=(0,), patch_size=4, table_side=4),
    image_token=IMAGE,
    video_token=91,
    vision_start_token=START,
    vision_end_token=END,
)
PVM = pvm.create(BACKBONE, layers=(1, 2), latent=16, initialiser="fan_in")
SPEC = Spec(BACKBONE, (PVM,))


@functools.cache
def tree() -> dict[str, Any]:
    """{"base", "memory"} with random weights of lively size."""
    base = jax.jit(lambda: qwen3_vl.init(jax.random.key(0), BACKBONE))()
    base = jax.tree.map(lambda leaf: leaf * (2.0 if leaf.ndim > 1 else 1.0), base)
    return {"base": base, "memory": jax.jit(lambda: init_memory(jax.random.key(1), SPEC))()}


def opened(trainable: Any) -> Any:
    """The same tree with every gate at 0.3, so that all of the branch matters."""
    gate = trainable["memory"]["pvm"]["gate_alpha"]
    return {**trainable, "memory": {"pvm": {**trainable["memory"]["pvm"], "gate_alpha": jnp.full_like(gate, 0.3)}}}


def example(seed: int, text: int = 3, answer: int = 4) -> Example:
    """One image of 2x2 merged rows, `text` tokens and `answer` supervised ones."""
    draw = np.random.default_rng(seed)
    said = draw.integers(0, IMAGE, text + answer)
    tokens = np.array([START, *[IMAGE] * 4, END, *said], np.int32)
    place = np.arange(len(tokens), dtype=np.int32)
    coords = np.stack(np.divmod(np.arange(16), 4), -1).astype(np.int32)
    table = np.zeros((16, 4), np.int32)
    table[:, 0] = np.arange(16)
    return Example(
        tokens=tokens,
        positions=np.stack([place] * 3),
        loss_mask=(place >= len(tokens) - answer).astype(np.float32),
        visual_rows=np.where(tokens == IMAGE, place - 1, -1).astype(np.int32),
        patches=draw.normal(size=(16, BACKBONE.vision.patch_dim)).astype(np.float32),
        patch_segments=np.ones(16, np.int32),
        patch_coords=coords,
        patch_table=table,
        patch_weights=np.eye(1, 4, dtype=np.float32).repeat(16, 0),
        images=((2, 2),),
    )


def encode(record: dict[str, int]) -> Example:
    """A record of these tests is {"seed", "answer"}; a record with "fault" cannot be encoded."""
    if "fault" in record:
        raise ValueError(record["fault"])
    return example(record["seed"], answer=record.get("answer", 4))


def assemble(examples: list[Example]) -> Batch:
    """Rows of 16 tokens or 32."""
    return collate(examples, Buckets(tokens=(16, 32), patches=(16,)))


def visual_batch(rows: int, seed: int) -> Batch:
    """Rows with unequal numbers of supervised tokens, 20 tokens wide."""
    examples = [example(100 * seed + row, text=3 + row, answer=2 + 2 * row) for row in range(rows)]
    return jax.tree.map(jnp.asarray, collate(examples, Buckets(tokens=(20,), patches=(16,))))
