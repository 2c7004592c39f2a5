"""Penalties and filters against transformers' processors; the draw against the distribution it must have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from jaxmem.errors import ConfigError
from jaxmem.sampling import logits as ours
from jaxmem.sampling.logits import SamplerConfig

SCORES = np.random.default_rng(0).normal(0, 3, (5, 97)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 97, (5, 12))


def both(mine: jax.Array, oracle: object) -> None:
    expected = oracle(torch.tensor(IDS), torch.tensor(SCORES)).numpy()  # type: ignore[operator]
    np.testing.assert_array_equal(np.isinf(mine), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(mine)[finite], expected[finite], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 97, 200])
def test_top_k(k: int) -> None:
    both(ours.keep_top_k(jnp.asarray(SCORES), k), theirs.TopKLogitsWarper(k))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(p: float) -> None:
    both(ours.keep_top_p(jnp.asarray(SCORES), p), theirs.TopPLogitsWarper(p))


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(p: float) -> None:
    both(ours.keep_min_p(jnp.asarray(SCORES), p), theirs.MinPLogitsWarper(p))


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty(penalty: float) -> None:
    seen = np.zeros(SCORES.shape, bool)
    np.put_along_axis(seen, IDS, True, axis=1)
    mine = ours.penalise(jnp.asarray(SCORES), jnp.asarray(seen), penalty)
    both(mine, theirs.RepetitionPenaltyLogitsProcessor(penalty))


def test_draws_follow_the_filtered_distribution_and_report_unfiltered_logprobs() -> None:
    settings = SamplerConfig(temperature=0.7, top_k=5, banned_tokens=(int(SCORES[0].argmax()),))
    count = 20_000
    scores = jnp.broadcast_to(jnp.asarray(SCORES[0]), (count, 97))
    tokens, logprobs = ours.draw(settings, jax.random.split(jax.random.key(0), count), scores, None)
    order = np.argsort(-SCORES[0])[1:6]  # the best is banned
    expected = np.exp(SCORES[0][order] / 0.7)
    expected /= expected.sum()
    seen = np.array([(np.asarray(tokens) == token).mean() for token in order])
    assert seen.sum() == pytest.approx(1)
    np.testing.assert_allclose(seen, expected, atol=4 * np.sqrt(0.25 / count))
    full = SCORES[0] / 0.7
    full = full - np.log(np.exp(full - full.max()).sum()) - full.max()
    np.testing.assert_allclose(logprobs, full[np.asarray(tokens)], rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_new_tokens": 0}, {"repetition_penalty": 0.0}]
)
def test_impossible_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplerConfig(**wrong)
