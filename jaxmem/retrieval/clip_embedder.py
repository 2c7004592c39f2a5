"""Images and texts as unit vectors by CLIP or SigLIP: what an index of knowledge items is searched by.

CoMEM (arXiv 2505.17670, section 3.1) finds items by comparing images with images. The paper never says which CLIP made
its vectors; ViT-B/32 is the usual choice, and what follows from another one is another ranking.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import clip
from jaxmem.backbones.clip_config import ClipConfig
from jaxmem.backbones.clip_text import LEGACY_END
from jaxmem.checkpoints import clip_folder
from jaxmem.data.images import load_image
from jaxmem.errors import CheckpointError, ConfigError, DataError
from jaxmem.retrieval.clip_pixels import ClipPixels, load_clip_pixels

MODES = ("image", "text", "mean")
_TOKENIZER = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "tokenizer_config.json")
_WORKERS = min(8, os.cpu_count() or 1)
_embed_images = jax.jit(clip.embed_images, static_argnums=0)
_embed_texts = jax.jit(clip.embed_texts, static_argnums=0)


class ClipEmbedder:
    """Unit vectors of images, texts and items, by a Hugging Face folder of CLIP or SigLIP.

    The variant is the caller's choice: the paper names none; ViT-B/32 is usual. A folder with a vision tower alone
    embeds images alone.

    Args:
      folder: model types clip, siglip (SigLIP 2 of a fixed resolution too), clip_vision_model, siglip_vision_model;
        config.json, safetensors, preprocessor_config.json, and for texts the tokenizer's files.
      dtype: of weights and activations; the vectors are float32 always.
      mode: what `embed` takes of an item: "image" (CoMEM), "text", or "mean": both vectors added, of length 1 again.
      batch: rows of the largest compiled program; there are two smaller ones, 8 and 1.

    Attributes:
      config: the towers.
      pixels: how pictures become pixels.
      params: weights.
      width: E, numbers per vector.
      digest: SHA-256 of weights, architecture, tokenizer and image settings, as lower-case hexadecimal digits. Vectors
        of equal digests may be compared, but for what `dtype` rounds away.

    Raises:
      CheckpointError: files are missing or do not belong together.
      ConfigError: another model type, or a setting that is not computed.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: Any = jnp.float32,
        *,
        mode: Literal["image", "text", "mean"] = "image",
        batch: int = 64,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode {mode!r} must be one of {', '.join(MODES)}")
        if batch < 1:
            raise ConfigError(f"batch {batch} must be at least 1")
        self.folder, self.mode = Path(folder), mode
        self.config, self.params = clip_folder.load(folder, dtype=dtype)
        self.pixels = load_clip_pixels(folder, self.config.family)
        self.digest = _digest(self.folder, self.config, self.pixels)
        self._sizes = sorted({size for size in (1, 8) if size < batch} | {batch})
        _check(self)
        self.width = self.config.text.out_width if mode == "text" and self.config.text else self.config.width

    def images(self, images: Sequence[Any], names: Sequence[str] | None = None) -> np.ndarray:
        """Vectors of images.

        Args:
          images: whatever `data.images.load_image` reads: paths, bytes, PIL images, arrays.
          names: how errors call them; "image 0", ... when None.

        Returns:
          [n, E] float32.

        Raises:
          ImageError: an image that cannot be read; the message names it.
          ConfigError: a tower without pooling.
        """
        names = [f"image {index}" for index in range(len(images))] if names is None else names
        run = functools.partial(_embed_images, self.config, self.params)
        with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:

            def rows(part: slice) -> np.ndarray:
                return np.stack(list(pool.map(self._pixels, images[part], names[part])))

            return self._batched(run, rows, names, self.config.width)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts.

        A text that is longer than the tower's context (CLIP 77 tokens, SigLIP 64) is cut by the tokenizer, which keeps
        the marks of its start and end; a warning counts those that were and says how long the longest is.

        Args:
          texts: any strings.

        Returns:
          [n, E] float32.

        Raises:
          ConfigError: the folder holds no text tower.
          DataError: not a string.
        """
        names = [f"text {index}" for index in range(len(texts))]
        tokens, run = self.tokens(texts), functools.partial(_embed_texts, self.config, self.params)
        return self._batched(run, tokens.__getitem__, names, self.config.text.out_width if self.config.text else 0)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """[n, T] int32 of texts, each padded to, or cut at, the tower's context T; errors as in `texts`."""
        config = self.config.text
        if config is None:
            raise ConfigError(f"{self.folder}: {self.config.model_type} holds no text tower; use the whole model")
        if wrong := [f"text {index} is {text!r}" for index, text in enumerate(texts) if not isinstance(text, str)]:
            raise DataError(f"{wrong[0]}; texts are strings")
        if not len(texts):
            return np.zeros((0, config.positions), np.int32)
        found = self._tokenizer(list(texts), truncation=True, max_length=config.positions, padding="max_length")
        tokens = np.asarray(found["input_ids"], np.int32)
        if config.end_token not in (None, LEGACY_END) and not np.all(np.any(tokens == config.end_token, axis=1)):
            raise CheckpointError(f"{self.folder}: the tokenizer does not end texts with token {config.end_token}")
        self._report_cut(texts, config.positions)
        return tokens

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        """Vectors of items by their images, their text or both, as `mode` says.

        Args:
          items: objects with `.images` (a sequence, of which all count alike: their vectors are added, of length 1
            again) and `.text`; `.id`, if there is one, is what errors call them.

        Returns:
          [n, E] float32.

        Raises:
          DataError: an item that lacks what the mode needs.
          ImageError: an image that cannot be read.
        """
        names = [f"item {getattr(item, 'id', index)}" for index, item in enumerate(items)]
        for item, name in zip(items, names, strict=True):
            if self.mode != "text" and not len(item.images or ()):
                raise DataError(f'{name} has no image, which mode "{self.mode}" needs; leave it out or use mode "text"')
            if self.mode != "image" and not (item.text or "").strip():
                raise DataError(f'{name} has no text, which mode "{self.mode}" needs; leave it out or use mode "image"')
        if self.mode == "text":
            return self.texts([item.text for item in items])
        seen = self._item_images(items, names)
        return seen if self.mode == "image" else _unit(seen + self.texts([item.text for item in items]), names)

    def _item_images(self, items: Sequence[Any], names: Sequence[str]) -> np.ndarray:
        """[n, E], the images of each item together."""
        counts = [len(item.images) for item in items]
        labels = [f"image {at} of {name}" for name, count in zip(names, counts, strict=True) for at in range(count)]
        vectors = self.images([image for item in items for image in item.images], labels)
        if len(vectors) == len(items):
            return vectors
        return _unit(np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]])), names)

    def _pixels(self, image: Any, name: str) -> np.ndarray:
        """[height, width, 3] of one image."""
        return self.pixels(load_image(image, name))

    def _batched(
        self, run: Callable[[Any], Any], rows: Callable[[slice], np.ndarray], names: Sequence[str], width: int
    ) -> np.ndarray:
        """`run` over `rows(part)`, part by part; the device computes one while the host makes the next."""
        found, left = [], None
        for start in range(0, len(names), self._sizes[-1]):
            made = rows(slice(start, start + self._sizes[-1]))
            size = next(size for size in self._sizes if size >= len(made))
            padded = np.concatenate([made, np.zeros((size - len(made), *made.shape[1:]), made.dtype)])
            found += [] if left is None else [np.asarray(left[0])[: left[1]]]
            left = run(padded), len(made)
        found += [] if left is None else [np.asarray(left[0])[: left[1]]]
        vectors = np.concatenate([np.zeros((0, width), np.float32), *found])
        if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            raise DataError(f"{names[wrong[0]]}: its vector is not finite; try dtype float32")
        return vectors

    def _report_cut(self, texts: Sequence[str], context: int) -> None:
        """Warns of texts that do not fit."""
        lengths = [len(ids) for ids in self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        if cut := sum(length > context for length in lengths):
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than {context} tokens and were cut (the longest has"
                f" {max(lengths)}); shorten or split them",
                stacklevel=4,
            )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """The folder's tokenizer."""
        return _load_tokenizer(self.folder, self.config.text.vocab if self.config.text else 0)


def _load_tokenizer(folder: Path, vocab: int) -> Any:
    """A folder's tokenizer, padding on the right; `vocab` is the number of tokens that the tower knows."""
    import transformers  # heavy: only when texts are embedded

    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model into it")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, padding_side="right"
        )
    except Exception as error:  # of many kinds: ImportError, ValueError, and Exception itself from tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        pieces = (folder / "spiece.model").is_file() and importlib.util.find_spec("sentencepiece") is None
        if isinstance(error, ImportError) or pieces:
            advice = "SigLIP's needs sentencepiece: pip install 'jaxmem[retrieval]'"
            raise ConfigError(f"{folder}: cannot load the tokenizer ({reason}); {advice}") from error
        raise CheckpointError(f"{folder}: cannot load the tokenizer ({reason}); copy its files anew") from error
    if len(tokenizer) > vocab:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the tower {vocab}")
    return tokenizer


def _check(embedder: ClipEmbedder) -> None:
    """Settings that do not fit together."""
    config, side = embedder.config, embedder.config.vision.image_size
    if embedder.pixels.size != (side, side):
        raise CheckpointError(
            f"{embedder.folder}: preprocessor_config.json makes images of {embedder.pixels.size or 'any shape'}, the"
            f" tower sees {side}x{side}; do config.json and preprocessor_config.json belong to the same model?"
        )
    if embedder.mode != "text" and config.pool == "none":
        raise ConfigError(f"{embedder.folder}: vision_use_head is false, so its tower gives no vectors of images")
    if embedder.mode != "image" and config.text is None:
        raise ConfigError(
            f'{embedder.folder}: {config.model_type} holds no text tower, which mode "{embedder.mode}" needs'
        )
    if embedder.mode == "mean" and config.text and config.text.out_width != config.width:
        raise ConfigError(f"{embedder.folder}: images have {config.width} numbers and texts {config.text.out_width}")


def _digest(folder: Path, config: ClipConfig, pixels: ClipPixels) -> str:
    """SHA-256 of what vectors depend on."""
    settings = [dataclasses.asdict(config), dataclasses.asdict(pixels)]
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    names = _TOKENIZER if config.text else ()
    for file in [
        *sorted(folder.glob("*.safetensors")),
        *(folder / name for name in names if (folder / name).is_file()),
    ]:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _unit(vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[n, E] of length 1. Raises DataError for vectors that cancelled out."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(wrong := np.flatnonzero(lengths[:, 0] < 1e-6)):
        raise DataError(f"{names[wrong[0]]}: its vectors cancel out; it has no direction to be found by")
    return vectors / lengths
