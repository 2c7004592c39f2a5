"""Does a CoMEM carry facts that exist in knowledge items alone? Around the training of a memory.

`after` lets the model answer unseen questions about one item each (`jaxmem.data.facts`) greedily: without items (the
bare backbone), with the embeddings of the question's items, with those of another question's, and with embeddings of
zeros. What was measured is kept in the run's folder as `digit_facts.json`; over several seeds `summary` makes one table
of it, with a sentence for each claim.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem import config as configs
from jaxmem.analysis.digit_vismem import spread
from jaxmem.api import Model
from jaxmem.data.batching import Buckets
from jaxmem.data.facts import Fact, FactDataset
from jaxmem.errors import CheckpointError, ConfigError

KEPT = "digit_facts.json"
CONDITIONS = ("off", "memory", "shuffled", "zero")
CHANCE = 0.1
Measured = dict[str, dict[str, float]]
"""{"<items>/<condition>": {"exact", "read"}}: shares of answers that are wholly right, and whose digit is."""


@dataclasses.dataclass(frozen=True)
class DigitFacts:
    """Settings of the experiment, config.experiment.

    Attributes:
      name: "digit_facts".
      items: numbers of items per question, each measured.
      questions: how many for each.
      batch_size: questions that are answered together.
      seed: of the questions.
      max_new_tokens: tokens of an answer.
    """

    name: str = "digit_facts"
    items: tuple[int, ...] = (1, 2, 3, 5, 10)
    questions: int = 256
    batch_size: int = 64
    seed: int = 5
    max_new_tokens: int = 8

    def before(self, model: Model, folder: str | Path) -> None:
        """Nothing is measured of a memory that does not exist yet."""
        if model.spec.comem is None:
            raise ConfigError("the experiment digit_facts measures a CoMEM, and the model has none")

    def after(self, model: Model, folder: str | Path, config: Mapping[str, Any]) -> None:
        """Measures the trained model and prints a table."""
        found = measure(self, model)
        (Path(folder) / KEPT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(summary([folder]))


def open_experiment(section: Mapping[str, Any]) -> DigitFacts:
    """The experiment of config.experiment; ConfigError names an unknown key."""
    return configs.build(DigitFacts, section, "config.experiment")


def measure(settings: DigitFacts, model: Model) -> Measured:
    """Every condition, on the same questions."""
    found: Measured = {}
    for count in settings.items:
        facts = FactDataset("test", settings.seed, (count,), size=settings.questions)
        rows = [facts[i] for i in range(len(facts))]
        vectors = _vectors(model, rows, settings.batch_size)
        for condition in CONDITIONS:
            texts = _answers(settings, model, rows, vectors, condition)
            found[f"{count}/{condition}"] = score(texts, rows)
    return found


def score(texts: Sequence[str], rows: Sequence[Fact]) -> dict[str, float]:
    """Shares of answers that are wholly right, and that give the digit of the item that is asked for."""
    pairs = list(zip(texts, rows, strict=True))
    read = [text.startswith(f"{fact.items[fact.asked[0]].text}{fact.digits[0]}") for text, fact in pairs]
    return {"exact": float(np.mean([text == fact.answer for text, fact in pairs])), "read": float(np.mean(read))}


def _vectors(model: Model, rows: Sequence[Fact], batch: int) -> np.ndarray:
    """[rows, K, M, D], every item encoded once."""
    flat = model.encode_items([item for row in rows for item in row.items], batch=batch, buckets=Buckets((16,), (4,)))
    return flat.reshape(len(rows), -1, *flat.shape[1:])


def _answers(
    settings: DigitFacts, model: Model, rows: Sequence[Fact], vectors: np.ndarray, condition: str
) -> list[str]:
    """One answer per question."""
    given = {"memory": vectors, "shuffled": np.roll(vectors, 1, axis=0), "zero": np.zeros_like(vectors)}.get(condition)
    chats = [row.question for row in rows]
    texts: list[str] = []
    for start in range(0, len(rows), settings.batch_size):
        some = slice(start, start + settings.batch_size)
        items = None if given is None else list(given[some])
        done = model.generate(chats[some], items=items, max_new_tokens=settings.max_new_tokens, buckets=_BUCKETS)
        texts += [one.text for one in done]
    return texts


_BUCKETS = Buckets((32, 64, 96, 128, 256), (4,))


def read(folder: str | Path) -> Measured:
    """What a run measured; CheckpointError when it did not."""
    path = Path(folder) / KEPT
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: the run did not end with the experiment digit_facts")
    return json.loads(path.read_text(encoding="utf-8"))


def summary(folders: Sequence[str | Path]) -> str:
    """A table over several seeds' runs (mean and sample standard deviation), and what it says."""
    runs = [read(folder) for folder in folders]
    counts = sorted({int(name.split("/")[0]) for name in runs[0]})
    values = lambda count, condition: np.array([run[f"{count}/{condition}"]["exact"] for run in runs])  # noqa: E731
    lines = ["items  " + "".join(f"{condition:>18s}" for condition in CONDITIONS)]
    for count in counts:
        lines.append(f"{count:5d}  " + "".join(f"{spread(values(count, one)):>18s}" for one in CONDITIONS))
    worst = np.min([values(count, "memory") for count in counts], axis=0)
    best = np.max([values(count, one) for count in counts for one in ("off", "shuffled", "zero")], axis=0)
    verdict = lambda holds: "yes" if holds.all() else "no" if not holds.any() else "in some seeds"  # noqa: E731
    return "\n".join(
        [
            *lines,
            "",
            f"With memory at least 95 % of the answers are right, with {counts[0]} to {counts[-1]} items:"
            f" {verdict(worst >= 0.95)}; the least is {spread(worst)}.",
            f"Without the right items the model is at chance ({CHANCE:g}, and 0.06 more by luck): "
            f"{verdict(best <= CHANCE + 0.06)}; the most that it answers without items, with another question's or with"
            f" zeros is {spread(best)}.",
        ]
    )
