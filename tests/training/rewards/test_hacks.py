"""Detectors of reward hacking against brute force."""

import numpy as np
import pytest

from jaxmem.training.rewards.hacks import hack_metrics, loops


def brute(ids):
    """Is there a block of p <= 64 tokens that stands 4 times or more in a row, over 24 tokens or more?"""
    for period in range(1, 65):
        for start in range(len(ids)):
            end = start + period
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            if end - start >= max(4 * period, 24):
                return True
    return False


def test_loops_agree_with_brute_force():
    draw = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        period, times = draw.integers(1, 12), draw.integers(1, 9)
        block = draw.integers(0, 3, period).tolist() * times
        ids = [*draw.integers(0, 3, draw.integers(0, 9)), *block, *draw.integers(0, 3, draw.integers(0, 9))]
        seen.append(loops(ids))
        assert seen[-1] == brute(ids)
    assert 30 < sum(seen) < 270
    assert not loops([]) and not loops([1]) and loops([5] * 24) and not loops([5] * 23)


def test_metrics():
    values = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, np.nan]])
    ids = [[1] * 30, list(range(20)), [1, 2], [3]]
    found = hack_metrics(values, ("form", "answer"), ids, np.array([0.1, 0.3, 0.2, np.nan]))
    assert found["hacks/format_only"] == 0.5 and found["hacks/repetition"] == 0.25
    assert found["hacks/length_correlation"] == pytest.approx(np.corrcoef([30, 20, 2], [0.1, 0.3, 0.2])[0, 1])


def test_metrics_that_do_not_exist_are_left_out():
    ids = [[1], [1]]
    for judges in (("answer",), ("form",), ("unknown",)):
        assert hack_metrics(np.ones((2, 1)), judges, ids, np.ones(2)) == {"hacks/repetition": 0.0}
    pvm = np.array([[0.0], [0.1], [0.9], [1.0]])
    assert hack_metrics(pvm, ("both",), [[1]] * 4, pvm[:, 0])["hacks/format_only"] == 0.25
    assert hack_metrics(np.ones((0, 1)), ("both",), [], np.ones(0)) == {"hacks/repetition": 0.0}
