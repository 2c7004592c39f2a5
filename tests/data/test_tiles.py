"""Tiles against transformers' PIL processors: pixels, which patches are inside, and the settings of a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from jaxmem.data.tiles import TileProcessor, load_tile_processor
from jaxmem.errors import CheckpointError, ConfigError, DataError

torch = pytest.importorskip("torch")

from transformers import LlavaNextConfig, LlavaOnevisionConfig  # noqa: E402
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil  # noqa: E402
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor  # noqa: E402
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (  # noqa: E402
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor  # noqa: E402

HALF = [0.5, 0.5, 0.5]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SIZES = {
    "wide": (200, 47),
    "tall": (31, 150),
    "square": (112, 112),
    "small": (9, 6),
    "pixel": (1, 1),
    "odd": (133, 101),
}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_next(folder, tile: int, **changes):
    """The two files of a LLaVA-NeXT folder, as transformers writes them."""
    points = [[rows * tile, columns * tile] for rows, columns in SHAPES]
    settings = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=points).save_pretrained(folder)
    LlavaNextConfig(image_grid_pinpoints=points).save_pretrained(folder)
    return change(folder, changes)


def write_onevision(folder, tile: int, **changes):
    points = [[rows * tile, columns * tile] for rows in range(1, 4) for columns in range(1, 4)]
    settings = {"size": {"height": tile, "width": tile}, "image_mean": HALF, "image_std": HALF}
    LlavaOnevisionImageProcessorPil(**settings, image_grid_pinpoints=points).save_pretrained(folder)
    LlavaOnevisionConfig(image_grid_pinpoints=points, vision_aspect_ratio="anyres_max_4").save_pretrained(folder)
    return change(folder, changes)


def change(folder, changes: dict):
    """Replaces keys of preprocessor_config.json; ... takes a key out."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return folder


def load(folder, tile: int, patch: int, **more) -> TileProcessor:
    hf_config = json.loads((folder / "config.json").read_text())
    sizes = {"image_size": tile, "patch_size": patch}
    return load_tile_processor(folder, hf_config, **sizes, **({"cells": tile // patch} | more))


def patched(pixels, patch: int) -> np.ndarray:
    """[N, 3, H, W] -> [N S, C] in the order of a convolution's weights."""
    pixels = torch.as_tensor(np.asarray(pixels))
    found = torch.nn.functional.unfold(pixels, patch, stride=patch).swapaxes(1, 2)
    return found.reshape(-1, found.shape[-1]).numpy()


def compare(tiled, pixels, patch: int) -> float:
    want = patched(pixels, patch)
    assert tiled.patches.shape == want.shape and tiled.patches.dtype == np.float32
    assert len(tiled.inside) == len(want) and tiled.tiles == len(pixels)
    return float(np.abs(tiled.patches - want).max())


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory):
    return write_next(tmp_path_factory.mktemp("next"), 56)


@pytest.fixture(scope="module")
def onevision_folder(tmp_path_factory):
    """Tiles of 30 pixels: 2 patches of 14 per side, and 2 pixels beyond them."""
    return write_onevision(tmp_path_factory.mktemp("onevision"), 30)


@pytest.mark.parametrize("shape", SIZES)
def test_pixels_equal_llava_next(next_folder, shape):
    """`size` is a shortest edge there, and the tiles are cropped: neither changes a tile that has the size already."""
    image, ours = noise(SIZES[shape]), load(next_folder, 56, 14)
    theirs = LlavaNextImageProcessorPil.from_pretrained(next_folder)(images=[image])
    worst = compare(ours.image(image), theirs["pixel_values"][0], 14)
    print(f"LlavaNextImageProcessorPil, {shape}: {len(theirs['pixel_values'][0])} tiles, {worst:.1e}")
    assert worst <= 1e-6
    assert ours.mean == tuple(CLIP_MEAN) and ours.std == tuple(CLIP_STD) and ours.resample == 3


@pytest.mark.parametrize("shape", SIZES)
def test_pixels_equal_llava_onevision(onevision_folder, shape):
    image, ours = noise(SIZES[shape]), load(onevision_folder, 30, 14)
    theirs = LlavaOnevisionImageProcessorPil.from_pretrained(onevision_folder)(images=[image])
    worst = compare(ours.image(image), theirs["pixel_values"][0], 14)
    print(f"LlavaOnevisionImageProcessorPil, {shape}: {len(theirs['pixel_values'][0])} tiles, {worst:.1e}")
    assert worst <= 1e-6
    assert ours.mean == ours.std == (0.5, 0.5, 0.5) and ours.aspect == "anyres_max_4" and ours.max_tiles == 4


def test_filter_and_factor_of_the_file(tmp_path):
    write_next(tmp_path, 56, resample=2, rescale_factor=1 / 128)
    image, ours = noise((133, 101)), load(tmp_path, 56, 14)
    theirs = LlavaNextImageProcessorPil.from_pretrained(tmp_path)(images=[image])
    assert compare(ours.image(image), theirs["pixel_values"][0], 14) <= 1e-6


@pytest.mark.parametrize(("write", "tile"), [(write_next, 336), (write_onevision, 384)], ids=["clip", "siglip"])
def test_pixels_at_the_released_sizes(tmp_path, write, tile):
    image, ours = noise((500, 410)), load(write(tmp_path, tile), tile, 14)
    kind = LlavaNextImageProcessorPil if write is write_next else LlavaOnevisionImageProcessorPil
    pixels = kind.from_pretrained(tmp_path)(images=[image])["pixel_values"][0]
    tiled = ours.image(image)
    assert compare(tiled, pixels, 14) <= 1e-6
    assert tiled.rows == 5 * (tile // 14) ** 2 and tiled.layout.rows.max() < tiled.rows


def test_several_images_are_all_tiled_in_llava_next(next_folder):
    images = [noise(size, seed) for seed, size in enumerate(SIZES.values())]
    theirs = LlavaNextImageProcessorPil.from_pretrained(next_folder)(images=[images])["pixel_values"]
    ours = load(next_folder, 56, 14).images(images)
    assert {tiled.tiles for tiled in ours} == {3, 4, 5}
    for tiled, pixels in zip(ours, theirs, strict=True):
        assert compare(tiled, pixels[: tiled.tiles], 14) <= 1e-6
        assert not pixels[tiled.tiles :].any()  # transformers fills the batch up


@pytest.mark.parametrize("mean", [HALF, CLIP_MEAN], ids=["half", "clip"])
def test_several_images_are_padded_squares_in_llava_onevision(tmp_path, mean):
    write_onevision(tmp_path, 30, image_mean=mean)
    images = [noise(size, seed) for seed, size in enumerate(SIZES.values())]
    theirs = LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path)(images=[images])["pixel_values"]
    processor = load(tmp_path, 30, 14)
    ours = processor.images(images)
    for tiled, pixels, size in zip(ours, theirs, SIZES.values(), strict=True):
        assert compare(tiled, pixels, 14) <= 1e-6
        assert tiled.layout.rows.tolist() == [0, 1, 2, 3, -1] and tiled.rows == 4
        assert processor.count(size, several=True) == 5
    assert [tiled.inside.sum() for tiled in ours] == [4] * len(ours)
    alone = processor.images(images[:1])
    assert alone[0].tiles == processor.image(images[0]).tiles == 4


def test_counts_equal_the_processors_text(next_folder, onevision_folder):
    for folder, tile, kind in ((next_folder, 56, LlavaNextProcessor), (onevision_folder, 30, LlavaOnevisionProcessor)):
        ours, theirs = load(folder, tile, 14), kind.__new__(kind)
        theirs.patch_size, theirs.num_additional_image_tokens = 14, 0
        theirs.vision_aspect_ratio, theirs.num_image_tokens = "anyres_max_4", ours.cells**2
        name = "LlavaNextImageProcessorPil" if tile == 56 else "LlavaOnevisionImageProcessorPil"
        theirs.image_processor = globals()[name].from_pretrained(folder)
        for width, height in SIZES.values():
            found = ours.image(noise((width, height))).layout.count
            assert found == theirs._get_number_of_features(height, width, tile, tile)
            assert found == ours.count((width, height))


@pytest.mark.parametrize("shape", SIZES)
def test_patches_inside_are_those_that_are_not_black(next_folder, shape):
    """A white picture on transformers' canvas, in patches of 7 pixels."""
    white = Image.new("RGB", SIZES[shape], (255, 255, 255))
    pixels = LlavaNextImageProcessorPil.from_pretrained(next_folder)(images=[white], do_normalize=False)
    want = patched(pixels["pixel_values"][0], 7).max(axis=1) > 0
    found = load(next_folder, 56, 7).image(white).inside
    np.testing.assert_array_equal(found, want)
    assert found[:64].all() and found.all() == (shape == "square")


def test_settings_reach_the_layout():
    clip = tuple((336 * rows, 336 * columns) for rows, columns in SHAPES)
    fixed = {"tile": 336, "patch_size": 14, "pinpoints": clip, "mean": (0, 0, 0), "std": (1, 1, 1), "cells": 24}
    assert TileProcessor(**fixed).count((55, 88)) == 984
    assert TileProcessor(**fixed, rounding="original").count((55, 88)) == 936
    assert TileProcessor(**fixed, unpad=False).count((55, 88)) == 576 * 3 + 24
    assert TileProcessor(**fixed, newline=False).count((55, 88)) == 984 - 24
    assert TileProcessor(**fixed, newline=False, aspect="single").count((55, 88)) == 576
    assert TileProcessor(**fixed, aspect="anyres_max_1").count((640, 480)) < 2340


def test_aspect_single_squeezes(next_folder):
    ours, image = load(next_folder, 56, 14, aspect="single"), noise((200, 47))
    tiled, whole = ours.image(image), load(next_folder, 56, 14).image(image)
    np.testing.assert_array_equal(tiled.patches, whole.patches[:16])
    assert tiled.inside.all() and tiled.tiles == 1
    assert tiled.layout.rows.tolist() == [*range(16), -1]


def test_projectors_without_a_grid(onevision_folder):
    ours = load(onevision_folder, 30, 14, cells=None, tokens=3, aspect="anyres")
    tiled = ours.image(noise((60, 30)))
    assert tiled.tiles == 3 and tiled.rows == 9 and ours.unit == 4
    assert tiled.layout.rows.tolist() == [*range(9), -1]
    with pytest.raises(ConfigError, match="anyres_max_4' scales a grid of tokens, the projector has none"):
        load(onevision_folder, 30, 14, cells=None, tokens=3)


def test_newer_folders_nest_the_settings(next_folder, tmp_path):
    """processor_config.json wins where both files are, in transformers too."""
    write_next(tmp_path, 56)
    file = tmp_path / "preprocessor_config.json"
    nested = json.loads(file.read_text()) | {"image_mean": HALF}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "patch_size": 14}))
    assert tuple(LlavaNextImageProcessorPil.from_pretrained(tmp_path).image_mean) == (0.5, 0.5, 0.5)
    assert load(tmp_path, 56, 14).mean == (0.5, 0.5, 0.5)
    file.unlink()
    assert load(tmp_path, 56, 14).mean == (0.5, 0.5, 0.5)
    write_next(tmp_path, 56)
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14}')
    assert load(tmp_path, 56, 14) == load(next_folder, 56, 14)


@pytest.mark.parametrize("off", [False, None])
@pytest.mark.parametrize("key", ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"])
def test_steps_left_out_are_refused(tmp_path, key, off):
    """null switches a step off in transformers as well; a key that is not there leaves it on."""
    write_next(tmp_path, 56, **{key: ...})
    assert getattr(LlavaNextImageProcessorPil.from_pretrained(tmp_path), key) is True
    load(tmp_path, 56, 14)
    change(tmp_path, {key: off})
    assert not getattr(LlavaNextImageProcessorPil.from_pretrained(tmp_path), key)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {key}={off} is not supported"):
        load(tmp_path, 56, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": ...}, "has no 'image_mean'; library defaults match no released backbone"),
        ({"image_std": ...}, "has no 'image_std'"),
        ({"image_std": [1, 0, 1]}, r"image_std \[1, 0, 1\] is not one number per colour"),
        ({"image_mean": 0.5}, "image_mean 0.5 is not one number per colour"),
        ({"size": ...}, "has no 'size'"),
        ({"size": {"shortest_edge": 70}}, r"size {'shortest_edge': 70} is not the image_size 56"),
        ({"size": {"height": 56, "width": 70}}, r"size {'height': 56, 'width': 70} is not the image_size 56"),
        ({"crop_size": {"height": 70, "width": 70}}, "crop_size .* is not the image_size 56"),
        ({"crop_size": ...}, "has no 'crop_size'"),
        ({"resample": None}, "resample is null"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor is not supported; .* LlavaNextImageProc"),
        (
            {"image_grid_pinpoints": [[56, 112]]},
            r"preprocessor_config.json \[\[56, 112\]\] and config.json \[\[56, 112\], ",
        ),
    ],
)
def test_settings_that_are_missing_or_contradict_are_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(write_next(tmp_path, 56, **changes), 56, 14)


def test_pinpoints_stand_in_either_file(next_folder):
    hf_config = json.loads((next_folder / "config.json").read_text())
    sizes = {"image_size": 56, "patch_size": 14, "cells": 4}
    want = tuple((rows * 56, columns * 56) for rows, columns in SHAPES)
    del hf_config["image_grid_pinpoints"]
    assert load_tile_processor(next_folder, hf_config, **sizes).pinpoints == want


def test_the_aspect_of_each_family(next_folder, onevision_folder):
    """transformers does not read `vision_aspect_ratio` in LLaVA-NeXT, and has a default in LLaVA-OneVision."""
    hf_config = {"model_type": "llava_next", "vision_aspect_ratio": "anyres_max_4"}
    assert load_tile_processor(next_folder, hf_config, image_size=56, patch_size=14, cells=4).aspect == "anyres"
    sizes = {"image_size": 30, "patch_size": 14, "cells": 2}
    assert LlavaOnevisionConfig().vision_aspect_ratio == "anyres_max_9"
    for stated, want in (({}, "anyres_max_9"), ({"vision_aspect_ratio": "anyres_max_4"}, "anyres_max_4")):
        hf_config = {"model_type": "llava_onevision"} | stated
        assert load_tile_processor(onevision_folder, hf_config, **sizes).aspect == want
        assert load_tile_processor(onevision_folder, hf_config, **sizes, aspect="single").aspect == "single"


def test_folders_without_settings_are_named(next_folder, tmp_path):
    sizes = {"image_size": 56, "patch_size": 14, "cells": 4}
    with pytest.raises(CheckpointError, match="preprocessor_config.json does not exist"):
        load_tile_processor(tmp_path, {"model_type": "llava_next"}, **sizes)
    with pytest.raises(
        CheckpointError, match="model_type 'llava' is not tiled; supported: llava_next, llava_onevision"
    ):
        load_tile_processor(next_folder, {"model_type": "llava"}, **sizes)
    write_next(tmp_path, 56, image_grid_pinpoints=...)
    with pytest.raises(CheckpointError, match="neither .* nor config.json has image_grid_pinpoints"):
        load_tile_processor(tmp_path, {"model_type": "llava_next"}, **sizes)
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_tile_processor(tmp_path, {"model_type": "llava_next"}, **sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pinpoints": ()}, "no image_grid_pinpoints"),
        ({"pinpoints": ((28, 42),)}, r"\[\[28, 42\]\].* multiples of the tile, 28 pixels"),
        ({"cells": None}, "cells=None, tokens=None: give one"),
        ({"tokens": 4}, "cells=2, tokens=4: give one"),
        ({"cells": 0}, "cells=0"),
        ({"patch_size": 30}, "patches of 30 pixels do not fit tiles of 28"),
        ({"aspect": "anyres_max_0"}, "aspect 'anyres_max_0' is not supported; choose anyres, anyres_max_K or single"),
        ({"rounding": "floor"}, "rounding 'floor'"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    fine = {"tile": 28, "patch_size": 14, "pinpoints": ((28, 56),), "mean": (0, 0, 0), "std": (1, 1, 1), "cells": 2}
    TileProcessor(**fine)
    with pytest.raises(ConfigError, match=message):
        TileProcessor(**fine | changes)


@pytest.mark.parametrize("bad", [Image.new("L", (9, 9)), Image.new("RGB", (0, 9))], ids=["grey", "empty"])
def test_pictures_that_cannot_be_cut_are_named(onevision_folder, bad):
    ours = load(onevision_folder, 30, 14)
    for read in (ours.image, ours.single):
        with pytest.raises(DataError, match=f"mode {bad.mode} and {bad.width}x9 pixels: give RGB with an area"):
            read(bad)
