"""Group-relative advantages against loops over Python floats; `test_policy_trl.py` compares them with TRL's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from jaxmem.errors import ConfigError
from jaxmem.training.advantages import AdvantageConfig, advantages

NAN = float("nan")
WEIGHTS = np.array([1.0, 0.5, 2.0])
RULES = [
    AdvantageConfig(),
    AdvantageConfig("batch"),
    AdvantageConfig("none"),
    AdvantageConfig("group", "normalize_then_sum"),
    AdvantageConfig("group", eps=1e-6, ddof=0),
    AdvantageConfig("batch", ddof=0),
    AdvantageConfig("group", "normalize_then_sum", eps=0.01, ddof=0),
]


def case(seed: int) -> np.ndarray:
    """[6, 4, 3]: a group without signal, functions that do not apply, a completion and a group nothing scores."""
    found = np.random.default_rng(seed).choice([0.0, 0.25, 0.5, 1.0], (6, 4, 3))
    found[1] = [0.5, 0.0, 1.0]
    found[0, :, 1] = found[2, 1, 2] = found[3, 0, 0] = NAN
    found[4, 3] = found[5] = NAN
    return found


# The oracle


def moments(values: list[float], ddof: int) -> tuple[float, float]:
    """Mean and standard deviation of what is there; a lone value has no spread."""
    there = [x for x in values if not math.isnan(x)]
    if len(there) < 2:
        return (there[0] if there else NAN), 0.0
    mean = sum(there) / len(there)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in there) / (len(there) - ddof))


def added(values: list[float]) -> float:
    """The weighted sum of what applies; NaN where nothing does."""
    there = [w * x for w, x in zip(WEIGHTS, values, strict=True) if not math.isnan(x)]
    return sum(there) if there else NAN


def oracle(config: AdvantageConfig, rewards: list) -> list[list[float]]:
    """(r - mean) / (std + eps); GDPO's order is normalise per function, add, normalise over the batch."""
    if config.aggregate == "normalize_then_sum":
        mixed = []
        for group in rewards:
            spreads = [moments([completion[f] for completion in group], config.ddof) for f in range(len(WEIGHTS))]
            for completion in group:
                mixed.append(added([(x - m) / (s + config.eps) for x, (m, s) in zip(completion, spreads, strict=True)]))
        mean, std = moments(mixed, config.ddof)
        flat = [(x - mean) / (std + config.eps) for x in mixed]
    else:
        totals = [[added(completion) for completion in group] for group in rewards]
        batch = moments([x for group in totals for x in group], config.ddof)[1]
        flat = []
        for group in totals:
            mean, std = moments(group, config.ddof)
            divisor = {"group": std + config.eps, "batch": batch + config.eps, "none": 1.0}[config.scale]
            flat += [(x - mean) / divisor for x in group]
    size = len(rewards[0])
    return [[0.0 if math.isnan(x) else x for x in flat[i : i + size]] for i in range(0, len(flat), size)]


@pytest.mark.parametrize("config", RULES, ids=lambda c: f"{c.scale}-{c.aggregate}-{c.eps}-{c.ddof}")
def test_advantages_equal_their_formula(config: AdvantageConfig) -> None:
    for seed in range(3):
        rewards = case(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = advantages(config, rewards, WEIGHTS)
        np.testing.assert_allclose(found.advantage, oracle(config, rewards.tolist()), rtol=1e-9, atol=1e-12)
        assert found.dead.tolist() == [False, True, False, False, False, True]
        assert not found.advantage[found.dead].any() and found.advantage[0].any()
        assert found.advantage[4, 3] == 0 and np.isnan(found.reward[4, 3])
        want = [moments([added(completion) for completion in group], config.ddof)[1] for group in rewards.tolist()]
        np.testing.assert_allclose(found.std, want, rtol=1e-12, atol=1e-15)


def test_a_group_without_signal_is_told_exactly() -> None:
    """By equality, not by a small spread: rounding in the mean makes no signal, and a tiny signal is one."""
    rewards = np.full((3, 4, 1), 0.1)
    rewards[1, 0] += 1e-12
    rewards[2, 1:] = NAN  # one completion alone has nothing to be compared with
    found = advantages(AdvantageConfig(), rewards, np.ones(1))
    assert found.dead.tolist() == [True, False, True]
    assert not found.advantage[[0, 2]].any() and found.advantage[1].any()


@pytest.mark.parametrize("aggregate", ["sum_then_normalize", "normalize_then_sum"])
def test_signals_that_cancel(aggregate: str) -> None:
    """The sum is constant: nothing to learn from it, but each function alone has something to say."""
    rewards = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    found = advantages(AdvantageConfig(aggregate=aggregate), rewards, np.ones(2))
    assert found.dead.tolist() == [aggregate == "sum_then_normalize", False]


@pytest.mark.parametrize(
    ("rewards", "weights", "says"),
    [
        (np.zeros((2, 1, 1)), np.ones(1), "group of 1"),
        (np.zeros((2, 4)), np.ones(1), r"\[B, G, F\]"),
        (np.zeros((2, 4, 3)), np.ones(2), r"\[B, G, F\]"),
    ],
)
def test_wrong_shapes_are_refused(rewards: np.ndarray, weights: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        advantages(AdvantageConfig(), rewards, weights)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"scale": "groups"}, "advantage.scale"), ({"aggregate": "sum"}, "aggregate"), ({"ddof": 2}, "ddof")],
)
def test_unknown_settings_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AdvantageConfig(**wrong)
    with pytest.raises(ConfigError, match="eps"):
        AdvantageConfig(eps=-1.0)
