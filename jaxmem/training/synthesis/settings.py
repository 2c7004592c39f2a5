"""The configuration of a synthesis as frozen dataclasses: what `configs/comem_synthesis.py` fills in, key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmem import config as configs
from jaxmem.data.batching import Buckets
from jaxmem.errors import ConfigError
from jaxmem.evaluation.knowledge.benchmarks import BENCHMARKS
from jaxmem.evaluation.knowledge.questions import Source
from jaxmem.evaluation.knowledge.shown import Looks

LANGUAGES = ("bg", "zh", "arz", "fil", "fr", "ja", "pt", "ru", "es")
"""Into which the paper translates (section 3.3)."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Questions of one benchmark, of its training split.

    Attributes:
      questions, annotations, images, subset, language: of `evaluation.knowledge.questions.Source`.
      benchmark: a name in `BENCHMARKS`; empty is the source's own name.
      count: at most so many questions; 0 is all.
      weight: share of `SynthesisConfig.total`, relative to the other sources.
    """

    questions: tuple[str, ...]
    annotations: tuple[str, ...] = ()
    images: str | None = None
    subset: str | None = None
    language: str = "en"
    benchmark: str = ""
    count: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 0 or self.weight < 0:
            raise ConfigError(f"count {self.count} and weight {self.weight} of a source must not be negative")

    @property
    def source(self) -> Source:
        """For the benchmark's reader."""
        optional = lambda path: None if path is None else Path(path)  # noqa: E731
        files = tuple(map(Path, self.questions)), tuple(map(Path, self.annotations))
        return Source(*files, optional(self.images), optional(self.subset), 0, self.language)


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """What finds the items of a question.

    Attributes:
      index: folder of an index of the items.
      items: the file with the items.
      embedder: folder of the CLIP or SigLIP that made the index.
      k: items per question; those without a readable image are left out of it.
    """

    index: str
    items: str
    embedder: str
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"retrieval.k {self.k} must be at least 1")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the model answers behind the items. The paper does not say how it sampled.

    Attributes:
      model: Hugging Face folder; empty is the embedded tiny backbone.
      dtype: of the weights; None as stored.
      samples: replies per question; the first right one is kept.
      max_new_tokens, temperature, top_p, repetition_penalty: of the sampler.
      batch_size: replies that are generated together.
      buckets: lengths that prompts may have.
    """

    model: str = ""
    dtype: str | None = None
    samples: int = 1
    max_new_tokens: int = 1000
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    batch_size: int = 8
    buckets: Buckets = Buckets()

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ConfigError(f"rollout: samples {self.samples} and batch_size {self.batch_size} must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"rollout: {self.samples} samples at temperature 0 are all the same; raise it")

    @property
    def decode(self) -> dict[str, Any]:
        """For `Model.generate`."""
        names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Which replies are right.

    Attributes:
      metric: of the benchmark's scorer, its official one.
      threshold: scores from here on are right.
    """

    metric: str = "strict"
    threshold: float = 1.0


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """Some kept samples in other languages.

    Attributes:
      function: "package.module:function", called as function(texts, language) and returning as many texts; empty
        translates nothing.
      languages: of every chosen sample, as the function knows them.
      count: samples that are translated, chosen by the seed.
      batch: samples per call, of two texts each: what the user says and what the model answered.
    """

    function: str = ""
    languages: tuple[str, ...] = LANGUAGES
    count: int = 200
    batch: int = 8

    def __post_init__(self) -> None:
        if self.count < 0 or self.batch < 1:
            raise ConfigError(f"translation: count {self.count} must be at least 0, batch {self.batch} at least 1")
        if len(set(self.languages)) < len(self.languages):
            raise ConfigError(f"translation.languages {self.languages} names one twice")


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """A synthesis.

    Attributes:
      output: its folder.
      sources: {name: section of SourceConfig}, in the order of the names.
      retrieval, rollout, judge, translation: its steps.
      total: questions asked in all, dealt by weight; 0 asks `count` of every source.
      looks: how prompts show images and texts.
      seed: of the choice of questions, of sampling, and of the choice of what is translated.
    """

    output: str
    sources: Mapping[str, Any]
    retrieval: RetrievalConfig
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    translation: TranslationConfig = TranslationConfig()
    looks: Looks = Looks()
    total: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.sources or not self.output:
            raise ConfigError("a synthesis needs an output folder, and sources: {name: {'questions': (...), ...}}")
        built = {
            name: configs.build(SourceConfig, section, f"config.sources.{name}")
            for name, section in sorted(self.sources.items())
        }
        for name, source in built.items():
            configs.choose(BENCHMARKS, source.benchmark or name, "benchmark")
        if self.total < 0 or (self.total and not any(source.weight for source in built.values())):
            raise ConfigError(f"total {self.total} must be at least 0, and some source needs a weight above 0")
        object.__setattr__(self, "sources", built)
