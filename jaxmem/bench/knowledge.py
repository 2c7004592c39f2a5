"""`jaxmem bench comem`: what embeddings of knowledge items save.

Measured are: the Q-Former with the item's keys and values made once, against making them in every pass; questions per
second with K items from a memory bank, against the same questions with the items as text and images in the prompt
(retrieval-augmented generation), on a random Qwen3-VL of about 100 M parameters in float32; and the bank and its index
at a million items (`bank`). Encoding the items is not part of a question: it happens once, offline.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.bench import bank
from jaxmem.bench.models import backbone, prompt
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.items import Item
from jaxmem.data.knowledge import behind_vectors
from jaxmem.memory import q_former
from jaxmem.memory.q_former import Block, Ends, QFormerConfig
from jaxmem.model import Spec
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.build import build
from jaxmem.sampling.generate import generate
from jaxmem.sampling.logits import SamplerConfig

COUNTS = (1, 3, 10, 30)
GRID, TEXT = (16, 16), 48
"""Patches of the question's image, and its words."""
ITEM_GRID, ITEM_TEXT = (16, 16), 128
"""Those of an item: 64 visual tokens and its text, 194 in all (the paper's have about 640)."""
LATENTS = 8


def run(
    config: BackboneConfig | None = None,
    counts: Sequence[int] = COUNTS,
    new: int = 16,
    runs: int = 3,
    compressor: QFormerConfig | None = None,
    items: int = 1_000_000,
) -> list[Comparison]:
    """Measures all three.

    Args:
      config: the backbone; 12 layers of width 768 by default, as in `bench decode`.
      counts: numbers of items K per question.
      new: tokens of an answer.
      runs: rounds.
      compressor: the Q-Former that is measured.
      items: in the bank.
    """
    config = config or backbone(layers=12, width=768, mlp_width=2304, heads=12, kv_heads=4, vocab=16_384)
    compressor = compressor or QFormerConfig(1024, 1024, head_dim=64)
    return [hoisting(compressor, runs), *questions(config, counts, new, runs), *bank.run(items)]


def hoisting(config: QFormerConfig, runs: int, items: int = 4, length: int = 640) -> Comparison:
    """`q_former.compress` against the same passes, each of which makes the item's keys and values anew."""
    params = jax.jit(lambda key: q_former.init(key, config))(jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (items, length, config.in_width))
    valid = jnp.ones((items, length), bool)
    ours = jax.jit(lambda params, hidden: q_former.compress(config, params, hidden, valid))
    theirs = jax.jit(lambda params, hidden: every_pass(config, params, hidden, valid))
    np.testing.assert_allclose(ours(params, hidden), theirs(params, hidden), rtol=0, atol=1e-4)
    sides = {side: lambda work=work: jax.block_until_ready(work(params, hidden)) for side, work in
             (("ours", ours), ("peer", theirs))}  # fmt: skip
    seconds = alternate(sides, runs)
    rates = {side: [items / s for s in taken] for side, taken in seconds.items()}
    first, second = median(rates["ours"]), median(rates["peer"])
    name = "Q-Former, keys made once against every pass"
    return Comparison(name, "items/s", first, second, first / second, "ratio >= 3", rates)


def every_pass(config: QFormerConfig, params: Any, hidden: Array, valid: Array) -> Array:
    """The Q-Former as it is written down: each pass projects the item again. A barrier ties the item to the pass, so
    that the compiler does not make the keys once of its own accord."""
    block, ends = Block(config), {"params": {name: params[name] for name in ("proj_in", "proj_out", "norm_out")}}
    item: Any = Ends(config).apply(ends, hidden, method="enter")

    def one_pass(latents: Array, _: None) -> tuple[Array, None]:
        latents, own = jax.lax.optimization_barrier((latents, item))
        keys = block.apply({"params": params["block"]}, own, method="look")
        return block.apply({"params": params["block"]}, latents, keys, valid), None  # pyrefly: ignore

    start = jnp.broadcast_to(params["latents"], (len(hidden), *params["latents"].shape))
    latents, _ = jax.lax.scan(one_pass, start, length=config.depth)
    return Ends(config).apply(ends, latents, method="leave")  # pyrefly: ignore


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """An encoder of random vectors, to fill a bank: what is in them changes no time."""

    width: int
    latents: int = LATENTS
    digest: str = "bench"
    template: str = "bench"

    def encode(self, items: Sequence[Item]) -> np.ndarray:
        """[n, M, D] float32."""
        return np.random.default_rng(0).normal(size=(len(items), self.latents, self.width)).astype(np.float32)


def questions(config: BackboneConfig, counts: Sequence[int], new: int, runs: int) -> list[Comparison]:
    """One question at a time: from the bank's files to the answer, against the items in the prompt."""
    base = jax.jit(lambda key: qwen3_vl.init(key, config))(jax.random.key(0, impl="rbg"))  # compiles soonest
    with tempfile.TemporaryDirectory(prefix="jaxmem-bench-") as name:
        items = [Item(f"item {n}", f"text {n}") for n in range(max(counts))]
        build(name, items, _Vectors(config.text.width))
        known = Bank.open(Path(name))
        return [_questions(config, base, known, count, new, runs) for count in counts]


def _questions(config: BackboneConfig, base: Any, known: Bank, count: int, new: int, runs: int) -> Comparison:
    spec, settings = Spec(config), SamplerConfig(max_new_tokens=new)
    question = prompt(config, (GRID,), TEXT, seed=0)
    whole = prompt(config, (ITEM_GRID,) * count + (GRID,), TEXT, seed=0, between=ITEM_TEXT)
    ids = [f"item {n}" for n in range(count)]

    def batch(example: Any) -> Batch:
        return collate([example], Buckets((len(example),), (len(example.patches),)))

    def answer(batch: Batch) -> Any:
        return jax.block_until_ready(generate(spec, base, {}, batch, settings, jax.random.key(0)).tokens)

    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: answer(batch(behind_vectors(question, known.get(ids).astype(np.float32), "rank", 0))),
        "peer": lambda: answer(batch(whole)),
    }
    rates = {side: [1 / s for s in taken] for side, taken in alternate(sides, runs).items()}
    first, second = median(rates["ours"]), median(rates["peer"])
    goal = "ratio >= 5" if count == 10 else "grows with the items"
    tokens = f"{len(question) + LATENTS * count} against {len(whole)} tokens"
    return Comparison(f"{count} items, {tokens}", "questions/s", first, second, first / second, goal, rates)
