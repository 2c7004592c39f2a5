"""VisMem's training numbers: advantages, the second stage's reward, the clipped loss, schedules and learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.training import optimizer
from jaxmem.training.advantages import AdvantageConfig, advantages
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.policy import LossConfig, k3, policy_loss
from jaxmem.training.vismem_rewards import penalties, stage2_reward

POPULATION = AdvantageConfig(eps=1e-12, ddof=0)
NAN = float("nan")
TEXT, PROMPT, FORCED, INVOKE, MEMORY, END = range(6)


def scores(seed=0, shape=(5, 16)):
    return np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0], shape)


def advantage(rewards, config=POPULATION):
    return advantages(config, rewards[..., None], np.ones(1)).advantage


# Advantages


def test_check_32_population_standard_deviation():
    rewards = scores()
    rewards[3] = 0.25
    found = advantage(rewards)
    moving = [0, 1, 2, 4]
    np.testing.assert_allclose(found[moving].mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(found[moving].std(1), 1, atol=1e-9)  # numpy's std is the population's
    assert (found[3] == 0).all()
    np.testing.assert_allclose(advantage(np.array([[0.0, 0.0, 0.0, 1.0]])), [[-(3**-0.5)] * 3 + [3**0.5]])


def test_check_33_a_shared_base_cancels_and_a_paired_one_does_not():
    own, shared, paired = scores(), scores(1, (5,)), scores(2)
    none, invoked = np.zeros_like(own), np.ones_like(own, bool)
    reward = lambda base: stage2_reward(own, base, none, invoked, alpha=0.0)  # noqa: E731
    np.testing.assert_allclose(advantage(reward(shared)), advantage(own), atol=1e-12)
    np.testing.assert_allclose(advantage(reward(np.repeat(shared[:, None], 16, 1))), advantage(own), atol=1e-12)
    np.testing.assert_allclose(reward(paired), own - paired)
    assert np.abs(advantage(reward(paired)) - advantage(own)).max() > 0.5


# The reward of the second stage


def test_check_34_closed_forms():
    found = penalties([[0.0, 1.0]], [[1.0, 0.0]], [[True, True]])
    assert found[0].tolist() == [[1.0, 0.0]] and found[1].tolist() == [[0.5, 0.0]]
    assert penalties([[1.0, 0.5]], [[0.0, 0.0]], [[True, True]])[1].tolist() == [[0.0, 0.25]]
    own, base, reverse = np.array([[1.0, 0.5]]), np.array([0.4]), np.array([[1.0, 0.9]])
    reward = stage2_reward(own, base, reverse, np.ones((1, 2), bool))
    np.testing.assert_allclose(reward, [[1 - 0.4, 0.5 - 0.4 - 0.3 * (0.4 + 0.25)]])


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_check_34_equals_a_loop(gate, paired):
    own, reverse, invoked = scores(3), scores(4), np.random.default_rng(5).random((5, 16)) < 0.6
    base = scores(6) if paired else scores(6, (5,))
    want = np.zeros((5, 16))
    for b in range(5):
        mean = sum(own[b]) / 16
        for g in range(16):
            p_type = max(0, reverse[b, g] - own[b, g]) if invoked[b, g] else 0
            p_neg = 0 if gate and not invoked[b, g] else max(0, mean - own[b, g])
            want[b, g] = own[b, g] - (base[b, g] if paired else base[b]) - 0.7 * (p_type + p_neg)
    np.testing.assert_allclose(stage2_reward(own, base, reverse, invoked, 0.7, gate), want, atol=1e-12)


def test_missing_scores():
    """Reverse trajectories that were not run are not read; a judge that did not apply leaves no reward."""
    own = np.array([[1.0, 0.0, NAN, 0.5], [NAN] * 4])
    reverse = np.array([[0.0, NAN, 1.0, NAN], [NAN] * 4])
    invoked = np.array([[True, False, True, True], [False] * 4])
    p_type, p_neg = penalties(own, reverse, invoked)
    np.testing.assert_array_equal(p_type, [[0, 0, NAN, NAN], [0] * 4])
    np.testing.assert_array_equal(p_neg, [[0, 0.5, NAN, 0], [NAN] * 4])
    reward = stage2_reward(own, np.zeros(2), reverse, invoked)
    np.testing.assert_allclose(reward, [[1, -0.15, NAN, NAN], [NAN] * 4])
    np.testing.assert_allclose(advantage(reward), [[1, -1, 0, 0], [0] * 4], atol=1e-9)


def test_shapes_are_checked():
    ones = np.ones((2, 4))
    with pytest.raises(ValueError, match=r"reverse \(2, 3\)"):
        penalties(ones, ones[:, 1:], ones)
    with pytest.raises(ValueError, match=r"base \(4,\) should be \[B\] or \[B, G\] = \(2, 4\)"):
        stage2_reward(ones, ones[0], ones, ones)


# The loss

RECIPE = LossConfig("grpo", clip_low=0.2, kl_weight=0.0)


@pytest.mark.parametrize(
    ("ratio", "sign", "flows"), [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True)]
)
def test_check_35_clipping(ratio, sign, flows):
    old = jnp.full((1, 3), -1.0)

    def loss(new):
        return policy_loss(RECIPE, new, old, jnp.array([2.0 * sign]), jnp.ones((1, 3)), 3).loss

    value, grad = jax.value_and_grad(loss)(old + np.log(ratio))
    clipped = np.clip(ratio, 0.8, 1.2)
    assert float(value) == pytest.approx(-min(ratio * 2 * sign, clipped * 2 * sign), rel=1e-5)
    np.testing.assert_allclose(grad, np.full((1, 3), -ratio * 2 * sign / 3 if flows else 0), rtol=1e-5)


def test_check_36_k3_is_never_negative_and_zero_only_for_equals():
    new = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    other = new + np.random.default_rng(1).choice([0.0, -0.7, 1e-2, 2.0], new.shape).astype(np.float32)
    found = np.asarray(k3(new, other, np.ones_like(new)))
    assert ((found > 0) == (new != other)).all() and (found[new == other] == 0).all()
    r = (other - new).astype(np.float64)
    np.testing.assert_allclose(found, np.exp(r) - r - 1, rtol=1e-4, atol=1e-6)


def test_check_36_only_scored_slots_count():
    """Prompt, forced invocations, memory and end slots enter neither the loss nor the divergence nor the divisors."""
    kinds = np.array(
        [[PROMPT, TEXT, INVOKE, MEMORY, MEMORY, END, TEXT, TEXT], [PROMPT, TEXT, FORCED, MEMORY, END, TEXT, 9, 9]]
    )
    mask = np.isin(kinds, (TEXT, INVOKE)).astype(np.float32)
    draw = np.random.default_rng(0)
    new, old, reference = (-draw.exponential(1, kinds.shape).astype(np.float32) for _ in range(3))
    other = [np.where(mask > 0, a, -draw.exponential(5, kinds.shape)).astype(np.float32) for a in (new, old, reference)]
    config = LossConfig("grpo", kl_weight=0.03)
    run = lambda a, b, c: policy_loss(config, a, b, jnp.array([1.0, -0.5]), mask, 8, c)  # noqa: E731
    one, two = run(new, old, reference), run(*other)
    assert jax.tree.map(float, one) == jax.tree.map(float, two)
    assert one.tokens == 6 and one.denominator == 2
    r = (reference - new).astype(np.float64)
    assert float(one.kl) == pytest.approx(((np.exp(r) - r - 1) * mask).sum(), rel=1e-5)
    want = 0.0
    for row, a in enumerate((1.0, -0.5)):
        at = mask[row] > 0
        ratio = np.exp((new - old)[row, at].astype(np.float64))
        gain = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) - 0.03 * (np.exp(r) - r - 1)[row, at]
        want -= gain.mean()
    assert float(one.loss) == pytest.approx(want, rel=1e-5)
    slope = jax.grad(lambda a: run(a, old, reference).loss)(jnp.asarray(new))
    assert (np.asarray(slope)[mask == 0] == 0).all()


# Schedules and learning rates


@pytest.mark.parametrize(("peak", "warmup", "steps"), [(5e-5, 0.2, 250), (1e-5, 0.1, 250), (5e-5, 0.2, 13)])
def test_check_41_schedules(peak, warmup, steps):
    curve = np.asarray(optimizer.schedule(OptimizerConfig(peak, warmup_ratio=warmup), steps)(np.arange(steps + 1)))
    top = int(np.ceil(round(warmup * steps, 9)))
    assert curve.argmax() == top and curve[top] == np.float32(peak)
    np.testing.assert_allclose(curve[: top + 1], peak * np.arange(top + 1) / top, rtol=1e-5)
    falling = np.arange(steps - top + 1) / (steps - top)
    np.testing.assert_allclose(curve[top:], peak * (1 + np.cos(np.pi * falling)) / 2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
def test_check_31_end_rows_move_a_tenth_of_invocation_rows(steps):
    """Equal gradients, multipliers 1 and 0.1: Adam forgets the scale of a gradient, so it is the update that scales."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)
    params = {"memory": {"vismem": {"rows": {"invoke": rows, "end": rows + 1}, "unembed": rows}}}
    multipliers = (("**/rows/invoke", 1.0), ("**/rows/end", 0.1))
    config = OptimizerConfig(1e-3, schedule="constant", warmup_ratio=0.0, multipliers=multipliers, clip_norm=0.5)
    transform, now = optimizer.transformation(config, params), params
    state = transform.init(params)
    for step in range(steps):
        grads = jnp.asarray(np.random.default_rng(10 + step).normal(size=rows.shape), jnp.float32)
        updates, state = transform.update(jax.tree.map(lambda _, g=grads: g, params), state, now)
        now = optax.apply_updates(now, jax.tree.map(lambda u: -1e-3 * u, updates))
    found = updates["memory"]["vismem"]
    np.testing.assert_allclose(found["rows"]["end"], 0.1 * found["rows"]["invoke"], rtol=1e-6)
    np.testing.assert_array_equal(found["unembed"], found["rows"]["invoke"])
    assert np.abs(found["rows"]["invoke"]).min() > 1e-3
    path = jax.tree.map(lambda a, b: np.asarray(a - b), now, params)["memory"]["vismem"]["rows"]
    np.testing.assert_allclose(path["end"], 0.1 * path["invoke"], atol=5e-7)
