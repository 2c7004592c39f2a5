"""An encoder of numpy alone, and a process that builds a bank with it slowly, so that it can be killed."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time

import numpy as np

from jaxmem.data.items import Item
from jaxmem.errors import DataError


@dataclasses.dataclass
class HashEncoder:
    """Embeddings that follow from an item's text; a text with "bad" cannot be encoded, one with "nan" has none."""

    digest: str = "e" * 64
    template: str = "t" * 64
    latents: int = 2
    width: int = 24
    delay: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, items):
        self.calls.append([item.id for item in items])
        time.sleep(self.delay)
        if bad := [item.id for item in items if "bad" in item.text]:
            raise DataError(f"item {bad[0]}: its image is corrupt")
        rows = [np.full((self.latents, self.width), np.nan) if "nan" in i.text else self.one(i) for i in items]
        return np.stack(rows).astype(np.float32)

    def one(self, item):
        seed = int.from_bytes(hashlib.sha256(item.text.encode()).digest()[:8], "little")
        return self.scale * np.random.default_rng(seed).normal(size=(self.latents, self.width)).astype(np.float32)


class SizedEncoder(HashEncoder):
    """The same, but it wants items of a like size together."""

    def size(self, item):
        return len(item.text)


def numbered(count, start=0):
    """Items with texts of different lengths; every seventh cannot be encoded."""
    return [Item(f"i{n}", "x" * (n * 5 % 11) + f" {n}" + " bad" * (n % 7 == 3)) for n in range(start, start + count)]


if __name__ == "__main__":
    from jaxmem.retrieval.build import build

    folder, count, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print("started", flush=True)
    options = {"shard_items": 8, "batch": 3, "dtype": dtype, "on_error": "skip"}
    say = lambda done, total: print(done, flush=True)  # noqa: E731
    build(folder, numbered(count), SizedEncoder(delay=0.002), progress=say, **options)
    print("done", flush=True)
