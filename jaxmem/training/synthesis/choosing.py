"""Which questions are asked: seeded, and as many of each source as the mixture says."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmem.data.items import Item, digest
from jaxmem.evaluation.knowledge.benchmarks import BENCHMARKS, prepare
from jaxmem.evaluation.knowledge.prompts import Template
from jaxmem.evaluation.knowledge.questions import Question
from jaxmem.evaluation.knowledge.scoring import Scorer
from jaxmem.training.synthesis.settings import SourceConfig, SynthesisConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question that is asked.

    Attributes:
      key: "<source>/<id>", which no other has.
      source: its name.
      question: itself, under its own id.
      template: how it is asked.
      score: judges replies.
    """

    key: str
    source: str
    question: Question
    template: Template
    score: Scorer

    @property
    def digest(self) -> str:
        """SHA-256 of key, words and the bytes of the images; DataError for one that cannot be read."""
        return digest(Item(self.key, self.question.text, self.question.images))


def choose(config: SynthesisConfig) -> tuple[list[Asked], dict[str, dict[str, Any]]]:
    """The questions to ask, source by source, and the mixture: what was asked for, what there is, what was reached.

    Raises:
      DataError: files that do not fit; see `benchmarks.prepare`.
    """
    read = {name: _read(name, source) for name, source in config.sources.items()}
    sizes = {name: len(questions) for name, questions in read.items()}
    asked = shares(config.sources, sizes, config.total)
    drawn: list[Asked] = []
    mixture = {}
    for name, source in config.sources.items():
        some = draw(read[name], asked[name], config.seed, name)
        drawn += some
        mixture[name] = {
            "benchmark": source.benchmark or name,
            "weight": source.weight,
            "asked": asked[name],
            "available": sizes[name],
            "reached": len(some),
        }
    return drawn, mixture


def _read(name: str, source: SourceConfig) -> list[Asked]:
    benchmark = source.benchmark or name
    questions, score = prepare(benchmark, source.source)
    template = Template(BENCHMARKS[benchmark].style, given=True)
    return [Asked(f"{name}/{one.id}", name, one, template, score) for one in questions.questions]


def shares(sources: Mapping[str, SourceConfig], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Questions to ask of every source.

    Without a total, `count` of each, or all. With one, it is dealt by weight, what is left by the largest remainders
    (of equal ones, to the source whose name comes first), and `count` limits a source's share; what a source cannot
    give, no other makes up for.
    """
    if not total:
        return {name: source.count or sizes[name] for name, source in sources.items()}
    whole = math.fsum(source.weight for source in sources.values())
    exact = {name: total * source.weight / whole for name, source in sources.items()}
    dealt = {name: math.floor(share) for name, share in exact.items()}
    left = total - sum(dealt.values())
    for name in sorted(exact, key=lambda one: dealt[one] - exact[one])[:left]:
        dealt[name] += 1
    return {name: min(share, sources[name].count or share) for name, share in dealt.items()}


def draw(entries: Sequence[Any], count: int, seed: int, name: str) -> list[Any]:
    """`count` of the entries in an order that follows from seed and name: fewer are the first of more."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    order = np.random.default_rng([seed, word]).permutation(len(entries))
    return [entries[at] for at in order[:count]]
