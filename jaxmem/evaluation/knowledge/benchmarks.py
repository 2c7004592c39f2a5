"""The benchmarks by name: how their files are read, how they are asked and how they are scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from jaxmem import config as configs
from jaxmem.evaluation.knowledge import cvqa, infoseek, mrag, okvqa, oven, scoring, viquae
from jaxmem.evaluation.knowledge.entities import Entities
from jaxmem.evaluation.knowledge.prompts import Style
from jaxmem.evaluation.knowledge.questions import QuestionSet, Source
from jaxmem.evaluation.knowledge.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark; `score` is None where scoring needs files (OVEN's titles)."""

    read: Callable[[Source], QuestionSet]
    style: Style
    score: Scorer | None


BENCHMARKS: Mapping[str, Benchmark] = {
    "infoseek": Benchmark(infoseek.read, "open", scoring.infoseek),
    "oven": Benchmark(oven.read, "open", None),
    "okvqa": Benchmark(okvqa.read, "short", scoring.okvqa),
    "aokvqa": Benchmark(okvqa.read_a, "short", scoring.aokvqa),
    "viquae": Benchmark(viquae.read, "short", scoring.viquae),
    "mrag": Benchmark(mrag.read, "letters", scoring.mrag),
    "cvqa": Benchmark(cvqa.read, "numbers", scoring.cvqa),
    "cvqa_comem": Benchmark(functools.partial(cvqa.read, subsets=cvqa.COMEM), "numbers", scoring.cvqa),
}
"""By name; `cvqa_comem` is CVQA's five subsets that CoMEM reports."""


def prepare(name: str, source: Source) -> tuple[QuestionSet, Scorer]:
    """The questions of a benchmark and what scores replies to them.

    Raises:
      ConfigError: an unknown benchmark.
      DataError: its files do not fit; see the readers.
    """
    benchmark = configs.choose(BENCHMARKS, name, "benchmark")
    questions = benchmark.read(source)
    if benchmark.score is not None:
        return questions, benchmark.score
    entities = Entities(oven.titles(source.annotations))
    known = set(entities.ids)
    lost = sum(known.isdisjoint(question.answers) for question in questions.questions)
    notes = (f"{lost} questions ask for an entity that has no title, and cannot be answered",) if lost else ()
    return dataclasses.replace(questions, notes=(*questions.notes, *notes)), scoring.oven(entities)
