"""Qwen3-VL against transformers' torch implementation: logits and greedy answers on structured prompts, in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jaxmem
from jaxmem.data.batching import Buckets, collate
from tests.backbones.prompts import PROMPTS, torch_inputs
from tests.helpers import write_tokenizer
from tests.tiny import write_qwen3_vl

ODD = {  # query width 6 x 16 differs from 80; 5 layers; other taps; odd MLP widths
    "hidden_size": 80,
    "intermediate_size": 101,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "layers": 5,
    "vision_depth": 5,
    "vision_hidden_size": 48,
    "vision_intermediate_size": 57,
    "vision_num_heads": 3,
    "vision_num_position_embeddings": 49,
    "vision_deepstack_visual_indexes": [1, 2, 4],
    "mrope_section": (3, 3, 2),
    "tied": True,
}
BUCKETS = Buckets(tokens=(160, 1280), patches=(128,))
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both libraries."""

    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=["untied", "odd_and_tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder)
    theirs = write_qwen3_vl(folder, seed=3, **(ODD if request.param == "odd_and_tied" else {"layers": 3}))
    return Pair(jaxmem.load(folder, min_pixels=32 * 32), theirs)


def encode(pair: Pair, name: str) -> Any:
    return pair.ours.processor.encode(PROMPTS[name], add_generation_prompt=True)


def torch_logits(pair: Pair, name: str) -> np.ndarray:
    with torch.no_grad():
        return pair.theirs(**torch_inputs(name, encode(pair, name))).logits[0].numpy()


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_transformers(pair: Pair, name: str) -> None:
    example = encode(pair, name)
    ours = np.asarray(pair.ours.logits(collate([example], BUCKETS)))[0, : len(example)]
    theirs = torch_logits(pair, name)
    assert np.abs(theirs).max() > 1  # random weights that say something
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    if name == "long":
        assert len(example) > 1000


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_of_unequal_rows_equals_transformers(pair: Pair, padding: str) -> None:
    names = ["text", "three_interleaved", "video", "turns"]
    examples = [encode(pair, name) for name in names]
    assert len({len(example) for example in examples}) == len(names)
    batch = collate(examples, BUCKETS, pad_token=pair.ours.processor.pad_token, padding=padding)
    logits = np.asarray(pair.ours.logits(batch))
    for row, name in enumerate(names):
        valid = np.asarray(batch.segments[row]) > 0
        np.testing.assert_allclose(logits[row][valid], torch_logits(pair, name), atol=1e-4, rtol=0, err_msg=name)


def torch_greedy(pair: Pair, name: str, banned: tuple[int, ...]) -> list[int]:
    inputs = torch_inputs(name, encode(pair, name))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    out = pair.theirs.generate(**inputs, **options, eos_token_id=None, suppress_tokens=list(banned))
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_answers_equal_transformers_token_for_token(pair: Pair) -> None:
    """One padded batch against single runs of the oracle: every row, 64 tokens, media tokens suppressed in both."""
    banned = pair.ours.spec.backbone.media_tokens
    names = [name for name in PROMPTS if name != "long"]
    answers = pair.ours.generate(
        [PROMPTS[name] for name in names], max_new_tokens=NEW_TOKENS, stop_tokens=(), buckets=BUCKETS
    )
    for name, answer in zip(names, answers, strict=True):
        assert list(answer.tokens) == torch_greedy(pair, name, banned), name


def test_greedy_answer_to_a_long_prompt_equals_transformers(pair: Pair) -> None:
    banned = pair.ours.spec.backbone.media_tokens
    (answer,) = pair.ours.generate(PROMPTS["long"], max_new_tokens=NEW_TOKENS, stop_tokens=(), buckets=BUCKETS)
    assert list(answer.tokens) == torch_greedy(pair, "long", banned)
