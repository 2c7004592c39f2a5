"""Positions and vision tables against transformers; buckets and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from jaxmem.data.batching import Buckets, collate
from jaxmem.data.positions import merge_order, mrope_positions, patch_tables

IMAGE, VIDEO, TEXT = 1, 2, 0


def rope_index(kinds: list[int], images: list, videos: list, merge: int) -> np.ndarray:
    """transformers' positions [3, T] of a row of token kinds."""
    model = transformers.Qwen3VLModel.__new__(transformers.Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = transformers.Qwen3VLConfig(vision_config={"spatial_merge_size": merge})
    grids = [torch.tensor(g) if g else None for g in (images, videos)]
    positions, _ = model.get_rope_index(torch.zeros(1, len(kinds), dtype=torch.long), torch.tensor([kinds]), *grids)
    return positions[:, 0].numpy()


CASES = {
    "text": [5],
    "one wide image": [4, (IMAGE, (1, 4, 18)), 6],
    "one tall image at the start": [(IMAGE, (1, 20, 2)), 3],
    "three images": [4, (IMAGE, (1, 4, 6)), 2, (IMAGE, (1, 2, 2)), 7, (IMAGE, (1, 10, 4)), 3],
    "video": [3, (VIDEO, (3, 4, 6)), 5],
    "image, video, image": [2, (IMAGE, (1, 6, 4)), 2, (VIDEO, (2, 2, 8)), 2, (IMAGE, (1, 2, 2)), 1],
}


@pytest.mark.parametrize("merge", [2, 1])
@pytest.mark.parametrize("case", CASES)
def test_positions_equal_transformers(case, merge):
    kinds, blocks, grids = [], [], {IMAGE: [], VIDEO: []}
    for item in CASES[case]:
        if isinstance(item, int):
            kinds += [TEXT] * item
            continue
        kind, grid = item
        grids[kind].append(list(grid))
        for frame in range(grid[0]):
            kinds += [TEXT] * (4 if frame else 0)  # the text of the next time stamp
            blocks.append((len(kinds), (1, *grid[1:])))
            kinds += [kind] * (grid[1] * grid[2] // merge**2)
    theirs = rope_index(kinds, grids[IMAGE], grids[VIDEO], merge)
    np.testing.assert_array_equal(mrope_positions(len(kinds), blocks, merge), theirs)


def test_positions_refuse_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        mrope_positions(5, [(2, (1, 4, 4)), (3, (1, 2, 2))], 2)
    with pytest.raises(ValueError, match="does not fit"):
        mrope_positions(5, [(2, (1, 4, 4))], 2)


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("side", [8, 48])
def test_tables_equal_transformers(side, merge):
    cells = [(1, 1, 1), (1, 3, 7), (2, 5, 4), (1, 24, 16), (1, 1, 30)]
    grids = [(frames, rows * merge, columns * merge) for frames, rows, columns in cells]
    tables = patch_tables(grids, side, merge)
    thw = torch.tensor(grids)
    rows, weights = get_vision_interpolation_indices_and_weights(
        thw, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    np.testing.assert_array_equal(tables.table, rows.numpy())
    np.testing.assert_allclose(tables.weights, weights.numpy(), atol=2e-5 if side == 48 else 3e-6)
    np.testing.assert_allclose(tables.weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(tables.coords, get_vision_position_ids(thw, merge).numpy())
    frames = [(r, c) for t, r, c in grids for _ in range(t)]
    expected = np.concatenate([np.full(r * c, i + 1) for i, (r, c) in enumerate(frames)])
    np.testing.assert_array_equal(tables.segments, expected)


def test_table_of_its_own_size_is_the_identity():
    tables = patch_tables([(1, 8, 8)], 8, 2)
    np.testing.assert_array_equal(tables.table[:, 0], tables.coords @ [8, 1])
    np.testing.assert_array_equal(tables.weights, np.tile([1, 0, 0, 0], (64, 1)))


def test_merge_order_keeps_cells_together():
    np.testing.assert_array_equal(merge_order(2, 4, 2)[:4], [(0, 0), (0, 1), (1, 0), (1, 1)])
    with pytest.raises(ValueError, match="not divisible"):
        merge_order(3, 4, 2)


def rows(processor):
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    small = picture[:32, :32]
    image = [{"type": "image", "image": picture}, {"type": "image", "image": small}, {"type": "text", "text": "See?"}]
    chats = [
        [{"role": "user", "content": image}, {"role": "assistant", "content": "Yes, a fox."}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ]
    return [processor.encode(chat) for chat in chats]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_collate(processor, padding):
    examples = rows(processor)
    batch = collate(examples, Buckets(tokens=(16, 48, 64), patches=(4, 32, 64)), 506, padding, blind=[True, False])
    assert batch.shape_key == (2, 48, 32)
    assert batch.blind.tolist() == [True, False]
    for i, row in enumerate(examples):
        own = slice(48 - len(row), 48) if padding == "left" else slice(0, len(row))
        for name in ("tokens", "positions", "loss_mask", "visual_rows"):
            np.testing.assert_array_equal(getattr(batch, name)[i][..., own], getattr(row, name))
        for name in ("patches", "patch_segments", "patch_coords", "patch_table", "patch_weights"):
            value = getattr(batch, name)[i]
            np.testing.assert_array_equal(value[: len(row.patches)], getattr(row, name))
            assert not value[len(row.patches) :].any()
        pad = np.ones(48, bool)
        pad[own] = False
        np.testing.assert_array_equal(batch.segments[i], ~pad)
        assert (batch.tokens[i][pad] == 506).all() and (batch.visual_rows[i][pad] == -1).all()
        assert not batch.loss_mask[i][pad].any() and not batch.positions[i][:, pad].any()
    dtypes = {name: getattr(batch, name).dtype for name in ("tokens", "segments", "patch_table", "visual_rows")}
    assert set(dtypes.values()) == {np.dtype(np.int32)}
    assert batch.loss_mask.dtype == batch.patches.dtype == batch.patch_weights.dtype == np.float32


def test_visual_rows_count_through_all_images(processor):
    row = rows(processor)[0]
    seen = row.visual_rows[row.visual_rows >= 0]
    np.testing.assert_array_equal(seen, np.arange(len(row.patches) // 4))
    assert row.images == ((2, 3), (1, 1)) and row.visual_count == 7


def test_text_batches_have_no_patches(processor):
    batch = collate(rows(processor)[1:], Buckets(), processor.pad_token)
    assert batch.shape_key == (1, 64, 0) and batch.patches.shape == (1, 0, 1536)


def test_few_shapes(processor):
    text = rows(processor)[1]
    shapes = {Buckets().fit_tokens(n) for n in range(1, 32_769, 37)}
    assert len(shapes) == 10 and max(shapes) == 32_768
    assert Buckets().fit_patches(0) == 0 and Buckets().fit_patches(65) == 128
    assert collate([text], Buckets(tokens=(len(text),))).tokens.shape == (1, len(text))


def test_collate_errors(processor):
    examples = rows(processor)
    with pytest.raises(ValueError, match="row 0 has .* tokens and the longest bucket is 20"):
        collate(examples, Buckets(tokens=(16, 20)))
    with pytest.raises(ValueError, match="row 0 has 28 patches and the longest bucket is 24.*max_pixels"):
        collate(examples, Buckets(patches=(8, 24)))
    assert collate(examples, Buckets(patches=(30,))).patches.shape[1] == 32  # whole visual tokens of 4 patches
    with pytest.raises(ValueError, match="at least one row"):
        collate([])
    with pytest.raises(ValueError, match="padding must be"):
        collate(examples, padding="middle")
    with pytest.raises(ValueError, match="blind has shape"):
        collate(examples, blind=[True])
    with pytest.raises(ValueError, match="ascending"):
        Buckets(tokens=(8, 4))
