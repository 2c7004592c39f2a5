"""Memories and LoRA on Qwen2-VL and Qwen2.5-VL: nothing at first, then the same in training and in sampling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.adapters import lora
from jaxmem.data.batching import Buckets, collate
from jaxmem.model import continuation_states, hidden_states, logits
from jaxmem.training import trees
from tests.backbones.prompts import image, text, user
from tests.helpers import write_qwen2_tokenizer
from tests.tiny import write_qwen2_5_vl, write_qwen2_vl

WRITERS = {"qwen2_vl": write_qwen2_vl, "qwen2_5_vl": write_qwen2_5_vl}
BUCKETS = Buckets(tokens=(128,), patches=(384,))
PROMPTS = [user(image(364, 168, 9), text("which street?")), user(text("a"), image(56, 28, 1), image(28, 84, 2))]
NEW = 8
WINDOWED = pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)  # the decoder is the same in both


@pytest.fixture(scope="module", params=WRITERS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_qwen2_tokenizer(folder)
    WRITERS[request.param](folder, seed=5, layers=3)
    return jaxmem.load(folder)


def batch_of(model):
    rows = [model.processor.encode(prompt, add_generation_prompt=True) for prompt in PROMPTS]
    return collate(rows, BUCKETS, pad_token=model.processor.pad_token)


def states(model, base, memory):
    """[B, T, D] of real tokens, zero elsewhere."""
    batch = batch_of(model)
    found = hidden_states(model.spec, base, memory, batch)
    return jnp.where(jnp.asarray(batch.segments)[..., None] > 0, found, 0)


def opened(tree, seed):
    """Every leaf that starts at zero, drawn anew: gates and the second factors of LoRA."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        starts_at_zero = path.endswith("lora_b") or "gate" in path.rpartition("/")[2]
        return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) * 0.3 if starts_at_zero else leaf

    return trees.map_with_path(draw, tree)


@pytest.fixture(scope="module")
def grown(model):
    """PVM in two layers, and LoRA beside every biased kernel and one without a bias."""
    with_memory = model.attach("pvm", layers=(0, 2), latent=32, head_dim=16)
    return with_memory.attach_lora(rank=3, alpha=6.0, targets=["q", "k", "v", "down"])


def test_fresh_memories_leave_the_backbone_as_it_is(model, grown):
    assert grown.spec.memories[0].width == model.spec.backbone.text.width == 64
    before, after = states(model, model.base, {}), states(grown, grown.base, grown.memory)
    np.testing.assert_array_equal(before, after)
    assert set(lora.factors(grown.base)) == {f"layers/attention/{x}" for x in "qkv"} | {"layers/ffn/down"}


def test_factors_beside_a_bias_merge_into_the_kernel_alone(model, grown):
    base = opened(grown.base, 1)
    merged = lora.merge(base)
    np.testing.assert_allclose(
        states(grown, base, grown.memory), states(grown, merged, grown.memory), atol=2e-5, rtol=0
    )
    for name in "qkv":
        node, plain = merged["layers"]["attention"][name], model.base["layers"]["attention"][name]
        np.testing.assert_array_equal(node["bias"], plain["bias"])
        assert set(node) == {"kernel", "bias"} and np.abs(node["kernel"] - plain["kernel"]).max() > 0.01


@WINDOWED
def test_gradients_reach_memory_factors_and_biases(grown):
    base, memory = opened(grown.base, 1), opened(grown.memory, 2)
    loss = lambda base, memory: (states(grown, base, memory) ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(base, memory)
    attention = grads[0]["layers"]["attention"]
    assert all(np.abs(attention[x][leaf]).max() > 0 for x in "qv" for leaf in ("lora_a", "lora_b", "bias"))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[1]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]["visual"]["merger"]))


@WINDOWED
def test_sampling_and_scoring_see_what_training_sees(grown):
    """Greedy answers are the best next tokens of one pass over prompt and answer, with the same log-probabilities."""
    whole = dataclasses.replace(grown, base=opened(grown.base, 1), memory=opened(grown.memory, 2))
    answers = whole.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=(), buckets=BUCKETS)
    bare = grown.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=(), buckets=BUCKETS)
    tokens = np.array([answer.tokens for answer in answers])
    assert all(one.tokens != other.tokens for one, other in zip(answers, bare, strict=True))
    batch = batch_of(whole)
    lengths = np.full((len(PROMPTS), 1), NEW, np.int32)
    found = continuation_states(whole.spec, whole.base, whole.memory, batch, jnp.asarray(tokens)[:, None], lengths)
    scores = np.array(logits(whole.spec, whole.base, found))[:, 0]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    scores[..., list(whole.spec.backbone.media_tokens)] = -np.inf  # never sampled, but part of the distribution
    np.testing.assert_array_equal(scores.argmax(-1), tokens)
    for row, answer in enumerate(answers):
        np.testing.assert_allclose(logprobs[row, np.arange(NEW), tokens[row]], answer.logprobs, atol=2e-4, rtol=0)
