"""Does a VisMem on the digit boards carry information, and is it called for where it helps? Around a training stage.

`before` and `after` let the model answer unseen boards greedily, with the image in sight of its text and hidden from it
(visual-key blocking): without memory, with a memory in front of every answer, with memories that carry nothing, and
where the policy calls for them. What was measured is kept in the run's folder as `digit_vismem.json`; over several
seeds `summary` makes one table of it, with a sentence for each claim.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem import config as configs
from jaxmem.api import Model
from jaxmem.data import control
from jaxmem.data.batching import Buckets
from jaxmem.data.boards import BoardDataset
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.memory.vismem import TYPES
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.sampling.slots import text_tokens
from jaxmem.training.prompts import batch_of, columns_of, encoder
from jaxmem.training.rewards.boards import BoardReward
from jaxmem.training.vismem_stages import types_of

KEPT = "digit_vismem.json"
CALLED = "called"
Measured = dict[str, dict[str, float]]
"""{"<seen|hidden>/<condition>": {"read", "short", "long"}}: mean share of cells read, and of answers with a memory."""
SEEN, HIDDEN = "seen", "hidden"


@dataclasses.dataclass(frozen=True)
class DigitVisMem:
    """Settings of the experiment, config.experiment.

    Attributes:
      name: "digit_vismem".
      k: words between image and question.
      boards: how many.
      batch_size: boards that are answered together.
      cells: asked for on each board.
      seed: of the boards.
      max_new_tokens: slots of an answer.
    """

    name: str = "digit_vismem"
    k: int = 0
    boards: int = 128
    batch_size: int = 64
    cells: int = 4
    seed: int = 5
    max_new_tokens: int = 48

    def before(self, model: Model, folder: str | Path) -> None:
        """Measures the model that the stage starts from."""
        if model.spec.vismem is None:
            raise ConfigError("the experiment digit_vismem measures a VisMem, and the model has none")
        _keep(folder, "before", measure(self, model))

    def after(self, model: Model, folder: str | Path, config: Mapping[str, Any]) -> None:
        """Measures the trained model and prints a table of both.

        Raises:
          CheckpointError: `before` left nothing in the folder.
        """
        _keep(folder, "after", measure(self, model))
        print(summary([folder]))


def open_experiment(section: Mapping[str, Any]) -> DigitVisMem:
    """The experiment of config.experiment; ConfigError names an unknown key."""
    return configs.build(DigitVisMem, section, "config.experiment")


def conditions(model: Model) -> dict[str, InvokeConfig]:
    """How memories come: not at all, in front of every answer, without information, where the policy calls."""
    delimiters = control.delimiter_ids(model.processor.tokenizer)
    front = InvokeConfig(mode="random", probability=1.0, delimiters=delimiters, max_invocations=1)
    contents = {name: dataclasses.replace(front, content=name) for name in ("zero", "noise", "shuffle")}
    off, called = InvokeConfig(mode="off"), InvokeConfig(mode="free", max_invocations=1)
    return {"off": off, "memory": front, **contents, CALLED: called}


def measure(settings: DigitVisMem, model: Model) -> Measured:
    """Every condition, on the same boards with the image in sight and hidden."""
    boards = BoardDataset("test", settings.seed, (settings.k,), (settings.cells,), settings.boards, settings.boards)
    every = [(sight, name, invoke) for sight in (SEEN, HIDDEN) for name, invoke in conditions(model).items()]
    return {f"{sight}/{name}": _measured(settings, model, boards, invoke, sight) for sight, name, invoke in every}


def _measured(
    settings: DigitVisMem, model: Model, boards: Sequence[Any], invoke: InvokeConfig, sight: str
) -> dict[str, float]:
    encode, judge, size = encoder(model.processor), BoardReward(read=1.0), settings.batch_size
    sampler = model.sampler(max_new_tokens=settings.max_new_tokens, invoke=invoke)
    read, types, blind = [], [], np.full(size, sight == HIDDEN)
    for start in range(0, len(boards), size):
        some = [boards[i] for i in range(start, min(start + size, len(boards)))]
        prompts = [encode(board) for board in some]
        longest = -(-max(len(prompt.example) for prompt in prompts) // 16) * 16
        batch = batch_of(prompts, Buckets((longest,), (64,)), model.processor.pad_token, size, blind)
        rolled = rollout(model.spec, model.base, model.memory, batch, sampler, jax.random.key(start), 1)
        read += [_score(model, judge, rolled, row, board) for row, board in enumerate(some)]
        types.append(types_of(model.spec.vismem, rolled)[: len(some), 0])  # pyrefly: ignore
    kinds = np.concatenate(types)
    shares = {name: float((kinds == kind).any(axis=-1).mean()) for kind, name in enumerate(TYPES)}
    return {"read": float(np.mean(read)), **shares}


def _score(model: Model, judge: BoardReward, rolled: Rollout, row: int, board: Any) -> float:
    """Share of the cells read in one answer."""
    text = model.processor.decode(text_tokens(rolled.tokens[row, 0], rolled.kinds[row, 0], rolled.lengths[row, 0]))
    columns = columns_of(board)
    return float(judge.score(text, *(columns[name] for name in judge.columns)) or 0.0)


def _keep(folder: str | Path, when: str, found: Measured) -> None:
    path = Path(folder) / KEPT
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**kept, when: found}, indent=1) + "\n", encoding="utf-8")


def read(folder: str | Path) -> dict[str, Measured]:
    """{"before", "after"} of a run; CheckpointError when one is missing."""
    path = Path(folder) / KEPT
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if missing := [when for when in ("before", "after") if when not in kept]:
        raise CheckpointError(f"{path}: the evaluation {' and '.join(missing)} the stage is missing; train again")
    return kept


def summary(folders: Sequence[str | Path]) -> str:
    """A table over several seeds' runs of a stage (mean and sample standard deviation), and what it says."""
    runs = [read(folder) for folder in folders]
    lines = [f"{'image':6s}  {'memory':18s}{'read':>16s}{'answers with one':>18s}"]
    for name in runs[0]["after"]:
        sight, condition = name.split("/")
        rows = [("", "after")] if condition != CALLED else [(", before", "before"), (", after", "after")]
        for label, when in rows:
            reads = [run[when][name]["read"] for run in runs]
            calls = [_share(run[when][name]) for run in runs]
            lines.append(f"{sight:6s}  {condition + label:18s}{spread(reads):>16s}{spread(calls):>18s}")
    return "\n".join([*lines, "", *claims(runs)])


def claims(runs: Sequence[Mapping[str, Measured]]) -> list[str]:
    """One sentence per claim, whatever the outcome; a claim holds when it does in every run."""
    value = lambda name: np.array([run["after"][name]["read"] for run in runs])  # noqa: E731
    calls = lambda sight, when: np.array([_share(run[when][f"{sight}/{CALLED}"]) for run in runs])  # noqa: E731
    gain = lambda sight: value(f"{sight}/memory") - value(f"{sight}/off")  # noqa: E731
    nothing = np.maximum.reduce([value(f"{HIDDEN}/{name}") for name in ("zero", "noise", "shuffle")])
    verdict = lambda holds: "yes" if holds.all() else "no" if not holds.any() else "in some seeds"  # noqa: E731
    more = calls(HIDDEN, "after") - calls(SEEN, "after")
    return [
        f"A memory in front of the answer helps where the image is hidden: {verdict(gain(HIDDEN) > 0)}; it changes"
        f" reading by {spread(gain(HIDDEN), '+')} there and by {spread(gain(SEEN), '+')} where the image is seen.",
        f"It is what the memory says that helps: {verdict(value(f'{HIDDEN}/memory') > nothing)}; the best memory"
        f" without information reads {spread(nothing)}.",
        f"The policy calls more where memory helps: {verdict(more > 0)}; {spread(calls(HIDDEN, 'after'))} of the"
        f" answers have a memory where the image is hidden and {spread(calls(SEEN, 'after'))} where it is seen (before"
        f" Stage II {spread(calls(HIDDEN, 'before'))} and {spread(calls(SEEN, 'before'))}).",
    ]


def _share(one: Mapping[str, float]) -> float:
    """Answers with a memory of either type, where an answer has one at most."""
    return one["short"] + one["long"]


def spread(values: Any, sign: str = "") -> str:
    """Mean +- sample standard deviation; the mean alone of a single value."""
    values = np.asarray(values, float)
    mean = format(values.mean(), f"{sign}.3f")
    return mean if len(values) < 2 else f"{mean} +- {values.std(ddof=1):.3f}"
