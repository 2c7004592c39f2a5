"""Vision Remember back in torch, on LLaVA-style backbones: exported folders say what jaxmem says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmem
from jaxmem.checkpoints import vision_remember_names
from jaxmem.checkpoints.table import expected
from jaxmem.errors import ConfigError
from jaxmem.export import question
from jaxmem.memory import vision_remember
from tests.backbones.prompts import image, text, user

torch = pytest.importorskip("torch")

from tests.export import vision_world as w  # noqa: E402

BACKBONES = {
    "llava_next": {"kind": "next", "projector": {"name": "avgpool", "ratio": 3}},
    "llava_onevision": {
        "kind": "onevision", "projector": {"name": "pixel_shuffle", "ratio": 2}, "vision_aspect_ratio": "anyres",
        "family": "qwen3",
    },
    "uncompressed": {"kind": "onevision", "vision_aspect_ratio": "anyres"},
    "squeezed": {"kind": "next", "projector": {"name": "ldpv2", "queries": 4}, "vision_aspect_ratio": "single"},
    "without a grid": {"kind": "next", "projector": {"name": "resampler", "queries": 3, "width": 6, "heads": 2}},
}  # fmt: skip
ROWS = ("square", "several", "text", "turns")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums of levels": ("llava_next", {
        "preset": "vr_v2", "fusion": "weighted_sum", "level_norm": "joined", "positions": "embedding",
        "saliency": "bias", "gate_shape": "vector", "ffn": True, "order": "cross_then_self",
        "text_token": "attn_pool", "levels": (0, 2, -1),
    }),
    "wide windows": ("llava_next", {
        "preset": "vr_v2", "fusion": "concat", "level_norm": "joined", "positions": "none", "halo": 1,
        "text_token": "last_prompt_token", "impl": "absorbed",
    }),
    "single patches": ("uncompressed", {"preset": "vr_v2", "layers": (2, 1)}),
    "single tiles": ("squeezed", {"preset": "vr_v2", "saliency": "bias"}),
    "whole tiles": ("without a grid", {"preset": "vr_v2", "text_token": "none", "local": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], jaxmem.Model]:
    """Tiny backbones by name, made when they are asked for."""

    @functools.cache
    def make(name: str) -> jaxmem.Model:
        settings = dict(BACKBONES[name])
        return w.write(settings.pop("kind"), tmp_path_factory.mktemp("backbone"), **settings)

    return make


@pytest.fixture(scope="module")
def exported(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[jaxmem.Model, Any, Path]]:
    """Ours, torch's and the folder between them."""

    @functools.cache
    def make(name: str, **settings: Any) -> tuple[jaxmem.Model, Any, Path]:
        ours = w.remembering(backbone(name), **settings)
        folder = w.export(ours, tmp_path_factory.mktemp("exported") / "folder")
        return ours, w.load(folder), folder

    return make


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_logits_and_greedy_answers_equal_ours(exported: Any, name: str, preset: str) -> None:
    ours, theirs, _ = exported(name, preset=preset)
    w.check_both(ours, theirs, w.ask(ours, ROWS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_computes_the_same(exported: Any, variant: str) -> None:
    name, settings = VARIANTS[variant]
    ours, theirs, _ = exported(name, **settings)
    asked = w.ask(ours, ROWS)
    w.close(np.asarray(ours.logits(asked.batch)), w.logits(theirs, asked), asked)


def test_generating_here_and_there_gives_the_same_tokens(exported: Any) -> None:
    ours, theirs, _ = exported("llava_next", preset="vr_v2")
    asked = w.ask(ours, ["wide", "several"])
    assert w.greedy(theirs, asked, ours.spec.backbone.media_tokens) == w.answers(ours, asked)


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tensors_come_back_bit_for_bit(exported: Any, name: str, preset: str) -> None:
    ours, theirs, folder = exported(name, preset=preset)
    back = jaxmem.load(folder)
    assert back.spec == ours.spec
    equal = lambda one, two: one.dtype == two.dtype and bool((one == two).all())  # noqa: E731
    assert jax.tree.all(jax.tree.map(equal, (back.base, back.memory), (ours.base, ours.memory)))
    (config,) = ours.spec.memories
    shapes = expected(vision_remember_names.table(config, ours.spec.backbone), ours.memory["vision_remember"])
    held = {key: tuple(leaf.shape) for key, leaf in theirs.named_parameters() if key.startswith("memory.")}
    assert held == shapes


def test_several_continuations_of_prompts_with_several_images(exported: Any) -> None:
    """Every row of a batch gets its own images, and every one of its continuations too."""
    ours, theirs, _ = exported("llava_next", preset="vr_v2")
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 0}
    names, alone = ["several", "text", "square"], []
    together = w.ask(ours, names)
    out = theirs.generate(**together.inputs, **beams)[:, together.inputs["input_ids"].shape[1] :]
    for one in names:
        asked = w.ask(ours, [one])
        alone += theirs.generate(**asked.inputs, **beams)[:, asked.inputs["input_ids"].shape[1] :].tolist()
    assert out.tolist() == alone
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(theirs.generate(**together.inputs, **greedy, use_cache=cached) for cached in (True, False)))


def test_the_question_is_found_among_the_tokens(exported: Any) -> None:
    ours, theirs, _ = exported("llava_next", preset="vr_v2")
    odd = user(text("  first\n\nand"), image(56, 84, 1), text("what does <|im_end|> mean,\nuser?  "))
    system = [{"role": "system", "content": "You see everything. user"}, *odd]
    asked = w.ask(ours, [*ROWS, odd, system])
    marked = np.asarray(asked.batch.question)
    for ids, row in zip(asked.inputs["input_ids"].tolist(), marked, strict=True):
        assert theirs._question(ids) == np.flatnonzero(row).tolist()
    given = w.logits(theirs, asked, question_mask=torch.tensor(marked))
    np.testing.assert_array_equal(given, w.logits(theirs, asked))
    other = w.logits(theirs, asked, question_mask=torch.tensor(np.roll(marked, -1, axis=1)))
    assert np.abs(other - given)[asked.valid].max() > 0.01
    with pytest.raises(ValueError, match="row 0 of the batch has an image and no question"):
        theirs(**asked.inputs, question_mask=torch.zeros(marked.shape, dtype=torch.bool))


def test_a_copied_and_a_saved_model_remember_the_same(exported: Any, tmp_path: Path) -> None:
    ours, theirs, _ = exported("llava_onevision", preset="vr_v2")
    asked = w.ask(ours, ["several", "square"])
    wanted, copied = w.logits(theirs, asked), copy.deepcopy(theirs)
    theirs.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(w.logits(w.load(tmp_path / "saved"), asked), wanted)
    with torch.no_grad():
        for block in copied.memory.blocks:
            block.cross.gate.zero_()
            block.bidirectional.gate.zero_()
    theirs.use_memory = False
    np.testing.assert_allclose(w.logits(copied, asked), w.logits(theirs, asked), atol=1e-6, rtol=0)
    theirs.use_memory = True
    np.testing.assert_array_equal(w.logits(theirs, asked), wanted)


def test_half_precision_stays_near(exported: Any) -> None:
    ours, theirs, folder = exported("llava_next", preset="vr_v2")
    asked = w.ask(ours, ["several", "square"])
    half = w.load(folder, dtype=torch.bfloat16)
    assert {leaf.dtype for leaf in half.parameters()} == {torch.bfloat16}
    assert np.abs(w.logits(half, asked) - w.logits(theirs, asked))[asked.valid].mean() < 0.05
    assert len(half.generate(**asked.inputs, max_new_tokens=2, pad_token_id=0)) == 2


def test_what_cannot_be_done_is_said(exported: Any) -> None:
    ours, theirs, _ = exported("llava_onevision", preset="vr_v2")
    asked = w.ask(ours, ["several"])
    others = {key: value for key, value in asked.inputs.items() if key != "input_ids"}
    with pytest.raises(ValueError, match="give them instead of inputs_embeds"):
        theirs(inputs_embeds=theirs.get_input_embeddings()(asked.inputs["input_ids"]), **others)
    if "mm_encoder_outputs" in inspect.signature(theirs.forward).parameters:
        theirs.use_memory = False
        encoded = theirs.model.get_image_features(**{key: value for key, value in others.items() if "mask" not in key})
        theirs.use_memory = True
        del encoded.levels
        with pytest.raises(ValueError, match="reads a prompt whole"):
            theirs(input_ids=asked.inputs["input_ids"], mm_encoder_outputs={"image": encoded})
    frames = torch.zeros(1, 2, 3, 30, 30)
    ids = torch.full((1, 3), ours.spec.backbone.video_token)
    with pytest.raises(ValueError, match="give their frames as images"):
        theirs(input_ids=ids, pixel_values_videos=frames)
    theirs(input_ids=asked.inputs["input_ids"][:, -4:])  # text alone needs no question


def test_marks_of_templates(backbone: Any) -> None:
    processor = backbone("llava_next").processor
    with_template = lambda source: question.marks(dataclasses.replace(processor, chat_template=source))  # noqa: E731
    with pytest.raises(ConfigError, match="sets no marks around the words of a user"):
        with_template("{% for m in messages %}{{ m.content }} {% endfor %}")
    turn = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{% endif %}"
    marks = with_template("{% for m in messages %}" + turn + "{% endfor %}")
    decode = processor.tokenizer.decode
    assert (decode(marks["start"]), decode(marks["end"])) == ("[INST]", "[/INST]")
    assert marks["blank"] and all(not decode([token]).strip() for token in marks["blank"])


def test_config_json_tells_the_settings(exported: Any) -> None:
    ours, _, folder = exported("llava_next", preset="vr_v2")
    about = json.loads((folder / "config.json").read_text())["jaxmem"]
    assert about["tiles"]["grid"] == 2 and about["memory"]["cells"] == {"side": 4, "ratio": 3, "first": 1}
    stored = {key: value for key, value in about["memory"].items() if key not in ("cells", "name")}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    assert vision_remember.create(ours.spec.backbone, **settings) == ours.spec.memories[0]
