"""VisMem on meshes of eight devices: its stages learn, and its sampling draws, what one device does."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxmem.distributed import mesh as meshes
from jaxmem.memory import vismem
from jaxmem.model import Spec
from jaxmem.sampling import splicing
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import rollout
from jaxmem.sampling.slots import Slot
from jaxmem.training import descent, grpo, placing, trees
from jaxmem.training.policy import LossConfig
from tests.distributed import world as w
from tests.memory.vismem_world import memory_of

CONFIG = vismem.create(
    w.BACKBONE,
    vocab=w.IMAGE,
    queries=4,
    short=2,
    long=4,
    builder_heads=4,
    rank=4,
    alpha=4.0,
    text_cap=16,
    builder_length=48,
    long_targets=("q", "k", "o", "up"),
)
SPEC = Spec(w.BACKBONE, (CONFIG,))
FORMERS = ("memory/vismem", "!memory/vismem/rows")
ROWS = ("memory/vismem/rows/embed", "memory/vismem/rows/unembed/invoke")
ROW_COUNT, GROUP, NEW, MOST = 4, 4, 16, 2
INVOKES = {
    "free": InvokeConfig(max_invocations=MOST),
    "random": InvokeConfig(mode="random", anywhere=True, probability=0.3, max_invocations=MOST, rows_at_once=2),
}
STAGES = {"warm-up": (FORMERS, "warm-up"), "memory": (FORMERS, "random"), "invocation": (ROWS, "free")}
ONE = "one device"
MESHES = {
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 x sequence 4": {"fsdp": 2, "sequence": 4},
    "sequence 4 x tensor 2": {"sequence": 4, "tensor": 2},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 4 x sequence 2": {"data": 4, "sequence": 2},
}
QUICK = {
    ("data 2 x fsdp 2 x tensor 2", "invocation"),
    ("fsdp 2 x sequence 4", "random"),
    ("fsdp 2 x sequence 4", "memory"),
}
"""The others compile for long; tests/sampling/test_insertion_meshes.py samples freely on another model."""


def pairs(kinds):
    """Every mesh with every one of `kinds`; most are slow."""
    every = [(name, kind) for name in MESHES for kind in kinds]
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in every]


def mesh_of(name):
    return None if name == ONE else meshes.make_mesh(**MESHES[name])


@functools.cache
def whole():
    return {"base": w.tree()["base"], "memory": jax.device_get(memory_of(CONFIG, eagerness=0.3))}


def prompts():
    return w.batch(ROW_COUNT, seed=1)


@functools.cache
def sampled(kind, name):
    settings = SamplerConfig(max_new_tokens=NEW, temperature=1.0, stop_tokens=(3, 4), pad_token=1, invoke=INVOKES[kind])
    mesh = mesh_of(name)
    with meshes.current(mesh):
        tree = w.placed(whole(), mesh)
        rows = placing.put(prompts(), mesh)
        return rollout(SPEC, tree["base"], tree["memory"], rows, settings, jax.random.key(3), GROUP)


def warm_up_samples():
    """A reference of each prompt behind a memory, of both types."""
    lengths, kinds = np.array([[15], [9], [12], [14]], np.int32), np.zeros((ROW_COUNT, 1, NEW), np.int8)
    tokens = np.random.default_rng(5).integers(10, 150, kinds.shape).astype(np.int32)
    for row, kind in enumerate((1, 0, 0, 1)):
        end = 1 + CONFIG.sizes[kind]
        kinds[row, 0, 0], kinds[row, 0, 1:end], kinds[row, 0, end] = Slot.FORCED, Slot.MEMORY, Slot.END
        kinds[row, 0, end + 1 : lengths[row, 0]] = Slot.TEXT
        tokens[row, 0, 0], tokens[row, 0, end] = CONFIG.invoke_ids[kind], CONFIG.end_ids[kind]
    return grpo.Samples(
        prompts=prompts(),
        tokens=tokens,
        lengths=lengths,
        mask=(kinds == Slot.TEXT).astype(np.float32),
        old=None,
        advantages=np.ones((ROW_COUNT, 1), np.float32),
        spliced=splicing.locate(CONFIG, tokens, kinds, np.zeros_like(kinds), 1),
        memories=np.zeros((ROW_COUNT, 1, 1, CONFIG.longest, CONFIG.width), np.float32),
    )


def samples_of(kind):
    """What one device sampled, as every mesh learns from it."""
    if kind == "warm-up":
        return warm_up_samples()
    rolled = sampled(kind, ONE)
    return grpo.Samples(
        prompts=prompts(),
        tokens=rolled.tokens,
        lengths=rolled.lengths,
        mask=np.isin(rolled.kinds, (Slot.TEXT, Slot.INVOKE)).astype(np.float32),
        old=rolled.logprobs,
        advantages=np.linspace(-0.5, 1, ROW_COUNT * GROUP, dtype=np.float32).reshape(ROW_COUNT, GROUP),
        spliced=splicing.locate(CONFIG, rolled.tokens, rolled.kinds, rolled.permits, MOST),
        memories=rolled.memories,
    )


@functools.cache
def learnt(stage, name):
    """(loss, gradient, log-probabilities, state) of one update."""
    trainable, kind = STAGES[stage]
    samples, mesh = samples_of(kind), mesh_of(name)
    with meshes.current(mesh):
        train, frozen = trees.split(w.placed(whole(), mesh), trainable)
        score = grpo.make_score(grpo.model_forward(SPEC, train, remat="none"), temperature=1.0)
        update = grpo.make_update(score, LossConfig(), w.OPTIMIZER, 10, train, NEW)
        state = descent.init_state(w.OPTIMIZER, train, 5)
        state, sums, _, (logprobs, _) = update(state, frozen, placing.place(samples, 1, mesh))
        loss = float(sums.loss / sums.denominator)
        return loss, w._gradient(state), np.asarray(logprobs)[0], state


@pytest.mark.parametrize(("name", "kind"), pairs(INVOKES))
def test_sampled_tokens_and_memories_equal_those_of_one_device(name, kind):
    ours, known = sampled(kind, name), sampled(kind, ONE)
    for field in ("tokens", "kinds", "lengths", "permits"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(known, field), err_msg=field)
    np.testing.assert_allclose(ours.logprobs, known.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.memories, known.memories, rtol=0, atol=1e-5 * np.abs(known.memories).max())
    calls = np.isin(known.kinds, (Slot.INVOKE, Slot.FORCED)).sum(axis=-1)
    assert len(np.unique(calls)) > 1 and len(np.unique(known.lengths)) > 1  # rows differ in what they do
    assert set(CONFIG.end_ids) <= set(np.unique(known.tokens))  # memories of both types


@pytest.mark.parametrize(("name", "stage"), pairs(STAGES))
def test_updates_of_every_stage_equal_those_of_one_device(name, stage):
    ours, known = learnt(stage, name), learnt(stage, ONE)
    np.testing.assert_allclose(ours[0], known[0], rtol=1e-5)
    np.testing.assert_allclose(ours[2], known[2], rtol=0, atol=1e-5)
    most = max(np.abs(leaf).max() for leaf in jax.tree.leaves(known[1]))
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(known[1]), strict=True):
        largest = np.abs(want).max()
        assert largest > 0, path
        # What is zero but for rounding, such as the gradient of a key's bias, is compared with the rest.
        np.testing.assert_allclose(leaf, want, rtol=0, atol=max(3e-5 * largest, 1e-7 * most), err_msg=str(path))
    wanted = meshes.shardings(mesh_of(name), ours[3])
    for leaf, want in zip(jax.tree.leaves(ours[3]), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
