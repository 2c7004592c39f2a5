"""Check 30: attention on vision tokens by layer, against a plain computation, for several compressions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

import jaxmem
from jaxmem.analysis.forgetting import measure
from tests.backbones.prompts import image, text, user
from tests.llava_folder import write_llava
from tests.memory import vision_world

CHATS = [
    [*user(image(70, 30, 1), text("what do they see?")), {"role": "assistant", "content": "seven dogs"}],
    [*user(text("first"), image(30, 64, 2), text("and?")), {"role": "assistant", "content": "a fox and a picture"}],
    [*user(image(56, 56, 3), text("how many?")), {"role": "assistant", "content": "one"}],
]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_check_30_sums_are_one_and_density_is_mass_per_token(ratio: int) -> None:
    model = vision_world.llava("avgpool", ratio=ratio) if ratio > 1 else vision_world.llava("mlp")
    found = measure(model, CHATS, batch_size=2)
    rows = [model.processor.encode(chat) for chat in CHATS]
    assert found.tokens == pytest.approx(np.mean([(row.visual_rows >= 0).sum() for row in rows]))
    np.testing.assert_allclose(found.total, 1, atol=1e-5)
    mass, density = np.array(found.mass), np.array(found.density)
    assert len(mass) == vision_world.DEPTH and (mass > 0).all() and (mass < 1).all()
    np.testing.assert_allclose(density * found.tokens, mass, rtol=1e-6)
    assert (np.array(found.mass_without_sink) >= mass - 1e-6).all()


def test_check_30_masses_equal_transformers(tmp_path) -> None:
    write_llava("next", tmp_path, seed=9)
    model = jaxmem.load(tmp_path)
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path, dtype="float32", attn_implementation="eager"
    ).eval()
    (chat,) = CHATS[:1]
    found = measure(model, [chat], batch_size=1)
    row = model.processor.encode(chat)
    from PIL import Image

    reader = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = reader(images=Image.fromarray(chat[0]["content"][0]["image"]), return_tensors="pt")
    ids = torch.tensor(row.tokens, dtype=torch.long)[None]
    with torch.no_grad():
        layers = theirs(input_ids=ids, **pixels, output_attentions=True).attentions
    places = np.flatnonzero(row.loss_mask > 0) - 1
    for layer, weights in enumerate(layers):
        mean = weights[0].mean(dim=0).numpy()[places]
        wanted = mean[:, row.visual_rows >= 0].sum(axis=1)
        np.testing.assert_allclose(found.mass[layer], wanted.mean(), atol=1e-5)
        rest = wanted / (1 - mean[:, 0])
        np.testing.assert_allclose(found.mass_without_sink[layer], rest.mean(), atol=1e-5)


def test_results_are_plain_numbers() -> None:
    found = dataclasses.asdict(measure(vision_world.llava(), CHATS[:1], batch_size=1))
    assert all(isinstance(value, float | tuple) for value in found.values())
