"""Qwen3-VL against transformers' torch implementation: logits and greedy answers on structured prompts, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxmem
from tests.backbones import parity
from tests.backbones.parity import Pair
from tests.backbones.prompts import COMMON
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


@pytest.fixture(scope="module", params=["untied", "odd_and_tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder)
    theirs = write_qwen3_vl(folder, seed=3, **(ODD if request.param == "odd_and_tied" else {"layers": 3}))
    return Pair(jaxmem.load(folder, min_pixels=32 * 32), theirs)


@pytest.mark.parametrize("name", COMMON)
def test_logits_equal_transformers(pair: Pair, name: str) -> None:
    parity.assert_equal_logits(pair, name)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_of_unequal_rows_equals_transformers(pair: Pair, padding: str) -> None:
    parity.assert_equal_batch(pair, ["text", "three_interleaved", "video", "turns"], padding)


def test_greedy_answers_equal_transformers_token_for_token(pair: Pair) -> None:
    parity.assert_equal_answers(pair, [name for name in COMMON if name != "long"])


def test_greedy_answer_to_a_long_prompt_equals_transformers(pair: Pair) -> None:
    parity.assert_equal_answers(pair, ["long"])
