"""Decoders without a vision tower against transformers: logits, padded batches and greedy answers, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import jaxmem
from jaxmem.backbones import registry
from jaxmem.checkpoints import huggingface
from jaxmem.data.batching import Buckets, collate
from jaxmem.errors import ConfigError, DataError
from tests.backbones.prompts import LONG, image, text, user
from tests.llava_folder import amend, write_decoder

CHATS = {"short": user(text("what do they see?")), "long": user(text(LONG))}
CHATS["turns"] = [*user(text("how many dogs?")), {"role": "assistant", "content": "seven"}, *user(text("and now?"))]
BUCKETS = Buckets(tokens=(64, 1536), patches=(4,))
CASES = {
    "qwen2": {},
    "qwen3": {"num_attention_heads": 6, "head_dim": 12, "tied": True},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_decoder(folder, request.param, seed=5, **CASES[request.param])
    return jaxmem.load(folder), theirs, folder


def test_logits_equal_transformers(pair) -> None:
    ours, theirs, _ = pair
    rows = [ours.processor.encode(chat, add_generation_prompt=True) for chat in CHATS.values()]
    assert max(map(len, rows)) > 1000
    found = np.asarray(ours.logits(collate(rows, BUCKETS)))
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            wanted = theirs(torch.tensor(row.tokens, dtype=torch.long)[None]).logits[0].numpy()
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(logits[: len(row)], wanted, atol=1e-4, rtol=0)


def test_greedy_answers_equal_transformers_token_for_token(pair) -> None:
    ours, theirs, _ = pair
    done = ours.generate(list(CHATS.values()), max_new_tokens=32, stop_tokens=(), buckets=BUCKETS)
    for chat, answer in zip(CHATS.values(), done, strict=True):
        ids = torch.tensor(ours.processor.encode(chat, add_generation_prompt=True).tokens, dtype=torch.long)[None]
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
        out = theirs.generate(ids, **options, eos_token_id=None)
        assert list(answer.tokens) == out[0, ids.shape[1] :].tolist()


def test_weights_are_written_as_they_were_read(pair, tmp_path: Path) -> None:
    ours, _, folder = pair
    huggingface.save_backbone(tmp_path, ours.base, ours.spec.backbone)
    theirs, again = (huggingface.open_weights(path) for path in (folder, tmp_path))
    assert set(again) == set(theirs) - ({"lm_head.weight"} if ours.spec.backbone.text.tied else set())
    assert all(np.array_equal(again[name].read(), theirs[name].read()) for name in again)


def test_pictures_and_memories_that_need_them_are_refused(pair) -> None:
    ours, *_ = pair
    with pytest.raises(DataError, match="decoder alone"):
        ours.processor.encode(user(image(64, 64), text("what?")))
    with pytest.raises(ConfigError, match="vision tower"):
        ours.attach("vision_remember")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sliding_window": 16, "use_sliding_window": True}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gpt2"}, "supported"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    write_decoder(tmp_path)
    amend(tmp_path, **settings)
    with pytest.raises(ConfigError, match=words):
        registry.config_from_hf(huggingface.read_config(tmp_path))
