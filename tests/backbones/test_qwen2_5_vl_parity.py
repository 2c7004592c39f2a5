"""Qwen2.5-VL against transformers' torch implementation: logits and greedy answers on structured prompts, in float32.

The images "large" and the video "large_video" have several windows, whole ones and such that the edge cuts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxmem
from tests.backbones import parity
from tests.backbones.parity import Pair
from tests.backbones.prompts import COMMON, LARGE
from tests.helpers import write_qwen2_tokenizer
from tests.tiny import write_qwen2_5_vl

ODD = {  # three query heads per key head; windows of 3 x 3 tokens, in the last block too; positions of half a second
    "hidden_size": 96,
    "intermediate_size": 101,
    "num_attention_heads": 6,
    "layers": 5,
    "vision_depth": 5,
    "vision_hidden_size": 48,
    "vision_intermediate_size": 57,
    "vision_num_heads": 3,
    "vision_window_size": 84,
    "vision_fullatt_block_indexes": [2],
    "vision_tokens_per_second": 1,
    "mrope_section": (4, 3, 1),
    "tied": True,
}
ALL = (*COMMON, *LARGE)
SECONDS = {"video": 1.0, "large_video": 1.0}


@pytest.fixture(scope="module", params=["untied", "odd_and_tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_qwen2_tokenizer(folder)
    theirs = write_qwen2_5_vl(folder, seed=3, **(ODD if request.param == "odd_and_tied" else {"layers": 3}))
    return Pair(jaxmem.load(folder), theirs, SECONDS)


def checked(pair: Pair, names: tuple[str, ...]) -> list[str]:
    """Without a video that lasts longer than it is wide: see `tests/data/test_qwen2_processor.py`."""
    return [name for name in names if name != "video" or pair.ours.spec.backbone.positions_per_second == 1]


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers(pair: Pair, name: str) -> None:
    parity.assert_equal_logits(pair, name, our_positions=name not in checked(pair, ALL))


def test_the_prompts_have_more_than_one_window(pair: Pair) -> None:
    windows, frames = {}, {}
    for name in LARGE:
        example = parity.encode(pair, name)
        windows[name], frames[name] = example.patch_windows.max(), example.patch_segments.max()
    side = pair.ours.spec.backbone.vision.window
    assert side == (4 if windows["large"] == 8 else 3) and frames == {"large": 1, "large_video": 3}
    assert windows == {"large": 8 if side == 4 else 10, "large_video": 12 if side == 4 else 18}


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_of_unequal_rows_equals_transformers(pair: Pair, padding: str) -> None:
    parity.assert_equal_batch(pair, ["text", "three_interleaved", "large_video", "large"], padding)


def test_greedy_answers_equal_transformers_token_for_token(pair: Pair) -> None:
    parity.assert_equal_answers(pair, [name for name in checked(pair, ALL) if name != "long"])


def test_greedy_answer_to_a_long_prompt_equals_transformers(pair: Pair) -> None:
    parity.assert_equal_answers(pair, ["long"])
