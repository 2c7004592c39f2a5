"""Qwen2-VL against transformers' torch implementation: logits and greedy answers on structured prompts, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxmem
from tests.backbones import parity
from tests.backbones.parity import Pair
from tests.backbones.prompts import COMMON, LARGE
from tests.helpers import write_qwen2_tokenizer
from tests.tiny import write_qwen2_vl

ODD = {  # three query heads per key head; sections of other lengths; odd MLP widths
    "hidden_size": 96,
    "intermediate_size": 101,
    "num_attention_heads": 6,
    "layers": 5,
    "vision_depth": 5,
    "vision_embed_dim": 48,
    "vision_mlp_ratio": 3,
    "vision_num_heads": 3,
    "mrope_section": (4, 3, 1),
    "tied": True,
}
ALL = (*COMMON, *LARGE)


@pytest.fixture(scope="module", params=["untied", "odd_and_tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_qwen2_tokenizer(folder)
    theirs = write_qwen2_vl(folder, seed=3, **(ODD if request.param == "odd_and_tied" else {"layers": 3}))
    return Pair(jaxmem.load(folder), theirs)


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers(pair: Pair, name: str) -> None:
    parity.assert_equal_logits(pair, name)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_of_unequal_rows_equals_transformers(pair: Pair, padding: str) -> None:
    parity.assert_equal_batch(pair, ["text", "three_interleaved", "video", "large"], padding)


def test_greedy_answers_equal_transformers_token_for_token(pair: Pair) -> None:
    parity.assert_equal_answers(pair, [name for name in ALL if name != "long"])


def test_greedy_answer_to_a_long_prompt_equals_transformers(pair: Pair) -> None:
    parity.assert_equal_answers(pair, ["long"])
