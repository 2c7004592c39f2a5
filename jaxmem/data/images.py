"""The one image loader: whatever a data set calls an image becomes an 8-bit RGB picture, or an error that names it."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxmem.errors import DataError

MAX_SOURCE_PIXELS = 2**26  # stays below Pillow's own limit, which remains on
MAX_SOURCE_BYTES = 2**28
MAX_ASPECT_RATIO = 200

_DATA_URI = re.compile(r"data:[^,;]*(;[^,;]*)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BROKEN = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageError(DataError):
    """An image that cannot be used. The message names the image and where it came from, and never its bytes."""


def load_image(source: Any, where: str = "image", *, max_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """Reads one image.

    Turned upright by its EXIF tag, transparency on white, palettes, CMYK and 16-bit greys as 8-bit RGB.

    Args:
      source: a path, encoded bytes, a base64 data URI, a PIL image, a uint8 array [H, W] or [H, W, 3], or the
        {"bytes": ..., "path": ...} of Hugging Face datasets.
      where: how errors call the image, e.g. "image 3 of row 17".
      max_pixels: refuse larger pictures; read from the header, before anything is decoded.

    Returns:
      A PIL image in mode RGB.

    Raises:
      ImageError: not an image, a remote address, truncated, too many pixels, or an aspect ratio over 200.
    """
    image, origin = _open(source, where)
    _check_size(image.size, f"{where} ({origin})", max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image), f"{where} ({origin})")
    except _BROKEN:
        raise ImageError(f"{where} ({origin}): the file is truncated or corrupt; save it anew") from None


def _open(source: Any, where: str) -> tuple[Image.Image, str]:
    """The image with only its header read, and words that say where it came from."""
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        return source, "a PIL image"
    if isinstance(source, np.ndarray):
        return _from_array(source, where), f"an array {source.shape}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), where, f"{len(source)} bytes")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode(_from_data_uri(source, where), where, "a data URI")
    if isinstance(source, (str, os.PathLike)):
        return _read(os.fspath(source), where)
    raise ImageError(
        f"{where}: cannot read {type(source).__name__}; give a path, bytes, a data URI, a PIL image or a uint8 array"
    )


def _read(path: str, where: str) -> tuple[Image.Image, str]:
    """Opens a local file; addresses are refused."""
    path = path.removeprefix("file://")
    if _SCHEME.match(path):
        raise ImageError(
            f"{where}: {path[:100]!r} is a remote address, which is never fetched; download the file first"
        )
    file, origin = Path(path), path[:300]
    try:
        if not file.is_file():
            raise ImageError(f"{where}: there is no file {origin!r}; check the path and the image folder")
        return _decode(file.read_bytes() if file.stat().st_size <= MAX_SOURCE_BYTES else None, where, origin)
    except OSError as error:
        raise ImageError(f"{where}: cannot read {origin!r} ({error.strerror})") from None


def _from_data_uri(uri: str, where: str) -> bytes:
    """The bytes of `data:image/...;base64,...`."""
    head = _DATA_URI.match(uri)
    if head is None:
        raise ImageError(f"{where}: the data URI must have the form data:image/png;base64,...")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{where}: the data URI is not valid base64") from None


def _decode(data: bytes | None, where: str, origin: str) -> tuple[Image.Image, str]:
    """Reads the header of an encoded image; `None` stands for a file over the byte limit."""
    if data is None or len(data) > MAX_SOURCE_BYTES:
        raise ImageError(f"{where} ({origin}): larger than {MAX_SOURCE_BYTES} bytes; save it smaller")
    try:
        return Image.open(io.BytesIO(data)), origin
    except UnidentifiedImageError:
        raise ImageError(f"{where} ({origin}): not an image; PNG, JPEG, WebP, GIF, BMP and TIFF are read") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{where} ({origin}): far more than {MAX_SOURCE_PIXELS} pixels; resize it first") from None
    except (*_BROKEN, ValueError):
        raise ImageError(f"{where} ({origin}): the file is truncated or corrupt; save it anew") from None


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    """A grey or RGB picture from [H, W] or [H, W, 3] uint8."""
    colour = array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (array.ndim == 2 or colour) or 0 in array.shape:
        raise ImageError(
            f"{where}: an array must be uint8 [height, width] or [height, width, 3], got {array.dtype} {array.shape}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Pixel cap and aspect ratio, from the header alone."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}x{height} pixels is empty")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels are more than the limit of {max_pixels}; resize it first")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(
            f"{name}: {width}x{height} pixels have an aspect ratio of {max(size) / min(size):.0f}; "
            f"the limit is {MAX_ASPECT_RATIO}, crop it or cut it into pieces"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB; what is transparent becomes white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: pixels of mode {image.mode} have no fixed range; convert the image to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
