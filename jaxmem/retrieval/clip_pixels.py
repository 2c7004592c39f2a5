"""Pictures as CLIP and SigLIP want them: resized, cut, in numbers of mean 0; by a folder's preprocessor_config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmem.checkpoints.weights import read_json
from jaxmem.errors import CheckpointError

_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_COMMON = {"resample": 3, "rescale_factor": 1 / 255}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"clip": _CLIP | _COMMON, "siglip": _SIGLIP | _COMMON}
"""What a file leaves out, as transformers defined it."""


@dataclasses.dataclass(frozen=True)
class ClipPixels:
    """How a picture becomes pixels.

    Attributes:
      shortest_edge: the shorter side after the resize, which keeps the shape; None for a resize to `resized`.
      resized: (height, width) after the resize, whatever the shape; None for one to `shortest_edge`.
      crop: (height, width) cut out of the middle, black where the picture is smaller; None cuts nothing.
      mean, std: per channel, in units of 0..1.
      resample: PIL filter; 2 is bilinear, 3 bicubic.
      rescale: factor from 8-bit values to 0..1.
    """

    shortest_edge: int | None
    resized: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    rescale: float = 1 / 255

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every result; None when it depends on the picture."""
        return self.crop or self.resized

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[height, width, 3] float32 of an RGB picture."""
        image = image.resize(self._target(image), resample=self.resample)
        if self.crop:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values = (np.asarray(image).astype(np.float64) * self.rescale).astype(np.float32)
        return (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) after the resize; the longer side is rounded down."""
        if self.resized:
            return self.resized[1], self.resized[0]
        short, long = sorted(image.size)
        edge = self.shortest_edge or short
        stretched = int(edge * long / short)
        return (edge, stretched) if image.width <= image.height else (stretched, edge)


def load_clip_pixels(folder: str | Path, family: str) -> ClipPixels:
    """Reads `preprocessor_config.json`, or the image settings in the `processor_config.json` of newer releases.

    Args:
      folder: of a model.
      family: "clip" or "siglip": what a size of one number means, and what the file leaves out.

    Raises:
      CheckpointError: no such file, the settings of another processor, or one that is not built.
    """
    file = Path(folder) / "preprocessor_config.json"
    newer = file.with_name("processor_config.json")
    if not file.is_file() and newer.is_file():
        file, stated = newer, read_json(newer).get("image_processor") or {}
    else:
        stated = read_json(file)
    _check(stated, file)
    settings = {**DEFAULTS[family], **{key: value for key, value in stated.items() if value is not None}}
    resized = _size(settings["size"], family == "siglip", file, "size")
    crop = _size(settings["crop_size"], True, file, "crop_size") if settings["do_center_crop"] else None
    if isinstance(crop, int):
        raise CheckpointError(f"{file}: crop_size {settings['crop_size']} must state height and width")
    return ClipPixels(
        shortest_edge=resized if isinstance(resized, int) else None,
        resized=None if isinstance(resized, int) else resized,
        crop=crop,
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        resample=int(settings["resample"]),
        rescale=float(settings["rescale_factor"]),
    )


def _check(settings: Mapping[str, Any], file: Path) -> None:
    """CheckpointError for a processor, or a step of one, that is not built."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIP"
    if not str(kind).lower().startswith(("clip", "siglipim")):
        raise CheckpointError(f"{file}: {kind} is not supported; supported: CLIPImageProcessor, SiglipImageProcessor")
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("do_pad", False)):
        if settings.get(key, wanted) not in (wanted, None):
            raise CheckpointError(f"{file}: {key}={settings[key]} is not supported; the towers expect {wanted}")


def _size(stated: Any, square: bool, file: Path, key: str) -> int | tuple[int, int]:
    """A shortest edge, or (height, width); `square` says which of them one number is."""
    if isinstance(stated, int):
        return (stated, stated) if square else stated
    if isinstance(stated, Mapping) and set(stated) == {"height", "width"}:
        return int(stated["height"]), int(stated["width"])
    if isinstance(stated, Mapping) and set(stated) == {"shortest_edge"}:
        return int(stated["shortest_edge"])
    raise CheckpointError(f"{file}: {key} {stated} is not supported; give height and width, or shortest_edge alone")
