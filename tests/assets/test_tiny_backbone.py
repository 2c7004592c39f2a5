"""The embedded default: what its folder holds, that transformers reads it, and how its training data is made."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

import jaxmem
from jaxmem.assets import TINY
from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.assets.tiny_folder import write_folder
from jaxmem.assets.tiny_phases import CAPTIONS, FAR, PHASES, batch_of, boards_of
from jaxmem.backbones.registry import config_from_hf
from jaxmem.checkpoints.huggingface import read_config
from jaxmem.data.boards import BoardDataset, board_tokens, digit_reads, score_tokens


@pytest.fixture(scope="module")
def model():
    return jaxmem.load(dtype="float32")


def test_the_small_files_are_those_that_the_build_writes(tmp_path):
    write_folder(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "config.json"}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((TINY / "config.json").read_text())
    assert {name: (TINY / name).read_bytes() for name in written} == written
    assert (TINY / "model.safetensors").stat().st_size < 3_000_000


def test_transformers_loads_it_whole_and_computes_the_same(model):
    theirs, report = Qwen3VLForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = model.batch([BoardDataset("test", k=5)[0].messages], add_generation_prompt=False)
    length = int(batch.segments.sum())
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(batch.tokens[:, :length], dtype=torch.long),
            pixel_values=torch.tensor(np.array(batch.patches[0])),
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            mm_token_type_ids=torch.tensor(batch.visual_rows[:, :length] >= 0).int(),
        ).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.logits(batch))[:, :length], wanted, atol=1e-3)


def test_it_reads_boards_that_it_has_not_seen(model):
    boards = list(BoardDataset("test", seed=9, size=32))
    ids = board_tokens(model.processor.tokenizer)
    batcher = BoardBatcher(Tokenizer.from_file(str(TINY / "tokenizer.json")), model.spec.backbone)
    batch = batcher(boards, 56)
    predicted = np.roll(np.asarray(model.logits(batch)).argmax(-1), 1, axis=1)
    score = score_tokens(predicted, batch.tokens, batch.loss_mask, ids)
    assert score.read >= 0.97 and score.exact >= 0.85


def test_every_layout_fits_its_batch_and_has_its_loss():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    config = config_from_hf(read_config(TINY))
    batcher, ids = BoardBatcher(tokenizer, config), board_tokens(tokenizer)
    for layout in {layout for phase in PHASES for layout in phase.layouts} - {CAPTIONS}:
        longest = BoardDataset("train", k=max(layout.k), n=max(layout.n), size=1)
        assert batcher([longest[0]], layout.width).tokens.shape == (1, layout.width)
    caption = batch_of(CAPTIONS, boards_of(CAPTIONS, 1, 0)[:2], batcher, ids)
    assert caption.loss_mask.sum(axis=1).tolist() == [16, 16]
    blind = batch_of(FAR[0], boards_of(FAR[0], 1, 0)[:2], batcher, ids)
    assert blind.blind.all() and blind.patches.shape[:2] == (2, 0)
    assert not digit_reads(blind.tokens, blind.loss_mask, ids).any() and blind.loss_mask.any()


def test_phases_share_no_boards():
    seeds = [phase.boards for phase in PHASES]
    assert len(set(seeds)) == len(seeds)
