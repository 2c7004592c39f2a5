"""The optimizer step: exact accumulation, frozen leaves, gates, faults. A tiny random Qwen3-VL with PVM."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.backbones import qwen3_vl
from jaxmem.training import descent, sft, trees
from jaxmem.training.optimizer import OptimizerConfig
from tests.training.tiny_run import SPEC, opened, tree, visual_batch

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, multipliers=(("**/gate_alpha", 5.0),))
STEPS = 10


@dataclasses.dataclass
class Setup:
    trainable: dict
    frozen: dict
    forward: object
    step: object
    gradient: object


@pytest.fixture(scope="module")
def memory_only():
    trainable, frozen = trees.split(tree(), "memory")
    forward = sft.model_forward(SPEC, trainable)
    step = sft.make_train_step(forward, CONFIG, STEPS, trainable, report=lambda t: sft.gates(SPEC, t), chunk=32)
    gradient = jax.jit(lambda t, b: sft.accumulate(forward, t, frozen, b, jax.random.key(0), 32))
    return Setup(trainable, frozen, forward, step, gradient)


def stacked(batch, accumulate):
    return jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)


def test_accumulation_equals_one_big_batch(memory_only):
    batch = visual_batch(rows=4, seed=1)
    counts = np.asarray(batch.loss_mask).sum(1)
    assert len(set(counts.tolist())) > 1
    trainable = opened(memory_only.trainable)
    results = [memory_only.gradient(trainable, stacked(batch, parts)) for parts in (1, 4)]
    (one, one_loss), (four, four_loss) = results
    weight = float(one_loss.weight)
    assert weight == float(four_loss.weight) == counts.sum()
    assert float(one_loss.nll) == pytest.approx(float(four_loss.nll), rel=1e-6)
    for (path, a), (_, b) in zip(trees.leaves(one), trees.leaves(four), strict=True):
        assert np.abs(a).max() > 0, path
        np.testing.assert_allclose(a / weight, b / weight, rtol=1e-5, atol=1e-6, err_msg=path)


def test_check_14_first_step_moves_gates_only_then_everything_has_a_gradient(memory_only):
    batches = stacked(visual_batch(rows=4, seed=2), 1)
    for path, leaf in trees.leaves(memory_only.gradient(memory_only.trainable, batches)[0]):
        assert np.any(leaf) == path.endswith("gate_alpha"), path
    state, _ = memory_only.step(descent.init_state(CONFIG, memory_only.trainable, 0), memory_only.frozen, batches)
    for path, leaf in trees.leaves(memory_only.gradient(state.trainable, batches)[0]):
        assert np.any(leaf), path


def test_check_16_only_the_memory_trains(memory_only):
    before = jax.tree.map(np.array, memory_only.frozen)
    start = jax.tree.map(np.array, memory_only.trainable)
    state = descent.init_state(CONFIG, memory_only.trainable, 0)
    losses = []
    for _ in range(4):
        state, metrics = memory_only.step(state, memory_only.frozen, stacked(visual_batch(rows=4, seed=3), 1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, memory_only.frozen))
    jax.tree.map(np.testing.assert_array_equal, start, jax.tree.map(np.array, memory_only.trainable))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert kept == 2 * trees.count(memory_only.trainable) + 1  # two moments and Adam's counter


def test_check_17_everything_but_the_visual_tower(memory_only):
    trainable, frozen = trees.split(tree(), ("**", "!base/visual"))
    trainable = opened(trainable)
    start = jax.tree.map(np.array, trainable)
    step = sft.make_train_step(sft.model_forward(SPEC, trainable), OptimizerConfig(warmup_ratio=0.0), STEPS, trainable)
    state, _ = step(descent.init_state(CONFIG, trainable, 0), frozen, stacked(visual_batch(rows=4, seed=3), 1))
    for (path, old), (_, new) in zip(trees.leaves(start), trees.leaves(state.trainable), strict=True):
        assert not path.startswith("base/visual") and np.any(old != new), path
    assert list(frozen) == ["base"] and list(frozen["base"]) == ["visual"]


def test_metrics_name_gates_and_count_supervised_tokens(memory_only):
    batch = visual_batch(rows=4, seed=4)
    state = descent.init_state(CONFIG, memory_only.trainable, 0)
    state, metrics = memory_only.step(state, memory_only.frozen, stacked(batch, 1))
    hidden = model.hidden_states(SPEC, tree()["base"], tree()["memory"], batch)
    scores = np.array(model.logits(SPEC, tree()["base"], hidden), np.float64)[:, :-1]
    wanted, mask = np.asarray(batch.tokens)[:, 1:], np.asarray(batch.loss_mask)[:, 1:] > 0
    nll = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, wanted[..., None], -1)[..., 0]
    assert float(metrics["loss"]) == pytest.approx(nll[mask].mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((scores.argmax(-1) == wanted)[mask].mean())
    assert int(metrics["tokens"]) == mask.sum()
    assert not metrics["skipped"] and float(metrics["lr"]) == pytest.approx(1e-2)
    gate = state.trainable["memory"]["pvm"]["gate_alpha"]
    assert [float(metrics[f"gate/pvm/layer_{layer}"]) for layer in (1, 2)] == gate.tolist()
    assert np.abs(gate).max() == pytest.approx(0.05, rel=1e-3)  # Adam's first step is the rate times the multiplier


@pytest.mark.parametrize("fault", ["pixel", "nothing to learn"])
def test_a_bad_batch_changes_nothing_but_the_step(memory_only, fault):
    batch = visual_batch(rows=4, seed=5)
    if fault == "pixel":
        batch = batch.replace(patches=batch.patches.at[0, 0, 0].set(jnp.nan))
    else:
        batch = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    state = descent.init_state(CONFIG, memory_only.trainable, 0)
    before = jax.tree.map(np.array, (state.trainable, state.opt_state))
    state, metrics = memory_only.step(state, memory_only.frozen, stacked(batch, 1))
    assert bool(metrics["skipped"]) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt_state))


def test_bf16_backbone_trains_float32_originals():
    base = qwen3_vl.init(jax.random.key(0), SPEC.backbone, jnp.bfloat16)
    trainable, frozen = trees.split({"base": base}, ("base/layers/ffn", "base/norm"))
    spec = dataclasses.replace(SPEC, memories=())
    forward = sft.model_forward(spec, trainable, base_dtype=jnp.bfloat16)
    config = OptimizerConfig(warmup_ratio=0.0, learning_rate=1e-5)
    state = descent.init_state(config, trainable, 0)
    step = sft.make_train_step(forward, config, STEPS, trainable)
    first = np.array(state.trainable["base"]["norm"]["scale"])
    state, metrics = step(state, frozen, stacked(visual_batch(rows=2, seed=6), 1))
    moved = np.array(state.trainable["base"]["norm"]["scale"]) - first
    assert np.isfinite(metrics["loss"]) and 0 < np.abs(moved).max() < 2e-5  # bfloat16 would swallow the step


def test_evaluation_adds_before_it_divides(memory_only):
    eval_step = sft.make_eval_step(memory_only.forward, chunk=32)
    parts = [visual_batch(rows=4, seed=7), visual_batch(rows=4, seed=8)]
    parts[1] = parts[1].replace(loss_mask=parts[1].loss_mask.at[1:].set(0))
    sums = [eval_step(memory_only.trainable, memory_only.frozen, part) for part in parts]
    ours = sft.evaluate(eval_step, memory_only.trainable, memory_only.frozen, parts)
    assert ours["tokens"] == sum(np.asarray(part.loss_mask).sum() for part in parts)
    assert ours["loss"] == pytest.approx(float(sum(s.nll for s in sums)) / ours["tokens"], rel=1e-6)
    assert ours["accuracy"] == pytest.approx(float(sum(s.correct for s in sums)) / ours["tokens"])
