"""The one image loader, and pixels against transformers' PIL image processor."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize

from jaxmem.data.images import ImageError, load_image
from jaxmem.data.pixels import load_image_processor
from jaxmem.errors import CheckpointError
from tests.helpers import write_tokenizer


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_every_source_gives_the_same_picture(tmp_path):
    image = noise(20, 12)
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.asarray(image)
    sources = [path, str(path), f"file://{path}", data, bytearray(data), uri, image, array]
    sources += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), array)


def test_grey_array():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(load_image(grey)), np.repeat(grey[..., None], 3, -1))


def test_colour_and_orientation():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert load_image(encoded(palette)).getpixel((0, 0)) == (9, 8, 7)
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert load_image(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(encoded(Image.new("CMYK", (4, 4)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(noise(8, 4), "JPEG", exif=exif)).size == (4, 8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SECRET = b"SECRET-PAYLOAD" * 9
BAD = {
    "not an image": (SECRET, "not an image"),
    "empty": (b"", "not an image"),
    "truncated": (encoded(noise(64, 64))[:2000], "truncated or corrupt"),
    "bomb, refused by the header": (png_header(30_000, 3_000), "limit of 67108864"),
    "bomb, refused by Pillow": (png_header(60_000, 60_000), "far more than 67108864 pixels"),
    "too wide": (encoded(Image.new("L", (403, 2))), "aspect ratio of 202"),
    "missing": ("no/such/file.png", "there is no file 'no/such/file.png'"),
    "address": ("https://example.org/a.png", "remote address"),
    "other scheme": ("s3://bucket/a.png", "remote address"),
    "bad uri": ("data:image/png,SECRET-PAYLOAD", "data URI must have the form"),
    "bad base64": ("data:image/png;base64,SECRET-PAYLOAD!!", "not valid base64"),
    "float array": (np.zeros((4, 4, 3), np.float32), r"uint8 \[height, width\].* float32 \(4, 4, 3\)"),
    "channel first": (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
    "type": (7, "cannot read int"),
    "32-bit": (Image.new("F", (4, 4)), "convert the image to 8 bits"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_images_name_themselves(case):
    source, message = BAD[case]
    with pytest.raises(ImageError, match=message) as caught:
        load_image(source, "image 3 of row 17")
    assert str(caught.value).startswith("image 3 of row 17")
    assert "SECRET" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_aspect_ratio_of_200_is_the_limit():
    assert load_image(Image.new("RGB", (400, 2))).size == (400, 2)


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (40, 100), (5, 7), (300, 500), (1, 150), (333, 47)])
def test_pixels_equal_transformers(folder, size):
    image = noise(*size)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image])
    ours = load_image_processor(folder)
    patches, grid = ours.image(image)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    np.testing.assert_array_equal(patches, theirs["pixel_values"])
    assert ours.image_grid(size) == grid


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        {"size": {"min_pixels": 4096, "max_pixels": 8192}},
        {"size": {}, "min_pixels": 4096, "max_pixels": 8192},
        {"patch_size": 14, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ],
)
def test_settings_of_the_file_count(tmp_path, settings):
    write_tokenizer(tmp_path, **settings)
    image = noise(90, 50)
    patches, _ = load_image_processor(tmp_path).image(image)
    size = settings.get("size", {})
    low = settings.get("min_pixels", size.get("min_pixels", size.get("shortest_edge")))
    high = settings.get("max_pixels", size.get("max_pixels", size.get("longest_edge")))
    override = {} if low is None else {"size": {"shortest_edge": low, "longest_edge": high}}
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path, **override)
    np.testing.assert_array_equal(patches, theirs(images=[image])["pixel_values"])


def test_pixel_overrides(folder):
    ours = load_image_processor(folder, max_pixels=64 * 64)
    assert np.prod(ours.image_size((500, 300))) <= 64 * 64
    assert np.prod(load_image_processor(folder, min_pixels=128 * 128).image_size((8, 8))) >= 128 * 128
    with pytest.raises(ValueError, match="min_pixels"):
        load_image_processor(folder, max_pixels=10)


def test_unfit_settings_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        load_image_processor(tmp_path)
    write_tokenizer(tmp_path, do_resize=False)
    with pytest.raises(ValueError, match="do_resize=False"):
        load_image_processor(tmp_path)
    write_tokenizer(tmp_path, size={"height": 3})
    with pytest.raises(KeyError, match="min_pixels"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize("frames", [2, 3, 5, 16])
@pytest.mark.parametrize("size", [(64, 48), (20, 200), (1200, 700)])
def test_video_sizes_equal_transformers(folder, frames, size):
    ours = load_image_processor(folder)
    height, width = video_resize(frames, size[1], size[0], 2, 32, ours.video_min_pixels, ours.video_max_pixels)
    assert ours.video_size(size, frames) == (width, height)


def test_a_video_of_equal_frames_is_its_image_repeated(folder):
    ours = load_image_processor(folder)
    image = noise(96, 64)
    patches, grid = ours.video([image] * 3)
    still, (_, rows, columns) = ours.image(image)
    assert grid == (2, rows, columns)
    np.testing.assert_array_equal(patches, np.concatenate([still, still]))


def test_video_patches_hold_frames_in_time_order(folder):
    ours = load_image_processor(folder)
    frames = [noise(64, 64, seed) for seed in range(4)]
    patches, grid = ours.video(frames)
    first = patches.reshape(*grid[:1], -1, 3, 2, 16, 16)  # t, patch, channel, frame, y, x
    for i, frame in enumerate(frames):
        still, _ = ours.image(frame)
        np.testing.assert_array_equal(first[i // 2, :, :, i % 2], still.reshape(-1, 3, 2, 16, 16)[:, :, 0])


def test_bad_videos(folder):
    ours = load_image_processor(folder)
    with pytest.raises(ValueError, match="video 0 of row 4 has 1 frames"):
        ours.video([noise(32, 32)], "video 0 of row 4")
    with pytest.raises(ValueError, match="different sizes"):
        ours.video([noise(32, 32), noise(32, 64)])
