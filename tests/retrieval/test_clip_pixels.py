"""Pictures to pixels against transformers' own image processors, whatever their shape and mode."""

import numpy as np
import pytest
import transformers
from PIL import Image

from jaxmem.data.images import load_image
from jaxmem.errors import CheckpointError
from jaxmem.retrieval.clip_pixels import load_clip_pixels
from tests.backbones.clip_folder import SIDE, edit, write_settings


def noise(width, height, mode="RGB", seed=0):
    """A picture with structure at every scale, so that every filter and offset shows."""
    draw, bands = np.random.default_rng(seed), len(Image.new(mode, (1, 1)).getbands())
    y, x = np.mgrid[:height, :width]
    waves = 90 * np.sin(x / 5 + y / 9)[..., None] + 30 * draw.normal(size=(height, width, bands)) + 127
    values = waves.clip(0, 255).astype(np.uint8)
    return Image.fromarray(values if bands > 1 else values[..., 0], mode=mode)


PICTURES = {
    "wide": noise(97, 40, seed=1),
    "tall": noise(41, 120, seed=2),
    "square": noise(31, 31, seed=3),
    "small": noise(9, 13, seed=4),
    "large": noise(301, 200, seed=5),
    "grey": noise(50, 64, "L", seed=6),
    "clear": noise(64, 50, "RGBA", seed=7),
    "palette": noise(64, 50, seed=8).convert("P", palette=Image.Palette.ADAPTIVE),
}


def theirs_of(processor, image):
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_equal_transformers(tmp_path, kind, name):
    processor = write_settings(f"{kind}_vision", tmp_path)
    ours = load_clip_pixels(tmp_path, kind)(load_image(PICTURES[name]))
    theirs = theirs_of(processor, PICTURES[name])
    assert ours.shape == (SIDE, SIDE, 3) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


SETTINGS = {
    "bilinear": ("siglip", {"resample": 2}),
    "not square": ("siglip", {"size": {"height": 20, "width": 33}}),
    "odd numbers": ("clip", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 1.1, 0.7], "rescale_factor": 0.01}),
    "cut out of more": ("clip", {"size": {"shortest_edge": 40}}),
    "black around": ("clip", {"size": {"shortest_edge": 24}}),
    "no cut": ("clip", {"do_center_crop": False, "size": {"height": 31, "width": 31}}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_equal_transformers(tmp_path, name):
    kind, changed = SETTINGS[name]
    processor = write_settings(f"{kind}_vision", tmp_path, **changed)
    ours = load_clip_pixels(tmp_path, kind)
    for picture in ("wide", "tall", "small"):
        theirs = theirs_of(processor, PICTURES[picture])
        np.testing.assert_allclose(ours(PICTURES[picture]), theirs, rtol=0, atol=1e-6, err_msg=picture)
        assert ours.size == theirs.shape[:2]


def test_files_of_early_and_late_releases_are_read(tmp_path):
    """OpenAI's folders state sizes as numbers and no factor; transformers 5 may put all into processor_config.json."""
    file = tmp_path / "preprocessor_config.json"
    file.write_text(
        '{"size": 31, "crop_size": 31, "do_center_crop": true, "feature_extractor_type": "CLIPFeatureExtractor"}'
    )
    early, theirs = load_clip_pixels(tmp_path, "clip"), transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    np.testing.assert_allclose(early(PICTURES["tall"]), theirs_of(theirs, PICTURES["tall"]), rtol=0, atol=1e-6)
    (tmp_path / "processor_config.json").write_text(f'{{"image_processor": {file.read_text()}}}')
    file.unlink()
    assert load_clip_pixels(tmp_path, "clip") == early
    file.write_text('{"image_processor_type": "SiglipImageProcessor"}')
    bare = transformers.SiglipImageProcessorPil()
    found = load_clip_pixels(tmp_path, "siglip")
    np.testing.assert_allclose(found(PICTURES["wide"]), theirs_of(bare, PICTURES["wide"]), rtol=0, atol=1e-6)
    file.write_text('{"image_processor_type": "CLIPImageProcessor"}')
    bare, found = transformers.CLIPImageProcessorPil(), load_clip_pixels(tmp_path, "clip")
    np.testing.assert_allclose(found(PICTURES["wide"]), theirs_of(bare, PICTURES["wide"]), rtol=0, atol=1e-6)


def test_settings_that_are_not_built_are_refused(tmp_path):
    write_settings("clip_vision", tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    before = settings.read_text()
    for change, message in (
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor is not supported; supported: CLIPImage"),
        ({"do_resize": False}, "do_resize=False is not supported; the towers expect True"),
        ({"size": {"shortest_edge": 31, "longest_edge": 50}}, "give height and width, or shortest_edge alone"),
        ({"crop_size": {"shortest_edge": 31}}, r"crop_size \{'shortest_edge': 31\} must state height and width"),
    ):
        edit(settings, **change)
        with pytest.raises(CheckpointError, match=message):
            load_clip_pixels(tmp_path, "clip")
        settings.write_text(before)
    settings.unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config.json: no such file"):
        load_clip_pixels(tmp_path, "clip")
