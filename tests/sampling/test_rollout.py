"""Groups of completions: one prompt for all, each as if it were alone, and the trainer agrees with the sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.data.batching import Buckets
from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.sampling.slots import Slot
from jaxmem.training import grpo
from tests.backbones.prompts import PROMPTS
from tests.helpers import write_tokenizer
from tests.tiny import write_qwen3_vl

BUCKETS = Buckets(tokens=(128,), patches=(128,))
CHATS = [PROMPTS[name] for name in ("text", "wide_and_tall", "three_interleaved", "turns")]
GROUP, NEW, TEMPERATURE = 3, 12, 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model with a PVM whose gates are open."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    write_qwen3_vl(folder, seed=5, layers=3)
    return jaxmem.load(folder, min_pixels=32 * 32).attach("pvm", layers=(1, 2), latent=32, gate=0.7)


@pytest.fixture(scope="module")
def prompts(model: Any) -> Any:
    """Unequal prompts with and without images; the second cannot see its images in the backbone."""
    batch = model.batch(CHATS, buckets=BUCKETS)
    return batch.replace(blind=np.array([False, True, False, False]))


def sampled(model: Any, batch: Any, keys: Any, stop: tuple[int, ...] = (), group: int = GROUP) -> Rollout:
    settings = model.sampler(max_new_tokens=NEW, temperature=TEMPERATURE, stop_tokens=stop)
    return rollout(model.spec, model.base, model.memory, batch, settings, keys, group)


@pytest.fixture(scope="module")
def rolled(model: Any, prompts: Any) -> Rollout:
    return sampled(model, prompts, jax.random.split(jax.random.key(3), len(CHATS)))


def samples_of(batch: Any, rolled: Rollout) -> grpo.Samples:
    rows = rolled.tokens.shape[:2]
    mask = (rolled.kinds == Slot.TEXT).astype(np.float32)
    return grpo.Samples(batch, rolled.tokens, rolled.lengths, mask, rolled.logprobs, np.zeros(rows, np.float32))


def scored(model: Any, samples: grpo.Samples) -> tuple[np.ndarray, np.ndarray]:
    forward = grpo.model_forward(model.spec, {"memory": model.memory})
    score = jax.jit(grpo.make_score(forward, TEMPERATURE, chunk=64))
    return tuple(np.asarray(leaf) for leaf in score({"memory": model.memory}, {"base": model.base}, samples))


def alone(model: Any, batch: Any, row: int, tokens: np.ndarray) -> np.ndarray:
    """Log-softmax [N, V] in front of every token of one completion, by one plain forward over prompt and completion."""
    start, place = int((np.asarray(batch.segments[row]) > 0).sum()), None
    one = jax.tree.map(lambda leaf: np.array(leaf[row : row + 1]), batch)
    place = slice(start, start + len(tokens))
    one.tokens[0, place], one.segments[0, place] = tokens, 1
    one.positions[0, :, place] = one.positions.max() + 1 + np.arange(len(tokens))
    return np.asarray(jax.nn.log_softmax(model.logits(one)[0, start - 1 : start - 1 + len(tokens)] / TEMPERATURE))


def test_logprobs_of_sampler_trainer_and_a_plain_forward_are_one(model: Any, prompts: Any, rolled: Rollout) -> None:
    """The on-policy ratio is 1 to 1e-5, and both equal the same completion as a row of its own."""
    logprobs, entropies = scored(model, samples_of(prompts, rolled))
    np.testing.assert_allclose(np.exp(logprobs - rolled.logprobs), 1, atol=1e-5)
    for row, member in ((0, 0), (1, 2), (2, 1), (3, 0)):
        table = alone(model, prompts, row, rolled.tokens[row, member])
        chosen = np.take_along_axis(table, rolled.tokens[row, member][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(logprobs[row, member], chosen, atol=1e-5)
        np.testing.assert_allclose(entropies[row, member], -(np.exp(table) * table).sum(-1), atol=1e-4)
    assert np.std(rolled.tokens, axis=1).any(), "members of a group differ"


def test_members_batch_mates_and_padding_do_not_matter(model: Any, prompts: Any, rolled: Rollout) -> None:
    keys = jax.random.split(jax.random.key(3), len(CHATS))
    whole, _ = scored(model, samples_of(prompts, rolled))
    left = model.batch(CHATS, buckets=BUCKETS, padding="left").replace(blind=prompts.blind)
    np.testing.assert_array_equal(sampled(model, left, keys).tokens, rolled.tokens)
    np.testing.assert_allclose(scored(model, samples_of(left, rolled))[0], whole, atol=1e-5)
    for row in range(len(CHATS)):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], prompts)
        by_itself = sampled(model, one, keys[row : row + 1], group=1 + row % 2)
        count = by_itself.tokens.shape[1]
        np.testing.assert_array_equal(by_itself.tokens[0], rolled.tokens[row, :count])
        np.testing.assert_allclose(by_itself.logprobs[0], rolled.logprobs[row, :count], atol=1e-5)
        np.testing.assert_allclose(scored(model, samples_of(one, by_itself))[0][0], whole[row, :count], atol=1e-5)


def test_completions_end_alone(model: Any, prompts: Any, rolled: Rollout) -> None:
    """Members stop at different places; behind its end a completion is empty and costs no one anything."""
    stops = (int(rolled.tokens[0, 0, 4]), int(rolled.tokens[2, 1, 2]), int(rolled.tokens[3, 2, 7]))
    cut = sampled(model, prompts, jax.random.split(jax.random.key(3), len(CHATS)), stop=stops)
    for row in range(len(CHATS)):
        for member in range(GROUP):
            free = rolled.tokens[row, member].tolist()
            ends = [at for at, token in enumerate(free) if token in stops]
            length = ends[0] + 1 if ends else NEW
            assert cut.lengths[row, member] == length
            assert cut.truncated[row, member] == (not ends)
            assert cut.tokens[row, member, :length].tolist() == free[:length]
            assert (cut.kinds[row, member] == [Slot.TEXT] * length + [Slot.EMPTY] * (NEW - length)).all()
            assert not cut.logprobs[row, member, length:].any()
    logprobs, _ = scored(model, samples_of(prompts, cut))
    np.testing.assert_allclose(logprobs, cut.logprobs, atol=1e-5)


def test_a_prompt_of_padding_has_no_completion(model: Any, prompts: Any) -> None:
    empty = prompts.replace(segments=np.array(prompts.segments) * np.array([1, 0, 1, 1])[:, None])
    found = sampled(model, empty, jax.random.key(0))
    assert found.lengths[1].tolist() == [0] * GROUP and (found.lengths[0] == NEW).all()


def test_gradient_of_a_group_is_the_sum_over_its_members_as_rows(model: Any, prompts: Any, rolled: Rollout) -> None:
    """Sharing the prompt changes no gradient: every completion as its own prompt row gives the same."""
    weights = np.random.default_rng(0).normal(size=rolled.tokens.shape).astype(np.float32)
    forward = grpo.model_forward(model.spec, {"memory": model.memory})
    score = grpo.make_score(forward, TEMPERATURE)

    def total(memory: Any, samples: grpo.Samples, weights: Any) -> Any:
        return jnp.sum(score({"memory": memory}, {"base": model.base}, samples)[0] * weights)

    gradient = jax.jit(jax.grad(total))
    rows = lambda leaf: np.repeat(np.asarray(leaf), GROUP, axis=0)  # noqa: E731
    flat = lambda leaf: leaf.reshape(-1, 1, *leaf.shape[2:])  # noqa: E731
    together = samples_of(prompts, rolled)
    apart = jax.tree.map(flat, together.replace(prompts=None)).replace(prompts=jax.tree.map(rows, prompts))
    shared = gradient(model.memory, together, weights)
    for one, other in zip(
        jax.tree.leaves(shared), jax.tree.leaves(gradient(model.memory, apart, flat(weights))), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, float(np.abs(other).max())))
