"""Pictures to the normalised tiles of LLaVA-NeXT and LLaVA-OneVision, and to the layout of their tokens.

Everything is resized by PIL in 8 bits before it is normalised, as transformers' PIL processors do.

Axis letters: N tiles of a picture, the thumbnail first; S patches of a tile; C = 3 p p numbers of a patch of side p.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmem.data import anyres
from jaxmem.data.anyres import Layout
from jaxmem.errors import CheckpointError, ConfigError, DataError

SINGLE = "single"
_ASPECT = re.compile(r"anyres(_max_([1-9]\d*))?|single")
_FAMILIES = {  # model_type: what its processor is called, the aspect that transformers assumes
    "llava_next": ("LlavaNextImageProcessor", "anyres"),
    "llava_onevision": ("LlavaOnevisionImageProcessor", "anyres_max_9"),
}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
_NO_DEFAULT = "library defaults match no released backbone, so state it"


@dataclasses.dataclass(frozen=True, eq=False)
class Tiled:
    """One read picture.

    Attributes:
      patches: [N S, C] float32, tile by tile, each tile row by row, each patch as (channel, y, x).
      inside: [N S] bool, True for patches that show some of the picture, not only the bars around it.
      layout: its tokens.
      tiles: N.
      rows: visual rows of its tiles, N N'.
    """

    patches: np.ndarray
    inside: np.ndarray
    layout: Layout
    tiles: int
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileProcessor:
    """How pictures become tiles.

    Attributes:
      tile: pixels per side of a tile, the image size of the vision tower.
      patch_size: p; a tile's pixels beyond the last whole patch are dropped.
      pinpoints: canvases (height, width) to choose from.
      mean: per channel, in units of 0..1.
      std: per channel.
      cells: h', tokens per side of a tile behind the projector; None for a projector without a grid.
      tokens: N' of such a projector; None with a grid.
      aspect: "anyres", "anyres_max_K" (the fine grid's map is scaled down to the tokens of K tiles), or "single": every
        picture is squeezed to one tile.
      rounding: of the unpadding, see `anyres.layout`.
      newline: rows of tokens end with a newline.
      unpad: bars are cut off the fine grid.
      padded_several: several pictures of one chat become one padded tile each (LLaVA-OneVision), instead of being
        tiled each as if it were alone (LLaVA-NeXT).
      resample: PIL filter; 3 is bicubic.
      rescale: factor from 8-bit values to 0..1.
    """

    tile: int
    patch_size: int
    pinpoints: tuple[tuple[int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cells: int | None = None
    tokens: int | None = None
    aspect: str = "anyres"
    rounding: str = "hf"
    newline: bool = True
    unpad: bool = True
    padded_several: bool = False
    resample: int = 3
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        """Checks the settings; raises ConfigError."""
        if not 0 < self.patch_size <= self.tile:
            raise ConfigError(f"patches of {self.patch_size} pixels do not fit tiles of {self.tile}")
        if (self.cells is None) == (self.tokens is None) or (self.cells or self.tokens or 0) < 1:
            raise ConfigError(f"cells={self.cells}, tokens={self.tokens}: give one of them, at least 1")
        if not _ASPECT.fullmatch(self.aspect):
            raise ConfigError(f"aspect {self.aspect!r} is not supported; choose anyres, anyres_max_K or single")
        if self.rounding not in anyres.ROUNDINGS:
            raise ConfigError(f"rounding {self.rounding!r}: choose one of {', '.join(anyres.ROUNDINGS)}")
        if self.max_tiles is not None and self.cells is None:
            raise ConfigError(f"aspect {self.aspect!r} scales a grid of tokens, the projector has none; choose anyres")
        if self.aspect != SINGLE:
            if not self.pinpoints:
                raise ConfigError("no image_grid_pinpoints: give at least one canvas, or choose aspect single")
            anyres.check_pinpoints(self.pinpoints, self.tile)

    @property
    def max_tiles(self) -> int | None:
        """K of anyres_max_K; None for the other aspects."""
        match = re.search(r"\d+", self.aspect)
        return int(match.group()) if match else None

    @property
    def unit(self) -> int:
        """S."""
        return (self.tile // self.patch_size) ** 2

    @property
    def tile_rows(self) -> int:
        """N', visual rows of a tile."""
        return self.cells**2 if self.cells is not None else int(self.tokens or 0)

    def count(self, size: tuple[int, int], *, several: bool = False) -> int:
        """Tokens of a picture of `size` = (width, height), alone or among several of one chat."""
        return self.layout(size, several=several).count

    def layout(self, size: tuple[int, int], *, several: bool = False) -> Layout:
        """The tokens of a picture of `size` = (width, height), alone or among several of one chat.

        Raises:
          DataError: a picture without area.
        """
        if self.aspect == SINGLE or (several and self.padded_several):
            return anyres.single_layout(self.tile_rows, newline=self.newline)
        if self.cells is None:
            return anyres.flat_layout(size, self.tile, self.pinpoints, self.tile_rows, newline=self.newline)
        return anyres.layout(
            size,
            self.tile,
            self.pinpoints,
            self.cells,
            max_tiles=self.max_tiles,
            newline=self.newline,
            unpad=self.unpad,
            rounding=self.rounding,
        )

    def images(self, images: Sequence[Image.Image]) -> list[Tiled]:
        """The RGB pictures of one chat.

        As in transformers, LLaVA-OneVision tiles a picture only if it is the only one of its chat (`single` else), and
        LLaVA-NeXT tiles all.
        """
        read = self.single if self.padded_several and len(images) > 1 else self.image
        return [read(image) for image in images]

    def image(self, image: Image.Image) -> Tiled:
        """One RGB picture that is tiled: the thumbnail, then the canvas. With aspect "single" the thumbnail alone.

        Raises:
          DataError: not RGB, or without area.
        """
        _check(image)
        layout = self.layout(image.size)
        thumbnail = self._cut(image.resize((self.tile, self.tile), resample=self.resample))
        if self.aspect == SINGLE:
            return self._tiled([thumbnail], np.ones((1, self.unit), bool), layout)
        seen = anyres.inside(image.size, self.tile, self.patch_size, self.pinpoints)
        return self._tiled([thumbnail, self._cut(self._canvas(image))], seen, layout)

    def single(self, image: Image.Image) -> Tiled:
        """One RGB picture of several: a square filled with the mean colour, the picture in its middle, as one tile.

        Raises:
          DataError: not RGB, or without area.
        """
        _check(image)
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), tuple(int(255 * value) for value in self.mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        tile = self._cut(square.resize((self.tile, self.tile), resample=self.resample))
        seen = anyres.inside_square(image.size, self.tile, self.patch_size)
        return self._tiled([tile], seen, anyres.single_layout(self.tile_rows, newline=self.newline))

    def _canvas(self, image: Image.Image) -> Image.Image:
        """The picture, its shape kept, in the middle of its black canvas."""
        height, width = anyres.best_resolution(image.size, self.pinpoints)
        left, top, *fitted = anyres.placed(image.size, (height, width))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize((fitted[0], fitted[1]), resample=self.resample), (left, top))
        return canvas

    def _tiled(self, tiles: Sequence[np.ndarray], seen: np.ndarray, layout: Layout) -> Tiled:
        """A picture of normalised tiles; `seen` [N, S] says which patches are inside."""
        return Tiled(np.concatenate(tiles), seen.reshape(-1), layout, len(seen), len(seen) * self.tile_rows)

    def _cut(self, canvas: Image.Image) -> np.ndarray:
        """The normalised patches [N S, C] of the tiles of a canvas."""
        size, p, side = self.tile, self.patch_size, self.tile // self.patch_size
        rows, columns = canvas.height // size, canvas.width // size
        tiles = np.asarray(canvas).reshape(rows, size, columns, size, 3)[:, : side * p, :, : side * p]
        split = tiles.reshape(rows, side, p, columns, side, p, 3)  # tile row, row, y, tile column, column, x, channel
        patches = split.transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, -1, p * p)
        values = [level[channel] for level, channel in zip(self._levels(), patches, strict=True)]
        return np.stack(values, axis=1).reshape(-1, 3 * p * p)

    def _levels(self) -> np.ndarray:
        """[3, 256] float32: what each 8-bit value of a channel is, rescaled and normalised."""
        values = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32)[:, None], np.asarray(self.std, np.float32)[:, None]
        return (values - mean) / std


def load_tile_processor(
    folder: str | Path,
    hf_config: Mapping[str, Any],
    *,
    image_size: int,
    patch_size: int,
    cells: int | None = None,
    tokens: int | None = None,
    aspect: str | None = None,
    rounding: str = "hf",
) -> TileProcessor:
    """Reads the image settings of the Hugging Face folder of a LLaVA-NeXT or LLaVA-OneVision model.

    They stand in preprocessor_config.json, or in the newer processor_config.json under "image_processor", which wins
    where a folder has both, as in transformers.

    Args:
      folder: of the model.
      hf_config: its config.json: `model_type`, `image_grid_pinpoints` and, of LLaVA-OneVision, `vision_aspect_ratio`.
      image_size: pixels per side that the vision tower expects.
      patch_size: of the vision tower.
      cells: tokens per side of a tile behind the projector.
      tokens: of a tile, for a projector without a grid.
      aspect: replaces config.json's; left out there, it is transformers' anyres_max_9, and anyres of LLaVA-NeXT.
      rounding: see `anyres.layout`.

    Returns:
      A TileProcessor.

    Raises:
      CheckpointError: no settings, a setting that is missing or not built, or one that contradicts config.json or the
        vision tower; the message names file and key.
      ConfigError: an aspect, pinpoints or sizes that do not work together.
    """
    kind = hf_config.get("model_type")
    if kind not in _FAMILIES:
        raise CheckpointError(f"{folder}: model_type {kind!r} is not tiled; supported: {', '.join(_FAMILIES)}")
    (name, usual), onevision = _FAMILIES[kind], kind == "llava_onevision"
    stated = hf_config.get("vision_aspect_ratio") if onevision else None
    settings, file = _read_settings(Path(folder))
    _check_steps(settings, file, name)
    _check_sizes(settings, file, image_size, cropped=not onevision)
    return TileProcessor(
        tile=image_size,
        patch_size=patch_size,
        pinpoints=_pinpoints(settings, hf_config, file),
        mean=_channels(settings, "image_mean", file),
        std=_channels(settings, "image_std", file),
        cells=cells,
        tokens=tokens,
        aspect=aspect or stated or usual,
        rounding=rounding,
        padded_several=onevision,
        resample=int(settings.get("resample", 3)),
        rescale=float(settings.get("rescale_factor", 1 / 255)),
    )


def _check(image: Image.Image) -> None:
    """DataError for a picture that cannot be cut."""
    if image.mode != "RGB" or min(image.size) < 1:
        raise DataError(f"an image of mode {image.mode} and {image.width}x{image.height} pixels: give RGB with an area")


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image settings of a folder and the file they stand in."""
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    for file, part in ((newer, "image_processor"), (older, None)):
        content = _read_json(file) if file.is_file() else {}
        settings = content.get(part) if part else content
        if settings:
            return settings, file
    raise CheckpointError(f"{older} does not exist or is empty; copy it from the model's Hugging Face repository")


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _check_steps(settings: Mapping[str, Any], file: Path, name: str) -> None:
    """CheckpointError for another processor, or one with a step left out."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or name
    if not str(kind).startswith(name):
        raise CheckpointError(f"{file}: image_processor_type {kind} is not supported; config.json asks for {name}")
    for key in _STEPS:
        if settings.get(key, True) is not True:
            raise CheckpointError(f"{file}: {key}={settings[key]} is not supported; the backbone expects it to be true")
    for key in ("resample", "rescale_factor"):
        if settings.get(key, 1) is None:
            raise CheckpointError(f"{file}: {key} is null; state it, or leave it out for the usual one")


def _check_sizes(settings: Mapping[str, Any], file: Path, image_size: int, *, cropped: bool) -> None:
    """CheckpointError unless thumbnail and tiles have the size that the vision tower expects.

    transformers resizes the thumbnail to `size`, cuts tiles of `crop_size` (or else `size`), and then once more resizes
    both to `size` and crops them to `crop_size`: where all are equal, the last two steps change nothing.
    """
    for key, required in (("size", True), ("crop_size", cropped)):
        stated = settings.get(key)
        if stated is None and required:
            raise CheckpointError(f"{file} has no {key!r}; {_NO_DEFAULT}")
        edges = set(stated.values()) if isinstance(stated, Mapping) else {stated}
        if stated is not None and edges != {image_size}:
            raise CheckpointError(
                f"{file}: {key} {stated} is not the image_size {image_size} of config.json's vision_config; do the"
                " files belong to the same model?"
            )


def _pinpoints(settings: Mapping[str, Any], hf_config: Mapping[str, Any], file: Path) -> tuple[tuple[int, int], ...]:
    """The canvases on which the image settings and config.json agree."""
    found = {}
    for where, source in ((str(file), settings), ("config.json", hf_config)):
        stated = source.get("image_grid_pinpoints")
        if stated is not None:
            found[where] = tuple((int(height), int(width)) for height, width in stated)
    if not found:
        raise CheckpointError(f"neither {file} nor config.json has image_grid_pinpoints; {_NO_DEFAULT}")
    if len(set(found.values())) > 1:
        told = " and ".join(f"{where} {[list(canvas) for canvas in stated]}" for where, stated in found.items())
        raise CheckpointError(f"image_grid_pinpoints differ: {told}; the tiles would not be those the tokens stand for")
    return next(iter(found.values()))


def _channels(settings: Mapping[str, Any], key: str, file: Path) -> tuple[float, float, float]:
    """Three numbers, or an error that names the file."""
    stated = settings.get(key)
    if stated is None:
        raise CheckpointError(f"{file} has no {key!r}; {_NO_DEFAULT}")
    if not isinstance(stated, Sequence) or len(stated) != 3 or (key == "image_std" and min(stated) <= 0):
        raise CheckpointError(f"{file}: {key} {stated} is not one number per colour (a std above 0)")
    return float(stated[0]), float(stated[1]), float(stated[2])
