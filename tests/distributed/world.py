"""A small Qwen3-VL with heads for every mesh of eight devices, its batches, and a step of each kind of training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.positions import mrope_positions, patch_tables
from jaxmem.distributed import mesh as meshes
from jaxmem.memory import pvm
from jaxmem.model import Spec, init_memory
from jaxmem.sampling.generate import generate
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.training import descent, grpo, placing, sft, trees
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.policy import LossConfig

VOCAB, IMAGE, START, END = 160, 156, 158, 159
BACKBONE = BackboneConfig(
    "qwen3_vl",
    TextConfig(layers=2, width=64, mlp_width=96, heads=8, kv_heads=4, head_dim=16, vocab=VOCAB, rope_section=(4, 2, 2)),
    VisionConfig(depth=2, width=32, mlp_width=64, heads=4, out_width=64, taps=(0, 1), patch_size=4, table_side=8),
    IMAGE,
    157,
    START,
    END,
)
SPEC = Spec(BACKBONE, (pvm.create(BACKBONE, layers=(0, 1), latent=64, gate=0.3, initialiser="fan_in"),))
MESHES = {
    "1x1": {},
    "fsdp 8 x tensor 1": {"fsdp": 8},
    "data 8": {"data": 8},
    "fsdp 2 x tensor 4": {"fsdp": 2, "tensor": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 x sequence 2 x tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "sequence 4 x tensor 2": {"sequence": 4, "tensor": 2},
}
ROWS, GROUP, NEW = 8, 4, 6
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, clip_norm=0.0)
MESH = {name: None if not sizes else functools.partial(meshes.make_mesh, **sizes) for name, sizes in MESHES.items()}


@functools.cache
def tree() -> Any:
    """{"base", "memory"} with weights of lively size."""
    base = jax.jit(lambda: qwen3_vl.init(jax.random.key(0), BACKBONE))()
    base = jax.tree.map(lambda leaf: np.asarray(leaf * (2.0 if leaf.ndim > 1 else 1.0)), base)
    return {"base": base, "memory": jax.device_get(init_memory(jax.random.key(1), SPEC))}


def example(seed: int, text: int, grids: list[tuple[int, int]]) -> Example:
    """A row of several images, non-square too, and `text` words of which the last half is supervised."""
    draw, tokens, spans, visual = np.random.default_rng(seed), [1, 2], [], []
    for height, width in grids:
        cells = height * width // 4
        spans.append((len(tokens) + 1, (1, height, width)))
        visual += [(len(tokens) + 1 + cell, len(visual) + cell) for cell in range(cells)]
        tokens += [START, *[IMAGE] * cells, END]
    tokens += draw.integers(3, 150, text).tolist()
    rows = np.full(len(tokens), -1, np.int32)
    for place, row in visual:
        rows[place] = row
    tables = patch_tables([(1, *grid) for grid in grids], BACKBONE.vision.table_side, 2)
    count = sum(height * width for height, width in grids)
    return Example(
        tokens=np.array(tokens, np.int32),
        positions=mrope_positions(len(tokens), spans, 2),
        loss_mask=(np.arange(len(tokens)) >= len(tokens) - text // 2).astype(np.float32),
        visual_rows=rows,
        patches=draw.normal(size=(count, BACKBONE.vision.patch_dim)).astype(np.float32),
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
    )


def batch(rows: int, seed: int = 0) -> Batch:
    """Rows of unequal length: one, two and no images, odd sizes, padding, and a blindfold here and there."""
    shapes = [[(4, 4)], [(2, 6), (4, 2)], [], [(6, 4)]]
    examples = [example(100 * seed + row, 7 + 3 * (row % 5), shapes[row % 4]) for row in range(rows)]
    return collate(examples, Buckets((48,), (32,)), blind=np.arange(rows) % 3 == 1)


def placed(whole: Any, mesh: Any) -> Any:
    """Weights where the rules want them; on one device without a mesh."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, whole)
    return jax.device_put(whole, meshes.shardings(mesh, whole))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step leaves, as numpy arrays, and the state that it left on the devices."""

    losses: tuple[float, ...]
    grads: Any
    state: Any
    rolled: Rollout | None = None


def _gradient(state: Any) -> Any:
    """The gradient of a first step: Adam's first moment is a tenth of it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) / 0.1, state.opt_state[1].mu)


def supervised(mesh: Any, trainable: Any) -> Outcome:
    """Gradient of a batch of two microbatches, and two optimizer steps."""
    with meshes.current(mesh):
        train, frozen = trees.split(placed(tree(), mesh), trainable)
        forward = sft.model_forward(SPEC, train)
        batches = placing.place(batch(2 * ROWS), 2, mesh)
        step = sft.make_train_step(forward, OPTIMIZER, 10, train)
        state, first = step(descent.init_state(OPTIMIZER, train, 5), frozen, batches)
        grads = _gradient(state)
        state, second = step(state, frozen, batches)
        return Outcome((float(first["loss"]), float(second["loss"])), grads, state)


def reinforced(mesh: Any, trainable: Any) -> Outcome:
    """Sampled groups, and one update of GRPO on them with made-up advantages."""
    settings = SamplerConfig(max_new_tokens=NEW, temperature=1.0, stop_tokens=(3, 4, 5, 6, 7, 8, 9))
    with meshes.current(mesh):
        whole = placed(tree(), mesh)
        prompts = placing.put(batch(ROWS, seed=1), mesh)
        rolled = rollout(SPEC, whole["base"], whole["memory"], prompts, settings, jax.random.key(3), GROUP)
        train, frozen = trees.split(whole, trainable)
        score = grpo.make_score(grpo.model_forward(SPEC, train), temperature=1.0)
        used = np.arange(NEW) < rolled.lengths[..., None]
        samples = grpo.Samples(
            prompts=batch(ROWS, seed=1),
            tokens=rolled.tokens,
            lengths=rolled.lengths,
            mask=used.astype(np.float32),
            old=rolled.logprobs,
            advantages=np.linspace(-1, 1, ROWS * GROUP, dtype=np.float32).reshape(ROWS, GROUP),
        )
        samples = placing.place(samples, 1, mesh)
        update = grpo.make_update(score, LossConfig(), OPTIMIZER, 10, train, NEW)
        state, sums, *_ = update(descent.init_state(OPTIMIZER, train, 5), frozen, samples)
        return Outcome((float(sums.loss / sums.denominator),), _gradient(state), state, rolled)


def learn(spec: Spec, whole: Any, batch: Batch, trains: str, mesh: Any) -> tuple[np.ndarray, Any]:
    """Losses and gradient norms [3, 2] and the parameters after three supervised steps in two microbatches."""
    about = OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0)
    with meshes.current(mesh):
        trainable, frozen = trees.split(placed(whole, mesh), trains)
        step = sft.make_train_step(sft.model_forward(spec, trainable), about, 10, trainable, donate=False)
        state, found = descent.init_state(about, trainable, 0), []
        for _ in range(3):
            state, metrics = step(state, frozen, placing.place(batch, 2, mesh))
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return np.array(found), jax.device_get(state.trainable)


def draw(spec: Spec, whole: Any, batch: Batch, new: int, mesh: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their log-probabilities."""
    settings = SamplerConfig(max_new_tokens=new, temperature=1.0, stop_tokens=(3,), pad_token=1)
    with meshes.current(mesh):
        tree = placed(whole, mesh)
        found = generate(spec, tree["base"], tree["memory"], placing.put(batch, mesh), settings, jax.random.key(3))
        return jax.device_get((found.tokens, found.logprobs))


def assert_learnt_alike(ours: tuple[np.ndarray, Any], one: tuple[np.ndarray, Any], moved: float) -> None:
    """Two results of `learn`: losses and norms to 1e-5; parameters to `moved` on the mean of each leaf.

    Adam divides by the root of the square: where a gradient is almost nothing, rounding decides its sign.
    """
    np.testing.assert_allclose(ours[0], one[0], rtol=1e-5)
    assert one[0][0, 0] != one[0][-1, 0]
    differences = jax.tree.map(lambda a, b: float(np.mean(np.abs(a - b))), ours[1], one[1])
    assert max(jax.tree.leaves(differences)) < moved


def assert_drawn_alike(ours: tuple[np.ndarray, np.ndarray], one: tuple[np.ndarray, np.ndarray]) -> None:
    """Two results of `draw`: equal tokens, log-probabilities to 1e-5 of their size, of 1 where they are smaller."""
    np.testing.assert_array_equal(ours[0], one[0])
    np.testing.assert_allclose(ours[1], one[1], rtol=1e-5, atol=1e-5)
