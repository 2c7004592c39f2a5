"""Grey pictures: items, questions, an embedder that finds the nearest grey, and a bank and an index of the items."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmem.data.batching import Buckets
from jaxmem.data.images import load_image
from jaxmem.data.items import ItemFile
from jaxmem.evaluation.knowledge.questions import Question
from jaxmem.retrieval.build import build
from jaxmem.retrieval.index import create_index

BUCKETS = Buckets(tokens=(256, 512, 1024), patches=(64, 128), item_tokens=(96,), item_patches=(32,))
WORDS = ("fox", "dog", "street", "number", "animal", "wizard")
GREYS = (50, 20, 60, 10, 30, 40)
ASKED = (12, 58, 33, 44)


@dataclasses.dataclass
class Shades:
    """A vector from the grey of an image; `reads`: also from the number that is a text."""

    digest: str = "s" * 64
    width: int = 2
    reads: bool = False

    def __post_init__(self) -> None:
        self.calls = 0
        if self.reads:
            self.texts = lambda texts: np.stack([self.one(float(text)) for text in texts])

    def embed(self, items):
        self.calls += 1
        return np.stack([self.one(np.asarray(load_image(item.images[0], item.id)).mean()) for item in items])

    def one(self, grey):
        return np.array([np.cos(grey / 200), np.sin(grey / 200)], np.float32)


def picture(folder, grey, size=(64, 64)):
    path = Path(folder) / f"{grey}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return str(path)


def write_items(folder):
    """A file of items, the greys of their pictures 10 apart."""
    rows = [
        {"id": f"g{grey}", "text": f"the {word} is {grey}", "image": picture(folder / "known", grey)}
        for grey, word in zip(GREYS, WORDS, strict=True)
    ]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ItemFile(path)


def write_index(folder, items, name="index"):
    vectors = Shades().embed([items[at] for at in range(len(items))])
    return create_index("exact", folder / name, items.ids, vectors, Shades().digest)


def write_bank(folder, items, encoder, name="bank"):
    build(folder / name, items, encoder, batch=2)
    return folder / name


def question(folder, grey, **others):
    path = picture(folder / "asked", grey)
    return Question(
        f"q{grey}", f"what is {grey}?", (path,), (str(grey),), "all", "open", (), {"language": "en"} | others
    )
