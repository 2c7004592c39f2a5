"""How questions and items look in a prompt: sizes of images, lengths of texts, and which of an item's parts are there.

CoMEM's released scripts treat the images of questions in four ways (arXiv 2505.17670, inference code): here they are
rules by name, and one of them holds for a whole evaluation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from jaxmem import config as configs
from jaxmem.data.images import load_image
from jaxmem.data.items import Item, some
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.questions import Question

_POOLED = 100  # the released MRAG-Bench loader: pixels that a picture is wide at most


def _squash(image: Image.Image, side: int) -> Image.Image:
    """A square of `side` pixels where an edge is longer, as items become in CoMEM's encoder."""
    return _square(image, side) if max(image.size) > side else image


def _square(image: Image.Image, side: int) -> Image.Image:
    """A square of `side` pixels."""
    return image.resize((side, side), resample=Image.Resampling.LANCZOS)


def _pool(image: Image.Image, side: int) -> Image.Image:
    """Means of 2 x 2 pixels, again and again, until the width is at most 100 pixels."""
    while image.width > _POOLED:
        image = image.reduce(2)
    return image


RULES: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "squash": _squash,
    "square": _square,
    "stored": lambda image, side: image,
    "pooled": _pool,
}
"""What becomes of a question's image: "squash" to a square where an edge is too long (InfoSeek, OK-VQA, A-OKVQA, CVQA),
"square" always (ViQuAE), as "stored" (OVEN), "pooled" down to 100 pixels of width (MRAG-Bench)."""


@dataclasses.dataclass(frozen=True)
class Looks:
    """How prompts show things.

    Attributes:
      images: rule of a question's images, of `RULES`.
      side: pixels of the squares that "squash" and "square" make, of items' images too.
      text_limit: characters of an item's text.
    """

    images: str = "squash"
    side: int = 512
    text_limit: int = 5000

    def __post_init__(self) -> None:
        configs.choose(RULES, self.images, "rule for the images of questions")
        if self.side < 1 or self.text_limit < 1:
            raise ConfigError(f"side {self.side} and text_limit {self.text_limit} must be at least 1")

    def question(self, question: Question) -> Question:
        """The question with pictures as they are shown; ImageError for one that cannot be read."""
        read = [
            load_image(source, f"image {at} of question {question.id}") for at, source in enumerate(question.images)
        ]
        return dataclasses.replace(question, images=tuple(RULES[self.images](image, self.side) for image in read))

    def item(self, item: Item) -> Item:
        """An item with pictures and text as a prompt shows them; ImageError for a picture that cannot be read."""
        read = [load_image(source, f"image {at} of item {item.id!r}") for at, source in enumerate(item.images)]
        return Item(item.id, item.text[: self.text_limit], tuple(_squash(image, self.side) for image in read))


def gaps(items: Sequence[Item]) -> dict[str, str]:
    """Which items lack a part: {"without_text": "2: 'a', 'b'", "without_image": ...}, each only where there are any.

    Raises:
      DataError: names the items whose image files are not there.
    """
    lost = [f"{item.id!r} ({path})" for item in items for path in item.images if not _there(path)]
    if lost:
        raise DataError(f"no file for {len(lost)} image(s) of items: {some(lost)}; restore them, or build without them")
    lacking = {
        "without_text": [repr(item.id) for item in items if not item.text.strip()],
        "without_image": [repr(item.id) for item in items if not item.images],
    }
    return {name: f"{len(ids)}: {some(ids)}" for name, ids in lacking.items() if ids}


def _there(source: Any) -> bool:
    """Is an image's file there? Whatever is no path is; addresses are for `load_image` to refuse."""
    if not isinstance(source, str) or source.startswith("data:") or "://" in source:
        return True
    return os.path.isfile(source)
