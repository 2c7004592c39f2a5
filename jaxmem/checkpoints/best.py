"""Which checkpoint is the best: scores of evaluations, their order, and the policy that keeps the best ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmem.errors import ConfigError

AUTOMATIC = ("eval/reward", "eval/accuracy", "eval/loss")
"""What a run is judged by when nothing is said: the first of these that its evaluation has."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The evaluation of one step by the metric that decides.

    Attributes:
      step: that was evaluated.
      metric: its name; lower is better where the name ends in "loss", else higher.
      value: finite.
    """

    step: int
    metric: str
    value: float

    @property
    def goodness(self) -> float:
        """The value, with a sign such that higher is better."""
        return -self.value if self.metric.endswith("loss") else self.value

    def beats(self, other: Score | None) -> bool:
        """Is it better than the best so far? A score by another metric counts as none."""
        return other is None or other.metric != self.metric or self.goodness > other.goodness


def score_of(metric: str, step: int, values: Mapping[str, float]) -> Score | None:
    """The score of an evaluation.

    Args:
      metric: one of the evaluation's names, or "" for the first of `AUTOMATIC` that it has.
      step: that was evaluated.
      values: metrics of the evaluation.

    Returns:
      The score; None where the value is not finite, or nothing was asked for and nothing is known.

    Raises:
      ConfigError: the evaluation has no such metric.
    """
    if metric and metric not in values:
        raise ConfigError(f"loop.best_metric {metric!r} is not among the evaluation's metrics {sorted(values)}")
    name = next((name for name in ((metric,) if metric else AUTOMATIC) if name in values), None)
    if name is None or not math.isfinite(values[name]):
        return None
    return Score(step, name, float(values[name]))


def ranked(scores: Iterable[Score]) -> list[Score]:
    """The scores by the metric of the newest one, best first; of equal ones the earliest first."""
    scores = sorted(scores, key=lambda score: score.step)
    alike = [score for score in scores if score.metric == scores[-1].metric]
    return sorted(alike, key=lambda score: -score.goodness)


class KeepBest:
    """A preservation policy of orbax: the `count` best of the steps that have a score stay.

    Args:
      count: 0 keeps none.
      scores: step to score; the owner adds to it.
    """

    def __init__(self, count: int, scores: Mapping[int, Score]) -> None:
        self._count, self._scores = count, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints stay."""
        del context
        present = [self._scores[info.step] for info in checkpoints if info.step in self._scores]
        best = {score.step for score in ranked(present)[: self._count]}
        return [info.step in best for info in checkpoints]
