"""Every policy-gradient loss against the published formula (`policy_oracle.py`)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import ConfigError
from jaxmem.training.policy import LOSSES, LossConfig, PolicySums, k3, policy_loss
from tests.training.policy_oracle import CASES, MAX_LENGTH, ROWS, SETTINGS, Case, case, double, oracle, settings, slopes


def sums(config: LossConfig, c: Case) -> PolicySums:
    return policy_loss(config, c.new, c.old, c.advantages, c.mask, MAX_LENGTH, c.reference)


def ours(config: LossConfig, c: Case) -> float:
    found = sums(config, Case(*(jnp.asarray(getattr(c, field.name)) for field in dataclasses.fields(c))))
    return float(found.loss / found.denominator)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config: LossConfig, new, old, reference, advantages, mask):
    def loss(logprobs):
        found = policy_loss(config, logprobs, old, advantages, mask, MAX_LENGTH, reference)
        return found.loss / found.denominator

    return jax.grad(loss)(new)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_equals_its_formula(kind: str, name: str) -> None:
    config = settings(kind, name)
    for title, c in CASES.items():
        want = oracle(config, c)
        assert abs(want) > 1e-3, title  # a test of zeros would test nothing
        with double(True):
            assert ours(config, c) == pytest.approx(want, abs=1e-12, rel=1e-12), title
        assert ours(config, c) == pytest.approx(want, abs=1e-6), title  # float32, as in training


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_equals_central_differences_of_the_formula(kind: str, name: str) -> None:
    config = settings(kind, name)
    for title in ("ragged", "truncated", "dead groups"):
        c = CASES[title]
        want = slopes(config, c)
        with double(True):
            found = gradient(config, c.new, c.old, c.reference, c.advantages, c.mask)
        np.testing.assert_allclose(found, want, atol=2e-9, rtol=1e-6, err_msg=title)
        assert not np.any(np.asarray(found)[c.mask == 0])


@pytest.mark.parametrize("kind", LOSSES)
def test_on_policy_gradient_is_the_plain_policy_gradient(kind: str) -> None:
    """At ratio 1 nothing is clipped: each token moves by its advantage over the divisor (for GSPO too)."""
    c = CASES["on policy"]
    config = settings(kind, "plain")
    lengths = c.mask.sum(1, keepdims=True)
    rows, tokens = np.sum(lengths > 0), lengths.sum()
    divisor = {"grpo": rows * lengths, "gspo": rows * lengths, "dr_grpo": rows * MAX_LENGTH}.get(kind, tokens)
    want = -c.mask * c.advantages[:, None] / np.maximum(divisor, 1)
    with double(True):
        np.testing.assert_allclose(
            gradient(config, c.new, c.old, c.reference, c.advantages, c.mask), want, atol=1e-15, rtol=1e-12
        )


@pytest.mark.parametrize("kind", LOSSES)
def test_unequal_microbatches_add_up_to_the_whole(kind: str) -> None:
    """Sums are added and divided once. The second microbatch has no row that counts."""
    config, c = settings(kind, "all"), case(6, without=(2, 3))
    parts = (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 8))
    with double(True):
        each = [sums(config, c.rows(part)) for part in parts]
        total = jax.tree.map(lambda *leaves: sum(leaves), *each)
        whole = sums(config, c)
        assert float(total.loss / total.denominator) == pytest.approx(oracle(config, c, parts=parts), rel=1e-12)
    np.testing.assert_allclose(total[2:], whole[2:], rtol=1e-12)  # the metrics too
    if kind != "bnpo":
        np.testing.assert_allclose(total[:2], whole[:2], rtol=1e-12)
    assert float(each[1].denominator) == float(each[1].loss) == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_what_lies_outside_the_mask_has_no_effect(kind: str) -> None:
    """Not even where it is NaN or so unlikely that a ratio overflows."""
    config, c = settings(kind, "kl"), CASES["truncated"]
    away = c.mask == 0
    odd = np.resize([np.nan, -np.inf, 1e4, -1e4], c.new.shape)
    spoilt = [np.where(away, x, leaf) for x, leaf in ((odd, c.new), (odd[::-1], c.old), (-odd, c.reference))]
    spoilt = Case(*spoilt, c.advantages, c.mask)
    np.testing.assert_array_equal(sums(config, spoilt), sums(config, c))
    grads = [gradient(config, x.new, x.old, x.reference, x.advantages, x.mask) for x in (spoilt, c)]
    np.testing.assert_array_equal(*grads)


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_that_counts_gives_zeros(kind: str) -> None:
    c = case(7, without=tuple(range(ROWS)))
    assert not any(map(float, sums(settings(kind, "kl"), c)))


def test_counts_and_means_of_the_metrics() -> None:
    config, c = LossConfig(clip_low=0.1, clip_high=0.3, kl_weight=1.0), CASES["truncated"]
    low = high = tokens = 0
    kl = 0.0
    for row, at in zip(*np.nonzero(c.mask), strict=True):
        difference, advantage = c.new[row, at] - c.old[row, at], c.advantages[row]
        low += math.exp(difference) < 0.9 and advantage < 0
        high += math.exp(difference) > 1.3 and advantage > 0
        kl += math.exp(c.reference[row, at] - c.new[row, at]) - (c.reference[row, at] - c.new[row, at]) - 1
        tokens += 1
    assert low and high
    found = sums(config, c)
    assert (found.tokens, found.clipped_low, found.clipped_high) == (tokens, low, high)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-6)


def test_k3_is_unbiased_and_never_negative() -> None:
    """Its mean under the policy is the divergence (exact, by summing over a vocabulary of eleven)."""
    logits = np.random.default_rng(0).normal(size=(2, 11))
    policy, reference = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    with double(True):
        each = np.asarray(k3(policy[None], reference[None], np.ones((1, 11))))[0]
    assert each.min() >= 0
    assert (np.exp(policy) * each).sum() == pytest.approx((np.exp(policy) * (policy - reference)).sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "normaliser", "divisor"),
    [("grpo", "tokens", "dapo"), ("dapo", "sequence", "grpo"), ("dapo", "constant", "dr_grpo"), ("grpo", None, "grpo")],
)
def test_a_normaliser_can_be_chosen(kind: str, normaliser: str | None, divisor: str) -> None:
    c = CASES["ragged"]
    assert ours(LossConfig(kind, normaliser=normaliser), c) == ours(LossConfig(divisor), c)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": "dapoo"}, "dapo"),
        ({"kind": "cispo"}, "clip_high"),
        ({"kind": "cispo", "clip_high": 2.0, "dual_clip": 9.0}, "single cap"),
        ({"kind": "gspo", "normaliser": "tokens"}, "contradicts"),
        ({"normaliser": "token"}, "sequence, microbatch, constant, tokens"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"kl_weight": -1.0}, "kl_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LossConfig(**wrong)


def test_a_divergence_needs_its_reference() -> None:
    c = CASES["ragged"]
    with pytest.raises(ValueError, match="reference"):
        policy_loss(LossConfig(kl_weight=0.1), c.new, c.old, c.advantages, c.mask, MAX_LENGTH)
