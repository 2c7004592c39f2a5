"""`jaxmem bench bank`: how fast a memory bank is written and read, and an index is made and searched.

The items are synthetic: embeddings [8, 64] that cost nothing to make, so that the bank's own work is measured, and
vectors from a mixture of clusters for the index. A search is one query at a time on one thread.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.bench.run import Comparison
from jaxmem.data.items import Item
from jaxmem.retrieval.approximate import ApproximateIndex
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.build import build
from jaxmem.retrieval.exact import ExactIndex

CENTRES, QUERIES, K = 1000, 1000, 10
READ = 10  # items of a question


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Items 0 to count - 1 by number."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Item:
        return Item(f"item {index}", f"text {index}")


@dataclasses.dataclass(frozen=True)
class _Pool:
    """An encoder that cuts embeddings out of a pool of random numbers."""

    latents: int = 8
    width: int = 64
    digest: str = "bench"
    template: str = "bench"

    def encode(self, items: Sequence[Item]) -> np.ndarray:
        """[n, M, D] float32."""
        size = self.latents * self.width
        pool = np.random.default_rng(len(items[0].id)).normal(size=size + 1024).astype(np.float32)
        starts = [int(item.id.rpartition(" ")[2]) % 1024 for item in items]
        return np.stack([pool[start : start + size] for start in starts]).reshape(-1, self.latents, self.width)


def clusters(count: int, width: int, seed: int, centres: int = CENTRES, spread: float = 1.0) -> np.ndarray:
    """[count, width] float32 of length 1: a random centre of length 1, plus noise of about length `spread`."""
    middle = np.random.default_rng(0).normal(size=(centres, width)).astype(np.float32) / math.sqrt(width)
    draw, found = np.random.default_rng((1, seed)), np.empty((count, width), np.float32)
    for start in range(0, count, 1 << 16):
        part = found[start : start + (1 << 16)]
        draw.standard_normal(dtype=np.float32, out=part)
        part *= spread / math.sqrt(width)
        part += middle[draw.integers(centres, size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return found


def measure(count: int = 1_000_000, width: int = 512, queries: int = QUERIES, probes: int = 48) -> dict[str, Any]:
    """Builds and reads a bank of `count` items, makes an index of as many vectors, and searches it.

    Args:
      count: items.
      width: of the vectors.
      queries: searches, from the same mixture.
      probes: of the approximate index.

    Returns:
      Rates per second, sizes in bytes, times in milliseconds, and the share of true neighbours found; see the keys.
    """
    with tempfile.TemporaryDirectory(prefix="jaxmem-bank-") as folder:
        return _bank(Path(folder) / "bank", count) | _index(Path(folder), count, width, queries, probes)


def _bank(folder: Path, count: int) -> dict[str, Any]:
    """The bank's figures; M is 8 and D 64."""
    encoder, seconds = _Pool(), time.perf_counter()
    build(folder, _Numbered(count), encoder, batch=1024)
    built, seconds = time.perf_counter() - seconds, time.perf_counter()
    again = build(folder, _Numbered(count), encoder, batch=1024)
    resumed, seconds = time.perf_counter() - seconds, time.perf_counter()
    bank = Bank.open(folder)
    opened = time.perf_counter() - seconds
    draw = np.random.default_rng(2)
    chosen = [[f"item {n}" for n in draw.integers(count, size=READ)] for _ in range(QUERIES)]
    p50, p99 = _percentiles([_timed(lambda ids=ids: bank.get(ids)) for ids in chosen])
    assert again.present == count, "the bank holds what was put in"
    return {
        "items": count,
        "bank items per second": count / built,
        "bank seconds to look for what is missing": resumed,
        "bank seconds to open": opened,
        "bank bytes per item": sum(file.stat().st_size for file in folder.glob("*.bin")) / count,
        "bank bytes per item, indexes included": sum(file.stat().st_size for file in folder.iterdir()) / count,
        "bank ms to read 10 items, p50": p50,
        "bank ms to read 10 items, p99": p99,
    }


def _index(folder: Path, count: int, width: int, queries: int, probes: int) -> dict[str, Any]:
    """The figures of the approximate index, and its recall against the exact one."""
    import faiss

    ids, vectors, asked = [f"item {n}" for n in range(count)], clusters(count, width, 0), clusters(queries, width, 1)
    seconds = time.perf_counter()
    exact = ExactIndex.create(folder / "exact", ids, vectors, "bench")
    exact_built, seconds = time.perf_counter() - seconds, time.perf_counter()
    known = exact.search(asked, K)
    exact_ms, seconds = (time.perf_counter() - seconds) / queries * 1e3, time.perf_counter()
    made = ApproximateIndex.create(folder / "approximate", ids, vectors, "bench", probes=probes)
    built = time.perf_counter() - seconds
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        made.search(asked[:10], K)
        times, used, found = [], [], []
        for row in range(queries):
            start, before = time.perf_counter(), time.thread_time()
            found += made.search(asked[row : row + 1], K).ids
            times.append((time.perf_counter() - start) * 1e3)
            used.append((time.thread_time() - before) * 1e3)
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = _percentiles(times)
    shared = [len(set(ours) & set(theirs)) / len(theirs) for ours, theirs in zip(found, known.ids, strict=True)]
    size = sum(file.stat().st_size for file in (folder / "approximate").iterdir())
    return {
        "width": width,
        "index items per second": count / built,
        "index seconds": built,
        "index bytes per item": size / count,
        "search ms, p50": p50,
        "search ms, p99": p99,
        "search ms of the processor, p99": _percentiles(used)[1],
        "recall@10": float(np.mean(shared)),
        "exact index items per second": count / exact_built,
        "exact search ms per query of a batch": exact_ms,
    }


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _percentiles(times: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


def run(count: int = 1_000_000, width: int = 512) -> list[Comparison]:
    """`measure` beside its goals and, where there is one, the plain way; all its figures are `runs` of the first."""
    found, first = measure(count, width), f"{count:,} items, "
    pairs = [
        ("search ms, p99", "ms", 10.0, "p99 <= 10 ms"),
        ("recall@10", "share", 0.95, "recall >= 0.95"),
        ("search ms, p50", "ms", found["exact search ms per query of a batch"], "faster than the exact index"),
        ("bank bytes per item, indexes included", "B", found["bank bytes per item"], "little more than the arrays"),
    ]
    compared = [
        Comparison(first + key, unit, found[key], peer, found[key] / peer, goal, {"ours": [found[key]], "peer": [peer]})
        for key, unit, peer, goal in pairs
    ]
    compared[0].runs.update({key: [float(value)] for key, value in found.items()})
    return compared
