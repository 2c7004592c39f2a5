"""Generation: batches equal their single runs, rows end alone, media tokens never appear, programs are few."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem import model as functions
from jaxmem.data.batching import Buckets, collate
from jaxmem.errors import DataError
from jaxmem.sampling.cli import pieces
from tests.backbones.prompts import PROMPTS, image, text, user
from tests.helpers import write_tokenizer
from tests.tiny import write_qwen3_vl

BUCKETS = Buckets(tokens=(128,), patches=(128,))
NAMES = ("text", "wide_and_tall", "three_interleaved", "turns")
CHATS = [PROMPTS[name] for name in NAMES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model with a PVM whose gates are open, so that its memory matters."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    write_qwen3_vl(folder, seed=5, layers=3)
    bare = jaxmem.load(folder, min_pixels=32 * 32)
    return bare.attach("pvm", layers=(1, 2), latent=32, gate=0.7, initialiser="fan_in")


OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_batch_equals_its_single_runs(model: Any, kind: str) -> None:
    keys = jax.random.split(jax.random.key(3), len(CHATS))
    settings = {"max_new_tokens": 24, "buckets": BUCKETS, "stop_tokens": (), **OPTIONS[kind]}
    together = model.generate(CHATS, key=keys, **settings)
    for row, chat in enumerate(CHATS):
        (alone,) = model.generate([chat], key=keys[row : row + 1], **settings)
        assert alone.tokens == together[row].tokens, NAMES[row]
        np.testing.assert_allclose(alone.logprobs, together[row].logprobs, atol=1e-4)


def test_logprobs_are_those_of_the_training_forward(model: Any) -> None:
    """What the sampler reports at its temperature equals one full forward over prompt and answer."""
    chat, temperature = PROMPTS["three_interleaved"], 0.8
    (answer,) = model.generate([chat], max_new_tokens=16, temperature=temperature, buckets=BUCKETS, stop_tokens=())
    batch = model.batch([chat], buckets=BUCKETS)
    start = int((batch.segments[0] > 0).sum())
    new = np.asarray(answer.tokens)
    tokens, segments, positions = (np.array(a) for a in (batch.tokens, batch.segments, batch.positions))
    place = slice(start, start + len(new))
    tokens[0, place], segments[0, place] = new, 1
    positions[0, :, place] = positions.max() + 1 + np.arange(len(new))
    batch = batch.replace(tokens=tokens, segments=segments, positions=positions)
    scores = jax.nn.log_softmax(model.logits(batch)[0] / temperature)
    expected = [float(scores[start - 1 + i, token]) for i, token in enumerate(new)]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)


def test_rows_end_alone_and_leave_the_others_unchanged(model: Any) -> None:
    free = model.generate(CHATS, max_new_tokens=24, buckets=BUCKETS, stop_tokens=())
    stop = free[0].tokens[3]
    ended = model.generate(CHATS, max_new_tokens=24, buckets=BUCKETS, stop_tokens=(stop,))
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(stop) + 1 if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.stopped == (stop in before.tokens)
    assert len(ended[0].tokens) <= 4


def test_media_tokens_are_never_sampled(model: Any) -> None:
    """A head that wants nothing but media tokens still gets none."""
    media = jnp.asarray(model.spec.backbone.media_tokens)
    eager = {**model.base, "head": model.base["head"].at[media].multiply(1e4)}
    wild = dataclasses.replace(model, base=eager)
    for settings in ({}, {"temperature": 1.5}):
        for answer in wild.generate(CHATS, max_new_tokens=24, buckets=BUCKETS, stop_tokens=(), **settings):
            assert not set(answer.tokens) & set(model.spec.backbone.media_tokens)


def test_streaming_ends_with_the_whole_answer(model: Any) -> None:
    parts = list(model.stream(CHATS, max_new_tokens=20, every=6, buckets=BUCKETS, stop_tokens=()))
    assert [len(part[0].tokens) for part in parts] == [1, 7, 13, 19, 20]
    whole = model.generate(CHATS, max_new_tokens=20, buckets=BUCKETS, stop_tokens=())
    assert parts[-1] == whole
    assert all(whole[0].tokens[: len(part[0].tokens)] == part[0].tokens for part in parts)


def test_terminal_pieces_hold_back_half_characters() -> None:
    growing = ["a", "ab\ufffd", "ab\ufffd\ufffd", "abé", "abé!"]
    assert list(pieces(iter(growing))) == ["a", "b", "", "é", "!", ""]


def test_a_prompt_longer_than_the_cache_is_an_error(model: Any) -> None:
    with pytest.raises(DataError, match=r"128 tokens and 24 new ones exceed the cache of 100"):
        model.generate(CHATS, max_new_tokens=24, cache_size=100, buckets=BUCKETS)


def test_any_mix_of_image_sizes_compiles_a_handful_of_programs(model: Any) -> None:
    """Thirty chats of thirty different image sizes run two programs: with one bucket each for tokens and patches."""
    sizes = [(32 * (1 + i % 5), 32 * (1 + i % 7)) for i in range(30)]
    chats = [user(text("see"), image(width, height, i), text("so?")) for i, (width, height) in enumerate(sizes)]
    buckets = Buckets(tokens=(64, 128), patches=(64, 160))

    @jax.jit
    @chex.assert_max_traces(n=3)
    def forward(base: Any, memory: Any, batch: Any) -> jax.Array:
        return functions.hidden_states(model.spec, base, memory, batch)

    shapes = set()
    for chat in chats:
        batch = collate([model.processor.encode(chat, add_generation_prompt=True)], buckets)
        shapes.add(batch.shape_key)
        forward(model.base, model.memory, batch)
    assert 1 < len(shapes) <= 3
