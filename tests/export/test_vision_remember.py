"""Vision Remember back in torch: exported folders say what jaxmem says, on every backbone that it works on."""

from __future__ import annotations

import copy
import functools
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
from jaxmem.data.batching import Buckets, collate
from jaxmem.errors import ConfigError
from jaxmem.export import question
from jaxmem.memory import vision_remember
from tests.backbones.prompts import VIDEO, image, text, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer

torch = pytest.importorskip("torch")

from tests import tiny  # noqa: E402
from tests.export import llava_world as w  # noqa: E402

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = {
    "llava_next": {"kind": "next", "projector": {"name": "avgpool", "ratio": 3}},
    "llava_onevision": {
        "kind": "onevision", "projector": {"name": "pixel_shuffle", "ratio": 2}, "vision_aspect_ratio": "anyres",
        "family": "qwen3",
    },
    "uncompressed": {"kind": "onevision", "vision_aspect_ratio": "anyres"},
    "squeezed": {"kind": "next", "projector": {"name": "ldpv2", "queries": 4}, "vision_aspect_ratio": "single"},
    "without a grid": {"kind": "next", "projector": {"name": "resampler", "queries": 3, "width": 6, "heads": 2}},
}  # fmt: skip
LARGE = user(text("which"), image(308, 250, 9), text("is longer?"))
ROWS = {"tiled": ["square", "several", "text", "turns"], "gridded": [LARGE, "several", "text", "turns"]}
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
    "whole frames": ("qwen2_5_vl", {"preset": "vr_v2", "local": False, "fusion": "weighted_sum"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], jaxmem.Model]:
    """Tiny backbones by name, made when they are asked for."""

    @functools.cache
    def make(name: str) -> jaxmem.Model:
        folder: Path = tmp_path_factory.mktemp("backbones") / name.replace(" ", "_")
        if name in TILED:
            settings = dict(TILED[name])
            return w.write(settings.pop("kind"), folder, **settings)
        (write_tokenizer if name == "qwen3_vl" else write_qwen2_tokenizer)(folder)
        getattr(tiny, f"write_{name}")(folder, layers=4, seed=3)
        return jaxmem.load(folder)

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


def rows(name: str) -> list[Any]:
    return ROWS["gridded" if name in QWEN else "tiled"]


def close(ours: np.ndarray, theirs: np.ndarray, asked: w.Asked) -> None:
    assert np.abs(ours[asked.valid]).max() > 1
    np.testing.assert_allclose(theirs[asked.valid], ours[asked.valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", *QWEN])
def test_logits_and_greedy_answers_equal_ours(exported: Any, name: str, preset: str) -> None:
    ours, theirs, _ = exported(name, preset=preset)
    asked, banned = w.ask(ours, rows(name)), ours.spec.backbone.media_tokens
    on = np.asarray(ours.logits(asked.batch))
    close(on, w.logits(theirs, asked), asked)
    said = w.greedy(theirs, asked, banned)
    assert said == w.answers(ours, asked)
    theirs.use_memory = False
    bare = w.logits(theirs, asked)
    theirs.use_memory = True
    seen = np.asarray([bool(w.pictures(chat)) for chat in asked.chats])
    change = np.abs(on - bare).max(axis=(1, 2), where=asked.valid[..., None], initial=0)
    assert (change[seen] > 0.5).all() and (change[~seen] < 1e-4).all()


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", *QWEN])
def test_without_the_memory_it_is_the_backbone(backbone: Any, exported: Any, name: str) -> None:
    ours, (_, theirs, _) = backbone(name), exported(name, preset="vr_v1")
    asked = w.ask(ours, rows(name))
    theirs.use_memory = False
    try:
        close(np.asarray(ours.logits(asked.batch)), w.logits(theirs, asked), asked)
        assert w.greedy(theirs, asked, ours.spec.backbone.media_tokens) == w.answers(ours, asked)
    finally:
        theirs.use_memory = True


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_computes_the_same(exported: Any, variant: str) -> None:
    name, settings = VARIANTS[variant]
    ours, theirs, _ = exported(name, **settings)
    asked = w.ask(ours, rows(name))
    close(np.asarray(ours.logits(asked.batch)), w.logits(theirs, asked), asked)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_tensors_come_back_bit_for_bit(exported: Any, name: str) -> None:
    ours, theirs, folder = exported(name, preset="vr_v2")
    back = jaxmem.load(folder)
    assert back.spec == ours.spec
    same = jax.tree.map(
        lambda one, two: one.dtype == two.dtype and bool((one == two).all()), *map(_trees, (back, ours))
    )
    assert jax.tree.all(same)
    shapes = expected(
        vision_remember_names.table(ours.spec.memories[0], ours.spec.backbone), ours.memory["vision_remember"]
    )
    held = {key: tuple(leaf.shape) for key, leaf in theirs.named_parameters() if key.startswith("memory.")}
    assert held == shapes


def _trees(model: jaxmem.Model) -> Any:
    return {"base": model.base, "memory": model.memory}


def test_several_continuations_of_prompts_with_several_images(exported: Any) -> None:
    """Every row of a batch gets its own images, and every one of its continuations too."""
    for name in ("llava_next", "qwen3_vl"):
        ours, theirs, _ = exported(name, preset="vr_v2")
        beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 0}
        names, alone = ["several", "text", "square"], []
        together = w.ask(ours, names)
        out = theirs.generate(**together.inputs, **beams)[:, together.inputs["input_ids"].shape[1] :]
        for one in names:
            asked = w.ask(ours, [one])
            alone += theirs.generate(**asked.inputs, **beams)[:, asked.inputs["input_ids"].shape[1] :].tolist()
        assert out.tolist() == alone
        banned = ours.spec.backbone.media_tokens
        assert w.greedy(theirs, together, banned, use_cache=False) == w.greedy(theirs, together, banned)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_the_question_is_found_among_the_tokens(exported: Any, name: str) -> None:
    ours, theirs, _ = exported(name, preset="vr_v2")
    odd = user(text("  first\n\nand"), image(56, 84, 1), text("what does <|im_end|> mean,\nuser?  "))
    system = [{"role": "system", "content": "You see everything. user"}, *odd]
    asked = w.ask(ours, [*rows(name), odd, system])
    marked = np.asarray(asked.batch.question)
    for ids, row in zip(asked.inputs["input_ids"].tolist(), marked, strict=True):
        assert theirs._question(ids) == np.flatnonzero(row).tolist()
    given = w.logits(theirs, asked, question_mask=torch.tensor(marked))
    np.testing.assert_array_equal(given, w.logits(theirs, asked))
    other = w.logits(theirs, asked, question_mask=torch.tensor(np.roll(marked, -1, axis=1)))
    assert np.abs(other - given)[asked.valid].max() > 0.01
    unasked = {**asked.inputs, "question_mask": torch.zeros(marked.shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match="row 0 of the batch has an image and no question"):
        theirs(**unasked)


def test_videos_of_a_qwen_are_frames(exported: Any) -> None:
    ours, theirs, _ = exported("qwen3_vl", preset="vr_v2")
    chat = user(text("so"), image(70, 58, 1), VIDEO, text("when does it jump?"), VIDEO)
    row = ours.processor.encode(chat, add_generation_prompt=True)
    batch = collate([row], Buckets(tokens=(len(row),), patches=(len(row.patches),)))
    (rows_, columns), frames = row.images[0], row.images[1:]
    first = 4 * rows_ * columns
    kind = np.where(row.visual_rows < 0, 0, np.where(row.tokens == ours.spec.backbone.video_token, 2, 1))
    grid = (len(frames) // 2, 2 * frames[0][0], 2 * frames[0][1])
    inputs = {
        "input_ids": torch.tensor(row.tokens, dtype=torch.long)[None],
        "mm_token_type_ids": torch.tensor(kind, dtype=torch.int32)[None],
        "pixel_values": torch.tensor(row.patches[:first]),
        "image_grid_thw": torch.tensor([(1, 2 * rows_, 2 * columns)]),
        "pixel_values_videos": torch.tensor(row.patches[first:]),
        "video_grid_thw": torch.tensor([grid, grid]),
    }
    asked = w.Asked([chat], batch, inputs)
    close(np.asarray(ours.logits(batch)), w.logits(theirs, asked), asked)
    assert theirs._question(row.tokens.tolist()) == np.flatnonzero(row.question).tolist()


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
    asked, wanted = w.ask(ours, ["several", "square"]), None
    wanted = w.logits(theirs, asked)[asked.valid]
    half = w.load(folder, dtype=torch.bfloat16)
    found = w.logits(half, asked)[asked.valid]
    assert np.abs(found - wanted).mean() < 0.05
    assert len(half.generate(**asked.inputs, max_new_tokens=2, pad_token_id=0)) == 2


def test_what_cannot_be_done_is_said(exported: Any, backbone: Any) -> None:
    ours, theirs, _ = exported("llava_onevision", preset="vr_v2")
    asked = w.ask(ours, ["several"])
    embedded = theirs.get_input_embeddings()(asked.inputs["input_ids"])
    others = {key: value for key, value in asked.inputs.items() if key != "input_ids"}
    with pytest.raises(ValueError, match="give them instead of inputs_embeds"):
        theirs(inputs_embeds=embedded, **others)
    with pytest.raises(ValueError, match="reads a prompt whole|cannot split the raw"):
        theirs.generate(**asked.inputs, max_new_tokens=2, prefill_chunk_size=16)
    theirs(input_ids=asked.inputs["input_ids"][:, -4:])  # text alone needs no question


def test_a_template_without_marks_is_refused(backbone: Any) -> None:
    import dataclasses

    processor = backbone("llava_next").processor
    bare = dataclasses.replace(processor, chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.raises(ConfigError, match="sets no marks around the words of a user"):
        question.marks(bare)
    inst = "{% for m in messages %}{{ '[INST] ' if m.role == 'user' }}{{ m.content }}{{ ' [/INST]' if m.role == 'user' }}{% endfor %}"
    marks = question.marks(dataclasses.replace(processor, chat_template=inst))
    decode = processor.tokenizer.decode
    assert (decode(marks["start"]), decode(marks["end"])) == ("[INST]", "[/INST]")
    assert all(not decode([token]).strip() for token in marks["blank"]) and marks["blank"]


def test_config_json_tells_the_settings(exported: Any) -> None:
    ours, _, folder = exported("llava_next", preset="vr_v2")
    about = json.loads((folder / "config.json").read_text())["jaxmem"]
    stored = {**about["memory"]}
    assert stored.pop("cells") == {"side": 4, "ratio": 3, "first": 1} and stored.pop("name") == "vision_remember"
    config = vision_remember.create(ours.spec.backbone, **{
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    })  # fmt: skip
    assert config == ours.spec.memories[0]
