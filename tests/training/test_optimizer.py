"""Schedule and AdamW against the specification's numbers and torch."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxmem.training import optimizer
from jaxmem.training.optimizer import OptimizerConfig


def test_check_35_schedule_of_the_papers_run():
    steps = optimizer.steps_per_epoch(526_000, 64)
    assert steps == 8_219
    rate = optimizer.schedule(OptimizerConfig(), steps)
    curve = np.array(rate(np.arange(steps + 1)))
    assert curve.argmax() == 822
    assert curve[822] == np.float32(1e-4)
    assert curve[0] == 0 and curve[-1] == 0
    assert (np.diff(curve[:823]) > 0).all() and (np.diff(curve[822:]) < 0).all()
    assert curve.sum() == pytest.approx(1e-4 * (822 / 2 + 7397 / 2), rel=1e-3)


def test_schedule_equals_transformers():
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.AdamW([weight], lr=3e-4)
    scheduler = transformers.get_cosine_schedule_with_warmup(theirs, 7, 50)
    rate = optimizer.schedule(OptimizerConfig(learning_rate=3e-4, warmup_steps=7), 50)
    for step in range(50):
        assert float(rate(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-11)
        theirs.step()
        scheduler.step()


def test_other_schedules():
    constant = optimizer.schedule(OptimizerConfig(schedule="constant", warmup_ratio=0.0, final_fraction=0.1), 10)
    assert np.unique(constant(np.arange(11))).tolist() == [np.float32(1e-4)]
    linear = optimizer.schedule(OptimizerConfig(schedule="linear", warmup_ratio=0.0, final_fraction=0.5), 10)
    np.testing.assert_allclose(linear(np.array([0, 5, 10])), [1e-4, 7.5e-5, 5e-5], rtol=1e-6)
    with pytest.raises(ValueError, match="'cosin' is not one of cosine"):
        OptimizerConfig(schedule="cosin")


def test_updates_equal_torch_adamw_with_groups_and_clipping():
    draw = np.random.default_rng(0)
    params = {"memory": {"pvm": {"gate_alpha": draw.normal(size=3), "up": {"kernel": draw.normal(size=(4, 5))}}}}
    params = {"memory": {"pvm": _float32(params["memory"]["pvm"])}}
    config = OptimizerConfig(
        learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.1, multipliers=(("**/gate_alpha", 5.0),)
    )
    transform, rate = optimizer.transformation(config, params), optimizer.schedule(config, 6)
    gate, up = (torch.nn.Parameter(torch.tensor(np.array(x))) for x in _pair(params))
    theirs = torch.optim.AdamW(
        [{"params": [gate], "weight_decay": 0.0}, {"params": [up], "weight_decay": 0.1}], betas=(0.9, 0.999), eps=1e-8
    )
    state, ours = transform.init(params), params
    for step in range(6):
        grads = {"memory": {"pvm": {"gate_alpha": draw.normal(size=3), "up": {"kernel": draw.normal(size=(4, 5))}}}}
        grads = {"memory": {"pvm": _float32(grads["memory"]["pvm"])}}
        updates, state = transform.update(grads, state, ours)
        ours = optax.apply_updates(ours, {"memory": {"pvm": _times(updates["memory"]["pvm"], -rate(step))}})
        gate.grad, up.grad = (torch.tensor(np.array(x)) for x in _pair(grads))
        torch.nn.utils.clip_grad_norm_([gate, up], 1.0)
        theirs.param_groups[0]["lr"], theirs.param_groups[1]["lr"] = 5 * float(rate(step)), float(rate(step))
        theirs.step()
    np.testing.assert_allclose(_pair(ours)[0], gate.detach(), atol=2e-6)
    np.testing.assert_allclose(_pair(ours)[1], up.detach(), atol=2e-6)


def test_a_multiplier_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="gate_alfa"):
        optimizer.transformation(OptimizerConfig(multipliers=(("**/gate_alfa", 5.0),)), {"memory": {"g": jnp.ones(1)}})


def _float32(tree):
    return {k: _float32(v) if isinstance(v, dict) else jnp.asarray(v, jnp.float32) for k, v in tree.items()}


def _times(tree, factor):
    return {k: _times(v, factor) if isinstance(v, dict) else v * factor for k, v in tree.items()}


def _pair(tree):
    return tree["memory"]["pvm"]["gate_alpha"], tree["memory"]["pvm"]["up"]["kernel"]
