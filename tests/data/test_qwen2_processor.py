"""Qwen2-VL's and Qwen2.5-VL's prompts: pixels, placeholders, videos, windows and positions, transformers as oracle."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import get_vision_window_index

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.batching import Buckets, collate, widen
from jaxmem.data.loading import load_processor
from jaxmem.data.pixels import load_image_processor
from jaxmem.data.positions import mrope_positions, patch_tables
from jaxmem.data.video import time_step
from jaxmem.errors import CheckpointError
from tests.helpers import write_qwen2_tokenizer

IMAGE, VIDEO, START, END, IM_END = 500, 501, 502, 503, 505
TEXT = TextConfig(layers=2, width=64, mlp_width=96, heads=4, kv_heads=2, head_dim=16, vocab=512)
TOWER = VisionConfig(3, 32, 48, 4, 64, patch_size=14, table_side=0)
PLAIN = BackboneConfig("qwen2_vl", TEXT, TOWER, 500, 501, 502, 503, timed_video=False)
WINDOWED = dataclasses.replace(
    PLAIN, model_type="qwen2_5_vl", vision=dataclasses.replace(TOWER, window=4), positions_per_second=2.0
)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(width: int, height: int) -> dict:
    return {"type": "image", "image": noise(width, height)}


def video(width: int, height: int, frames: int, fps: float = 2.0) -> dict:
    return {"type": "video", "video": [noise(width, height, seed) for seed in range(frames)], "fps": fps}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2")
    write_qwen2_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=[PLAIN, WINDOWED], ids=["qwen2", "qwen2_5"])
def processor(request, folder):
    return load_processor(folder, request.param)


@pytest.mark.parametrize("size", [(28, 28), (100, 40), (40, 100), (5, 7), (300, 500), (1, 150), (333, 47), (252, 210)])
def test_pixels_equal_transformers(folder, size):
    picture = Image.fromarray(noise(*size))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[picture])
    ours = load_image_processor(folder, frame_budget=True)
    patches, grid = ours.image(picture)
    assert [list(grid)] == theirs["image_grid_thw"].tolist() and patches.shape[1] == 1176
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [2, 5, 40])
@pytest.mark.parametrize("size", [(64, 48), (20, 200), (1200, 700)])
def test_frames_are_sized_one_by_one(folder, tmp_path, frames, size):
    """transformers reads the limits of preprocessor_config.json where there is no file for videos."""
    ours = load_image_processor(folder, frame_budget=True)
    assert (ours.video_min_pixels, ours.video_max_pixels) == (28 * 28, 256 * 256)
    height, width = smart_resize(size[1], size[0], 28, 28 * 28, 256 * 256)
    assert ours.video_size(size, frames) == (width, height)
    write_qwen2_tokenizer(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 784, "longest_edge": 7840}}')
    height, width = smart_resize(size[1], size[0], 28, 784, 7840)
    own = load_image_processor(tmp_path, frame_budget=True, max_pixels=1568)
    assert own.video_size(size, frames) == (width, height) and own.max_pixels == 1568


def test_limits_given_by_hand_hold_for_frames_too(folder, tmp_path):
    assert load_processor(folder, PLAIN, max_pixels=1568).image_processor.video_max_pixels == 1568
    write_qwen2_tokenizer(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(
        '{"min_pixels": 784, "max_pixels": 7840, "cap_pixels_per_frame": true}'
    )
    with pytest.raises(CheckpointError, match="cap_pixels_per_frame is not supported"):
        load_processor(tmp_path, PLAIN)


def transformers_tokens(processor, chat, grids: dict[str, list]) -> list[int]:
    """What Qwen2_5_VLProcessor makes of the prompt; its own loading needs torchvision, its text functions do not."""
    theirs = transformers.Qwen2_5_VLProcessor.__new__(transformers.Qwen2_5_VLProcessor)
    theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
    theirs.image_processor = theirs.video_processor = SimpleNamespace(merge_size=2)
    inputs = {f"{kind}_grid_thw": np.array(grid) for kind, grid in grids.items()}
    images = [theirs.replace_image_token(inputs, i) for i in range(len(grids.get("image", [])))]
    videos = [theirs.replace_video_token(inputs, i) for i in range(len(grids.get("video", [])))]
    bare = [
        message
        | {"content": [{key: part[key] for key in ("type", "text") if key in part} for part in message["content"]]}
        for message in chat
    ]
    rendered = processor.tokenizer.apply_chat_template(bare, chat_template=processor.chat_template, tokenize=False)
    rendered, _ = theirs.get_text_with_replacements([rendered], images, videos)
    return processor.tokenizer(rendered[0])["input_ids"]


def test_tokens_equal_transformers(processor):
    """A default system turn, and a single pair of vision tokens around a whole video."""
    content = [text("Watch: "), video(84, 56, 5), image(56, 28), text("What happens?")]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": [text("a fox")]}]
    row = processor.encode(chat)
    grids = {"video": [[3, 4, 6]], "image": [[1, 2, 4]]}
    assert row.tokens.tolist() == transformers_tokens(processor, chat, grids)
    assert (row.tokens == START).sum() == 2 and (row.tokens == VIDEO).sum() == 18
    assert row.images == ((2, 3),) * 3 + ((1, 2),)
    assert processor.decode(row.tokens).startswith("system\nYou are a helpful assistant.\nuser\nWatch: ")
    assert processor.decode(row.tokens[row.loss_mask > 0], False) == "a fox<|im_end|>"


def test_injections_stay_text_beside_a_video(processor):
    parts = [text("<|video_pad|>"), video(28, 28, 4), text("<|vision_start|><|video_pad|><|vision_end|><|im_end|>")]
    row = processor.encode([{"role": "user", "content": parts}])
    assert (row.tokens == VIDEO).sum() == row.visual_count == 2
    assert (row.tokens == START).sum() == 1 and (row.tokens == IM_END).sum() == 2


def test_videos_the_template_loses_are_named(folder):
    processor = load_processor(folder, PLAIN, chat_template="{{ messages[0].role }}")
    with pytest.raises(ValueError, match="row 5 has 0 video placeholders for 1 videos"):
        processor.encode([{"role": "user", "content": [video(28, 28, 4)]}], where="row 5")


def transformers_positions(row, grids, seconds, speed: int | None) -> np.ndarray:
    """`get_rope_index` of the model class; image and video tokens are told apart by their ids."""
    family = transformers.Qwen2VLModel if speed is None else transformers.Qwen2_5_VLModel
    model = family.__new__(family)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=speed))
    kind = np.where(row.tokens == IMAGE, 1, np.where(row.tokens == VIDEO, 2, 0))
    inputs = {f"{name}_grid_thw": torch.tensor(grid) for name, grid in grids.items()}
    if speed is not None:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    ids = torch.tensor(row.tokens, dtype=torch.long)[None]
    return model.get_rope_index(ids, torch.tensor(kind)[None], **inputs)[0][:, 0].numpy()


@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 29.97])
def test_positions_equal_transformers(processor, fps):
    """Videos that are wider than long, so that both rules for the text behind them agree."""
    parts = [
        text("a"),
        image(56, 84),
        video(252, 56, 7, max(fps, 1.5)),
        text("b"),
        video(56, 140, 4, fps),
        image(28, 56),
    ]
    row = processor.encode([{"role": "user", "content": parts}])
    grids = {"image": [[1, 6, 4], [1, 4, 2]], "video": [[4, 4, 18], [2, 10, 4]]}
    seconds = [2 / max(fps, 1.5), 2 / fps]
    speed = processor.config.positions_per_second and int(processor.config.positions_per_second)
    np.testing.assert_array_equal(row.positions, transformers_positions(row, grids, seconds, speed))


def test_text_behind_a_long_video_goes_on_behind_its_last_second(processor):
    """As Qwen2-VL's paper (section 2.1) and the release of the models have it; transformers since 5.3 counts on from
    the larger side of a frame, into the positions of the video (its issue 45381 shows both)."""
    row = processor.encode([{"role": "user", "content": [video(84, 56, 12, 1.0), text("x")]}])
    first, last = np.flatnonzero(row.tokens == VIDEO)[[0, -1]]
    step = 1 if processor.config.positions_per_second is None else 4
    start = row.positions[0, first]
    assert row.positions[0, first : last + 1].tolist() == [start + step * t for t in range(6) for _ in range(6)]
    assert row.positions[1:, last].tolist() == [start + 1, start + 2]
    np.testing.assert_array_equal(row.positions[:, last + 1], [start + 5 * step + 1] * 3)


def test_steps_round_down_as_published():
    found = mrope_positions(20, [(0, (20, 2, 2))], 2, [time_step(30.0, 2, 2.0)])
    published = (torch.arange(20) * torch.tensor(2 / 30.0) * 2).long()
    np.testing.assert_array_equal(found[0], published.numpy())


@pytest.mark.parametrize(
    "grids", [[(1, 8, 8)], [(1, 26, 12), (1, 4, 36), (1, 16, 4)], [(3, 10, 14), (1, 2, 2)], [(2, 18, 34)]]
)
@pytest.mark.parametrize("window", [3, 4])
def test_windows_equal_transformers(grids, window):
    index, seams = get_vision_window_index(torch.tensor(grids), 2, window * 28, 14)
    cells = np.empty(len(index), np.int64)
    lengths = np.diff(seams.numpy()) // 4
    cells[index.numpy()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    tables = patch_tables(grids, 0, 2, window)
    np.testing.assert_array_equal(tables.windows, np.repeat(cells, 4))
    assert not tables.table.any() and not tables.weights.any()
    pairs = np.stack([tables.windows, tables.segments])
    assert len(np.unique(pairs, axis=1).T) == tables.windows.max()  # no window reaches into two frames


def test_windows_are_padded_and_widened(folder):
    processor = load_processor(folder, WINDOWED)
    rows = [processor.encode([{"role": "user", "content": [part]}]) for part in (image(140, 56), text("none"))]
    batch = collate(rows, Buckets(tokens=(64,), patches=(48, 64)))
    assert batch.patch_windows.shape == (2, 48) and batch.patch_windows.dtype == np.int32
    np.testing.assert_array_equal(batch.patch_windows[0, :40], rows[0].patch_windows)
    assert not batch.patch_windows[0, 40:].any() and not batch.patch_windows[1].any()
    assert widen(batch, 80, 64).patch_windows.shape == (2, 64)
    plain = load_processor(folder, PLAIN).encode([{"role": "user", "content": "a"}])
    assert collate([plain]).patch_windows is None and widen(collate([plain]), 80, 64).patch_windows is None
    with pytest.raises(ValueError, match="some rows have attention windows"):
        collate([plain, rows[0]])
