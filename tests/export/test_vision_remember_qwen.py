"""Vision Remember back in torch, on the Qwen-VL family, whose patches lie in blocks and frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmem
from jaxmem.data.batching import Buckets, collate
from tests.backbones.prompts import VIDEO, image, text, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer

torch = pytest.importorskip("torch")

from tests import tiny  # noqa: E402
from tests.export import vision_world as w  # noqa: E402

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LARGE = user(text("which"), image(308, 250, 9), text("is longer?"))  # Qwen2.5-VL's tower cuts it to several windows
ROWS = (LARGE, "several", "text", "turns")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[jaxmem.Model, Any, Path]]:
    """Ours, torch's and the folder between them."""

    @functools.cache
    def backbone(name: str) -> jaxmem.Model:
        folder = tmp_path_factory.mktemp(name)
        (write_tokenizer if name == "qwen3_vl" else write_qwen2_tokenizer)(folder)
        getattr(tiny, f"write_{name}")(folder, layers=4, seed=3)
        return jaxmem.load(folder)

    @functools.cache
    def make(name: str, **settings: Any) -> tuple[jaxmem.Model, Any, Path]:
        ours = w.remembering(backbone(name), **settings)
        folder = w.export(ours, tmp_path_factory.mktemp("exported") / "folder")
        return ours, w.load(folder), folder

    return make


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_answers_equal_ours(exported: Any, name: str, preset: str) -> None:
    ours, theirs, _ = exported(name, preset=preset)
    w.check_both(ours, theirs, w.ask(ours, ROWS))


def test_whole_frames(exported: Any) -> None:
    ours, theirs, _ = exported("qwen2_5_vl", preset="vr_v2", local=False, fusion="weighted_sum")
    asked = w.ask(ours, ROWS)
    w.close(np.asarray(ours.logits(asked.batch)), w.logits(theirs, asked), asked)


def test_memories_act_behind_deepstack(exported: Any) -> None:
    """Qwen3-VL adds features behind layers 0 and 1; what a memory of these layers reads and rewrites has them."""
    ours, theirs, _ = exported("qwen3_vl", preset="vr_v1", layers=(0, 1))
    asked = w.ask(ours, ROWS)
    w.close(np.asarray(ours.logits(asked.batch)), w.logits(theirs, asked), asked)


def test_generating_here_and_there_gives_the_same_tokens(exported: Any) -> None:
    ours, theirs, _ = exported("qwen3_vl", preset="vr_v2")
    asked = w.ask(ours, ["wide", "several"])
    assert w.greedy(theirs, asked, ours.spec.backbone.media_tokens) == w.answers(ours, asked)


def test_several_continuations_of_prompts_with_several_images(exported: Any) -> None:
    ours, theirs, _ = exported("qwen3_vl", preset="vr_v2")
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 0}
    names, alone = ["several", "text", "square"], []
    together = w.ask(ours, names)
    out = theirs.generate(**together.inputs, **beams)[:, together.inputs["input_ids"].shape[1] :]
    for one in names:
        asked = w.ask(ours, [one])
        alone += theirs.generate(**asked.inputs, **beams)[:, asked.inputs["input_ids"].shape[1] :].tolist()
    assert out.tolist() == alone


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_frames_and_their_time_line_is_no_question(exported: Any, name: str) -> None:
    ours, theirs, _ = exported(name, preset="vr_v2")
    chat = user(text("so"), image(70, 58, 1), VIDEO, text("when does it jump?"), VIDEO)
    row = ours.processor.encode(chat, add_generation_prompt=True)
    batch = collate([row], Buckets(tokens=(len(row),), patches=(len(row.patches),)))
    (down, across), frames = row.images[0], row.images[1:]
    first, grid = 4 * down * across, (len(frames) // 2, 2 * frames[0][0], 2 * frames[0][1])
    kind = np.where(row.visual_rows < 0, 0, np.where(row.tokens == ours.spec.backbone.video_token, 2, 1))
    inputs = {
        "input_ids": torch.tensor(row.tokens, dtype=torch.long)[None],
        "position_ids": torch.tensor(row.positions, dtype=torch.long)[:, None],
        "mm_token_type_ids": torch.tensor(kind, dtype=torch.int32)[None],
        "pixel_values": torch.tensor(row.patches[:first]),
        "image_grid_thw": torch.tensor([(1, 2 * down, 2 * across)]),
        "pixel_values_videos": torch.tensor(row.patches[first:]),
        "video_grid_thw": torch.tensor([grid, grid]),
    }
    asked = w.Asked([chat], batch, inputs)
    w.close(np.asarray(ours.logits(batch)), w.logits(theirs, asked), asked)
    assert theirs._question(row.tokens.tolist()) == np.flatnonzero(row.question).tolist()


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_come_back_bit_for_bit(exported: Any, name: str, preset: str) -> None:
    ours, _, folder = exported(name, preset=preset)
    back = jaxmem.load(folder)
    assert back.spec == ours.spec
    equal = lambda one, two: one.dtype == two.dtype and bool((one == two).all())  # noqa: E731
    assert jax.tree.all(jax.tree.map(equal, (back.base, back.memory), (ours.base, ours.memory)))
