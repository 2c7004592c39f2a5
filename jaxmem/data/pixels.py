"""Pictures to flattened patches: the resize rules and the normalisation of the Qwen-VL family."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmem.data.positions import Grid
from jaxmem.errors import CheckpointError, DataError

VIDEO_PIXELS = (4_096, 25_165_824)  # released budgets, for folders without video_preprocessor_config.json
MAX_FRAMES = 768


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Sizes and statistics of preprocessor_config.json and video_preprocessor_config.json.

    Attributes:
      patch_size: pixels per patch and side.
      temporal_patch_size: frames per patch; a still image is repeated.
      merge_size: patches per visual token and side.
      mean: per channel, in units of 0..1.
      std: per channel.
      min_pixels: a smaller image is enlarged.
      max_pixels: a larger image is reduced.
      video_min_pixels: budget of all frames of a video together, or of each frame.
      video_max_pixels: likewise.
      resample: PIL filter; 3 is bicubic.
      rescale: factor from 8-bit values to 0..1.
      max_frames: a longer video is refused.
      frame_budget: the budget of a video is that of each of its frames (Qwen2-VL, Qwen2.5-VL).
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int = VIDEO_PIXELS[0]
    video_max_pixels: int = VIDEO_PIXELS[1]
    resample: int = 3
    rescale: float = 1 / 255
    max_frames: int = MAX_FRAMES
    frame_budget: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise DataError(f"min_pixels {self.min_pixels} must be positive and at most max_pixels {self.max_pixels}")

    @property
    def factor(self) -> int:
        """Sides of resized images are multiples of this: one visual token covers factor x factor pixels."""
        return self.patch_size * self.merge_size

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after the resize of an image of `size` = (width, height)."""
        return _fit(size, 1, 1, self.factor, self.min_pixels, self.max_pixels)

    def video_size(self, size: tuple[int, int], frames: int) -> tuple[int, int]:
        """(width, height) after the resize of a video of `frames` frames of `size` = (width, height)."""
        if self.frame_budget:
            return _fit(size, 1, 1, self.factor, self.video_min_pixels, self.video_max_pixels)
        scale = max(1.0, self.factor / min(size))
        size = (int(size[0] * scale), int(size[1] * scale))
        rounded = round(frames / self.temporal_patch_size) * self.temporal_patch_size
        return _fit(size, frames, rounded, self.factor, self.video_min_pixels, self.video_max_pixels)

    def image_grid(self, size: tuple[int, int]) -> Grid:
        """Patch grid of an image of `size` = (width, height)."""
        width, height = self.image_size(size)
        return 1, height // self.patch_size, width // self.patch_size

    def image(self, image: Image.Image) -> tuple[np.ndarray, Grid]:
        """Patches [P, C] float32 of one RGB image and its grid."""
        frame = self._pixels(image, self.image_size(image.size))
        return self._patches(np.repeat(frame[None], self.temporal_patch_size, axis=0))

    def video(self, frames: Sequence[Image.Image], where: str = "video") -> tuple[np.ndarray, Grid]:
        """Patches [P, C] float32 of the RGB frames of one video and its grid.

        The last frame is repeated until the temporal patches are full.

        Raises:
          DataError: too few or too many frames, or frames of different sizes.
        """
        if not self.temporal_patch_size <= len(frames) <= self.max_frames:
            raise DataError(
                f"{where} has {len(frames)} frames; between {self.temporal_patch_size} and {self.max_frames} are read: "
                "sample fewer frames, or give a single frame as an image"
            )
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise DataError(f"{where} has frames of different sizes {sorted(sizes)}; resize them alike")
        target = self.video_size(frames[0].size, len(frames))
        pixels = [self._pixels(frame, target) for frame in frames]
        pixels += [pixels[-1]] * (-len(pixels) % self.temporal_patch_size)
        return self._patches(np.stack(pixels))

    def _pixels(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """[height, width, 3] float32, resized and normalised."""
        values = np.asarray(image.resize(size, resample=self.resample)).astype(np.float64) * self.rescale
        return (values.astype(np.float32) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _patches(self, frames: np.ndarray) -> tuple[np.ndarray, Grid]:
        """[F, H, W, 3] to patches in merge-block order, each (channel, frame, row, column) flattened."""
        time, patch, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        count, height, width, channels = frames.shape
        grid = (count // time, height // patch, width // patch)
        split = frames.reshape(
            grid[0], time, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, channels
        )  # t, frame, block row, row, y, block column, column, x, channel
        patches = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1)
        return np.ascontiguousarray(patches), grid


def _fit(
    size: tuple[int, int], frames: int, rounded_frames: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(width, height) in multiples of `factor`, near `size` in shape and within the pixel budget."""
    sides = [round(side / factor) * factor for side in size]
    pixels, total = rounded_frames * math.prod(sides), frames * math.prod(size)
    if pixels > max_pixels:
        shrink = math.sqrt(total / max_pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / total)
        sides = [math.ceil(side * grow / factor) * factor for side in size]
    return sides[0], sides[1]


def load_image_processor(
    folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None, frame_budget: bool = False
) -> ImageProcessor:
    """Reads the image settings of a Hugging Face folder.

    Args:
      folder: holds preprocessor_config.json and perhaps video_preprocessor_config.json.
      min_pixels: replaces the file's lower limit per image.
      max_pixels: replaces the file's upper limit per image.
      frame_budget: videos are sized frame by frame; without a file of their own, like images.

    Returns:
      An ImageProcessor.

    Raises:
      CheckpointError: no preprocessor_config.json, or a setting that is not built.
      KeyError, ValueError: the file lacks a key or asks for something that is not built.
    """
    file = Path(folder) / "preprocessor_config.json"
    settings = _read_json(file)
    if settings is None:
        raise CheckpointError(f"{file} does not exist; copy it from the model's Hugging Face repository")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(key, True) is not True:
            raise CheckpointError(f"{file}: {key}={settings[key]} is not supported; the backbone expects it to be true")
    low, high = _pixel_range(settings, file)
    low, high = low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
    video_file = Path(folder) / "video_preprocessor_config.json"
    video = _read_json(video_file)
    if video is not None and video.get("cap_pixels_per_frame"):
        raise CheckpointError(f"{video_file}: cap_pixels_per_frame is not supported; state max_pixels instead")
    fallback = (low, high) if frame_budget else VIDEO_PIXELS
    video_low, video_high = fallback if video is None else _pixel_range(video, video_file)
    return ImageProcessor(
        patch_size=_key(settings, "patch_size", file),
        temporal_patch_size=_key(settings, "temporal_patch_size", file),
        merge_size=_key(settings, "merge_size", file),
        mean=tuple(_key(settings, "image_mean", file)),
        std=tuple(_key(settings, "image_std", file)),
        min_pixels=low,
        max_pixels=high,
        video_min_pixels=video_low,
        video_max_pixels=video_high,
        resample=settings.get("resample", 3),
        rescale=settings.get("rescale_factor", 1 / 255),
        frame_budget=frame_budget,
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None when there is no such file."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from None


def _key(settings: Mapping[str, Any], key: str, file: Path) -> Any:
    """settings[key], or an error that names the file."""
    if settings.get(key) is None:
        raise KeyError(f"{file} has no {key!r}; library defaults match no released backbone, so state it")
    return settings[key]


def _pixel_range(settings: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """(least, most) pixels: top-level min/max_pixels first, then `size` in either of its spellings."""
    size = settings.get("size") or {}
    found = []
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        choices = [settings.get(name), size.get(edge), size.get(name)]
        value = next((choice for choice in choices if choice is not None), None)
        if value is None:
            raise KeyError(f"{file} has neither {name!r} nor size[{edge!r}]; state the pixel range")
        found.append(int(value))
    return found[0], found[1]
