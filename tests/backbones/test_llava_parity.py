"""LLaVA-NeXT and LLaVA-OneVision against transformers: features, packed features, logits and greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import jaxmem
from jaxmem.backbones import llava
from jaxmem.backbones.batch import visual_at
from jaxmem.data.batching import Buckets, collate
from tests.backbones.prompts import LONG, picture, text, user
from tests.llava_folder import write_llava

SIZES = {"wide": (90, 24), "tall": (30, 100), "square": (56, 56), "tiny": (9, 11), "large": (331, 173)}
PICTURES = {name: picture(*size, seed) for seed, (name, size) in enumerate(SIZES.items())}
PROMPTS: dict[str, tuple[list[str], list[dict[str, Any]]]] = {}
for _name in SIZES:
    PROMPTS[_name] = [_name], user({"type": "image", "image": PICTURES[_name]}, text("describe the streets"))
PROMPTS["several"] = (
    ["tall", "wide", "square"],
    user(
        text("first"),
        {"type": "image", "image": PICTURES["tall"]},
        {"type": "image", "image": PICTURES["wide"]},
        text("then"),
        {"type": "image", "image": PICTURES["square"]},
        text("which is older?"),
    ),
)
PROMPTS["text"] = [], user(text("what do they see?"))
PROMPTS["long"] = ["wide"], user({"type": "image", "image": PICTURES["wide"]}, text(LONG))
BUCKETS = Buckets(tokens=(64, 256, 1536), patches=(16, 64, 144, 768))
CASES = {
    "next": {"kind": "next", "family": "qwen2", "seed": 1},
    "onevision": {"kind": "onevision", "family": "qwen2", "seed": 2, "tied": True},
    "next_qwen3": {"kind": "next", "family": "qwen3", "seed": 3, "vision_feature_layer": [-1, -2, 1],
                   "multimodal_projector_bias": False},
    "onevision_odd": {"kind": "onevision", "family": "llama", "seed": 4, "vision_feature_layer": -2,
                      "vision_aspect_ratio": "anyres_max_2"},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    settings = dict(CASES[request.param])
    theirs = write_llava(settings.pop("kind"), folder, **settings)
    reader = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return jaxmem.load(folder), theirs, reader


def encode(ours: Any, name: str) -> Any:
    return ours.processor.encode(PROMPTS[name][1], add_generation_prompt=True)


def inputs_of(pair: Any, name: str) -> dict[str, Any]:
    """Our tokens, and the pixels of transformers' own processor."""
    ours, _, reader = pair
    inputs = {"input_ids": torch.tensor(encode(ours, name).tokens, dtype=torch.long)[None]}
    names = PROMPTS[name][0]
    if names:
        pictures = [Image.fromarray(PICTURES[one]) for one in names]
        inputs |= dict(reader(images=[pictures], return_tensors="pt"))
    return inputs


def torch_logits(pair: Any, name: str) -> np.ndarray:
    with torch.no_grad():
        return pair[1](**inputs_of(pair, name)).logits[0].numpy()


@pytest.mark.parametrize("name", ["wide", "tall", "square", "tiny", "large", "several"])
def test_packed_features_equal_transformers(pair: Any, name: str) -> None:
    ours, theirs, _ = pair
    inputs = inputs_of(pair, name)
    batch = collate([encode(ours, name)], BUCKETS)
    config = ours.spec.backbone
    seen = jax.jit(lambda base, batch: visual_at(llava.see(config, base, batch).rows, batch))(ours.base, batch)
    found = np.asarray(seen)[0][np.asarray(batch.visual_rows[0]) >= 0]
    extra = {"batch_num_images": inputs["batch_num_images"]} if "batch_num_images" in inputs else {}
    with torch.no_grad():
        given = theirs.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], **extra)
    wanted = torch.cat(list(given.pooler_output)).numpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(PROMPTS))
def test_check_22_logits_equal_transformers(pair: Any, name: str) -> None:
    ours, row = pair[0], encode(pair[0], name)
    found = np.asarray(ours.logits(collate([row], BUCKETS)))[0, : len(row)]
    wanted = torch_logits(pair, name)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_of_unequal_rows_equals_transformers(pair: Any, padding: str) -> None:
    ours, names = pair[0], ["text", "several", "tall", "large"]
    batch = collate([encode(ours, name) for name in names], BUCKETS, padding=padding)
    found = np.asarray(ours.logits(batch))
    for row, name in enumerate(names):
        valid = np.asarray(batch.segments[row]) > 0
        np.testing.assert_allclose(found[row][valid], torch_logits(pair, name), atol=1e-4, rtol=0, err_msg=name)


def test_greedy_answers_equal_transformers_token_for_token(pair: Any) -> None:
    ours, theirs, _ = pair
    names = ["wide", "tall", "several", "long"]
    done = ours.generate([PROMPTS[name][1] for name in names], max_new_tokens=24, stop_tokens=(), buckets=BUCKETS)
    for name, answer in zip(names, done, strict=True):
        inputs, banned = inputs_of(pair, name), list(ours.spec.backbone.media_tokens)
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        out = theirs.generate(**inputs, **options, eos_token_id=None, suppress_tokens=banned)
        assert list(answer.tokens) == out[0, inputs["input_ids"].shape[1] :].tolist(), name
