"""Tilings and layouts against transformers: canvases, counts, packed features; windows that stay with their tokens."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from jaxmem.data import anyres
from jaxmem.data.anyres import NEWLINE
from jaxmem.errors import ConfigError, DataError

torch = pytest.importorskip("torch")

from transformers.models.llava_next import modeling_llava_next  # noqa: E402
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel  # noqa: E402
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor  # noqa: E402
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel  # noqa: E402
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor  # noqa: E402

CLIP = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIGLIP = [[height // 336 * 384, width // 336 * 384] for height, width in CLIP]
ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
WIDE, TALL, SQUARE, TINY, THIN = (1200, 300), (300, 1200), (672, 672), (3, 2), (1000, 4)
SHAPES = {"2x2": (640, 480), "1x3": WIDE, "3x1": TALL}


def random_sizes(count: int, limit: int, seed: int = 0) -> list[tuple[int, int]]:
    return [tuple(size) for size in np.random.default_rng(seed).integers(1, limit, (count, 2)).tolist()]


def projected(tiles: int, cells: int, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tiles, cells**2, width)).astype(np.float32)


def packed(layout: anyres.Layout, features: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """What a backbone does with a layout: [tiles, N', D] -> [n, D]."""
    rows = features.reshape(-1, features.shape[-1])
    found = rows[layout.rows]
    if layout.taps is not None:
        found = np.einsum("kn,knd->nd", layout.weights, rows[layout.taps])
    return np.where(layout.rows[:, None] == NEWLINE, newline, found)


def theirs(model: type, tile: int, pinpoints: list, cells: int, features: list, sizes: list, newline, **more) -> list:
    """`pack_image_features` of a model class, whose grid is that of the projector."""
    vision = SimpleNamespace(image_size=tile, patch_size=tile // cells)
    this = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    shapes = torch.tensor([size[::-1] for size in sizes])
    line = None if newline is None else torch.tensor(newline)
    out, counts = model.pack_image_features(
        this, [torch.tensor(f) for f in features], shapes, image_newline=line, **more
    )
    assert counts.tolist() == [len(image) for image in out]
    return [image.numpy() for image in out]


@pytest.mark.parametrize("pinpoints", [CLIP, SIGLIP, ONEVISION], ids=["clip", "siglip", "onevision"])
def test_canvases_equal_transformers(pinpoints):
    for size in (
        random_sizes(400, 3000) + random_sizes(100, 12) + [WIDE, TALL, SQUARE, TINY, THIN, (1, 9000), (9000, 1)]
    ):
        canvas = select_best_resolution(size[::-1], pinpoints)
        assert anyres.best_resolution(size, pinpoints) == tuple(canvas), size
        height, width = get_patch_output_size(np.zeros((1, *size[::-1]), bool), canvas, "channels_first")
        left, top = (canvas[1] - width) // 2, (canvas[0] - height) // 2
        assert anyres.placed(size, tuple(canvas)) == (left, top, width, height), size


def test_among_equals_the_smallest_then_the_first():
    assert anyres.best_resolution((10, 10), [(40, 40), (20, 40), (40, 20)]) == (20, 40)
    assert anyres.best_resolution((10, 10), [(40, 20), (20, 40)]) == (40, 20)


@pytest.mark.parametrize(
    ("size", "tiles", "clip", "siglip", "onevision"),
    [
        ((640, 480), (2, 2), (2340, 594, 268, 166), 2929, 2929),
        ((1200, 300), (1, 3), (1890, 514, 214, 112), 2451, 3672),
        ((1190, 1684), (2, 2), (2256, 552, 272, 144), 2835, 7353),
        ((672, 672), (2, 2), (2928, 744, 336, 192), 3699, 3699),
    ],
)
def test_check_07_counts(size, tiles, clip, siglip, onevision):
    found = [anyres.layout(size, 336, CLIP, 24 // ratio) for ratio in (1, 2, 3, 4)]
    assert tuple(layout.count for layout in found) == clip
    assert {layout.tiles for layout in found} == {tiles}
    assert anyres.layout(size, 384, SIGLIP, 27).count == siglip
    assert anyres.layout(size, 384, ONEVISION, 27, max_tiles=9).count == onevision


def test_counts_equal_the_processors():
    next_ = LlavaNextProcessor.__new__(LlavaNextProcessor)
    next_.image_processor = SimpleNamespace(image_grid_pinpoints=CLIP)
    next_.patch_size, next_.num_additional_image_tokens = 14, 0
    vision = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    vision.image_processor = SimpleNamespace(image_grid_pinpoints=ONEVISION)
    vision.num_image_tokens, vision.vision_aspect_ratio = 729, "anyres_max_9"
    for size in [*random_sizes(120, 2500), WIDE, TALL, TINY, THIN]:
        width, height = size
        assert anyres.layout(size, 336, CLIP, 24).count == next_._get_number_of_features(height, width, 336, 336), size
        found = anyres.layout(size, 384, ONEVISION, 27, max_tiles=9).count
        assert found == vision._get_number_of_features(height, width, 384, 384), size


@pytest.mark.parametrize("cells", [24, 12, 8, 6])
def test_packed_features_equal_llava_next(cells):
    """Several images at once; a thin one, of whose fine grid coarse cells keep nothing."""
    sizes = [WIDE, TALL, SQUARE, (640, 480), (1190, 1684), TINY, THIN]
    layouts = [anyres.layout(size, 336, CLIP, cells) for size in sizes]
    assert layouts[-1].count == cells**2 and layouts[-1].tiles == (1, 3)
    features = [projected(1 + np.prod(layout.tiles), cells, seed=i) for i, layout in enumerate(layouts)]
    newline = projected(1, 1, seed=99)[0, 0]
    strategy = {"vision_feature_select_strategy": "default"}
    want = theirs(LlavaNextModel, 336, CLIP, cells, features, sizes, newline, **strategy)
    for layout, tiles, image in zip(layouts, features, want, strict=True):
        np.testing.assert_array_equal(packed(layout, tiles, newline), image)
    bare = [anyres.layout(size, 336, CLIP, cells, newline=False) for size in sizes[:2]]
    want = theirs(LlavaNextModel, 336, CLIP, cells, features[:2], sizes[:2], None, **strategy)
    for layout, tiles, image in zip(bare, features, want, strict=False):
        np.testing.assert_array_equal(packed(layout, tiles, newline), image)


@pytest.mark.parametrize(("k", "cells"), [(9, 27), (4, 27), (1, 27), (9, 9)])
def test_packed_features_equal_llava_onevision(k, cells):
    """Small images stay; larger ones are scaled down bilinearly."""
    sizes = [(1190, 1684), WIDE, TALL, SQUARE, (2304, 2304), (2300, 1500), (5000, 900), (640, 480), TINY]
    layouts = [anyres.layout(size, 384, ONEVISION, cells, max_tiles=k) for size in sizes]
    scaled = [layout.taps is not None for layout in layouts]
    assert scaled[0] and not scaled[-1]
    features = [projected(1 + np.prod(layout.tiles), cells, 2, seed=i) for i, layout in enumerate(layouts)]
    newline = projected(1, 1, 2, seed=99)[0, 0]
    aspect = {"vision_aspect_ratio": f"anyres_max_{k}"}
    want = theirs(LlavaOnevisionModel, 384, ONEVISION, cells, features, sizes, newline, **aspect)
    worst = 0.0
    for layout, tiles, image in zip(layouts, features, want, strict=True):
        found = packed(layout, tiles, newline)
        assert found.shape == image.shape
        shown = layout.rows[layout.rows != NEWLINE]
        assert len(set(shown.tolist())) == len(shown)  # no row stands for two tokens
        worst = max(worst, float(np.abs(found - image).max()))
    print(f"anyres_max_{k}, {cells} cells: {sum(scaled)} of {len(sizes)} scaled, largest difference {worst:.1e}")
    assert worst <= 1e-5


def test_taps_of_a_scaled_layout():
    layout = anyres.layout((1190, 1684), 384, ONEVISION, 27, max_tiles=9)
    ends = layout.rows == NEWLINE
    assert layout.rows.dtype == layout.taps.dtype == np.int32 and layout.weights.dtype == np.float32
    assert (layout.taps[:, ends] == NEWLINE).all() and not layout.weights[:, ends].any()
    np.testing.assert_allclose(layout.weights[:, ~ends].sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(layout.taps[:, :729], np.broadcast_to(np.arange(729), (4, 729)))
    np.testing.assert_array_equal(layout.weights[:, :729], np.eye(4, 1) @ np.ones((1, 729)))
    heaviest = layout.taps[layout.weights.argmax(0), np.arange(layout.count)]
    np.testing.assert_array_equal(layout.rows, heaviest)


def test_a_single_tile_ends_with_one_newline():
    features, newline = projected(1, 6), projected(1, 1, seed=1)[0, 0]
    layout = anyres.single_layout(36)
    assert layout.tiles == (0, 0) and layout.rows.dtype == np.int32
    for model, more in (
        (LlavaNextModel, {"vision_feature_select_strategy": "default"}),
        (LlavaOnevisionModel, {"vision_aspect_ratio": "anyres_max_9"}),
    ):
        want = theirs(model, 336, CLIP, 6, [features, -features], [WIDE, TALL], newline, **more)
        np.testing.assert_array_equal(packed(layout, features, newline), want[0])
        np.testing.assert_array_equal(packed(layout, -features, newline), want[1])
    assert anyres.single_layout(36, newline=False).rows.tolist() == list(range(36))


def test_both_roundings(monkeypatch):
    """Without its `round`, transformers' unpadding is that of LLaVA-NeXT's own code: the two differ for 88 of 55."""
    sizes = [(55, 88), (47, 1128), *random_sizes(40, 900, seed=3)]
    tiles = [projected(1 + np.prod(anyres.grid(size, 336, CLIP)), 24, 1, seed=i) for i, size in enumerate(sizes)]
    newline = np.full(1, 7, np.float32)
    differ = 0
    for rounding in ("hf", "original"):
        if rounding == "original":
            monkeypatch.setattr(modeling_llava_next, "round", lambda value, _: value, raising=False)
        want = theirs(LlavaNextModel, 336, CLIP, 24, tiles, sizes, newline, vision_feature_select_strategy="default")
        for size, features, image in zip(sizes, tiles, want, strict=True):
            layout = anyres.layout(size, 336, CLIP, 24, rounding=rounding)
            np.testing.assert_array_equal(packed(layout, features, newline), image)
            differ += layout.count != anyres.layout(size, 336, CLIP, 24).count
    assert differ == 2
    assert anyres.layout((55, 88), 336, CLIP, 24).count == 984
    assert anyres.layout((55, 88), 336, CLIP, 24, rounding="original").count == 936


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_check_06_windows_stay_with_their_tokens(shape, ratio):
    """The patches of a token's window are those under its place in the picture, which transformers tells."""
    size, side, cells = SHAPES[shape], 24, 24 // ratio
    rows, columns = anyres.grid(size, 336, CLIP)
    assert f"{rows}x{columns}" == shape
    ids = np.arange((1 + rows * columns) * side**2).reshape(-1, side, side)
    windows = ids.reshape(-1, cells, ratio, cells, ratio).swapaxes(2, 3).reshape(-1, ratio**2)
    layout = anyres.layout(size, 336, CLIP, cells)
    kept = layout.rows != NEWLINE
    found = windows[layout.rows[kept]]

    stitched = np.block([[ids[1 + row * columns + column] for column in range(columns)] for row in range(rows)])
    fine = np.stack(np.indices((rows * cells, columns * cells)), axis=-1).astype(np.float32)
    fine = fine.reshape(rows, cells, columns, cells, 2).swapaxes(1, 2).reshape(-1, cells**2, 2)
    whole = np.stack(np.indices((cells, cells)), axis=-1).reshape(1, cells**2, 2).astype(np.float32)
    newline = np.full(2, -1, np.float32)
    strategy = {"vision_feature_select_strategy": "default"}
    features = [np.concatenate([whole, fine])]
    (places,) = theirs(LlavaNextModel, 336, CLIP, cells, features, [size], newline, **strategy)
    np.testing.assert_array_equal(kept, places[:, 0] >= 0)
    for token, (row, column) in enumerate(places[kept].astype(int)):
        picture = ids[0] if token < cells**2 else stitched
        window = picture[row * ratio : (row + 1) * ratio, column * ratio : (column + 1) * ratio]
        np.testing.assert_array_equal(found[token], window.ravel())


def test_unpadding_can_be_left_out():
    layout = anyres.layout(WIDE, 336, CLIP, 4, unpad=False)
    fine = layout.rows[16:].reshape(4, 13)
    assert (fine[:, -1] == NEWLINE).all()
    assert fine[0].tolist() == [16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, NEWLINE]
    assert sorted(fine[:, :-1].ravel()) == list(range(16, 64))


def test_tiles_without_a_grid_stay_whole():
    layout = anyres.flat_layout((640, 480), 336, CLIP, 3)
    assert layout.tiles == (2, 2) and layout.rows.dtype == np.int32
    assert layout.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, NEWLINE, 9, 10, 11, 12, 13, 14, NEWLINE]
    assert anyres.flat_layout((640, 480), 336, CLIP, 3, newline=False).rows.tolist() == list(range(15))


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (640, 480), TINY, THIN, (101, 37)])
def test_patches_inside_are_those_with_a_pixel_of_the_picture(size):
    """Patches of 5 pixels: a tile of 24 has 4 per side, and pixels beyond them."""
    pinpoints = [[height // 14, width // 14] for height, width in CLIP]
    height, width = anyres.best_resolution(size, pinpoints)
    left, top, across, down = anyres.placed(size, (height, width))
    canvas = np.zeros((height, width), bool)
    canvas[top : top + down, left : left + across] = True
    want = [[True] * 16]
    for row in range(0, height, 24):
        for column in range(0, width, 24):
            tile = canvas[row : row + 24, column : column + 24]
            want.append([tile[y : y + 5, x : x + 5].any() for y in range(0, 20, 5) for x in range(0, 20, 5)])
    np.testing.assert_array_equal(anyres.inside(size, 24, 5, pinpoints), want)


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (24, 24), (1, 50), (97, 41), (5, 7)])
def test_patches_inside_a_padded_square(size):
    longest = max(size)
    want = []
    for y in range(0, 20, 5):
        for x in range(0, 20, 5):
            hits = [
                Fraction(longest * low, 24) < (longest - length) // 2 + length
                and Fraction(longest * (low + 5), 24) > (longest - length) // 2
                for low, length in ((x, size[0]), (y, size[1]))
            ]
            want.append(all(hits))
    np.testing.assert_array_equal(anyres.inside_square(size, 24, 5), [want])


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_images_without_area_are_refused(size):
    for function, arguments in (
        (anyres.best_resolution, (CLIP,)),
        (anyres.layout, (336, CLIP, 24)),
        (anyres.flat_layout, (336, CLIP, 32)),
        (anyres.inside, (336, 14, CLIP)),
        (anyres.inside_square, (336, 14)),
        (anyres.placed, ((336, 336),)),
    ):
        with pytest.raises(DataError, match=f"an image of {size[0]}x{size[1]} pixels has no area"):
            function(size, *arguments)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="no image_grid_pinpoints"):
        anyres.layout(WIDE, 336, [], 24)
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints \[\[300, 672\]\].*multiples of the tile, 336"):
        anyres.layout(WIDE, 336, [*CLIP, [300, 672]], 24)
    with pytest.raises(ConfigError, match=r"\[\[0, 336\]\]"):
        anyres.inside(WIDE, 336, 14, [[0, 336]])
    with pytest.raises(ConfigError, match="rounding 'HF': choose one of hf, original"):
        anyres.layout(WIDE, 336, CLIP, 24, rounding="HF")
    with pytest.raises(ConfigError, match="max_tiles=0"):
        anyres.layout(WIDE, 336, CLIP, 24, max_tiles=0)
    with pytest.raises(ConfigError, match="cells=0"):
        anyres.layout(WIDE, 336, CLIP, 0)
