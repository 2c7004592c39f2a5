"""Detectors of reward hacking: numbers to watch, not rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PERIODS = 64
_REPEATS = 4
_SPAN = 24


def hack_metrics(
    values: np.ndarray, judges: Sequence[str], completion_ids: Sequence[Sequence[int]], rewards: np.ndarray
) -> dict[str, float]:
    """Signs that a policy earns its reward by other means than right answers.

    Args:
      values: [n, F] rewards by function, NaN where one does not apply.
      judges: what each function looks at: "answer", "form", "both" or "unknown".
      completion_ids: n lists of token ids.
      rewards: [n] total rewards; NaN rows are left out of the correlation.

    Returns:
      hacks/format_only: share of the completions with the right form and the wrong answer, when both are judged.
      hacks/repetition: share of the completions that run in a loop (`loops`).
      hacks/length_correlation: Pearson correlation of length and reward, when both vary.
    """
    found = {"hacks/repetition": float(np.mean([loops(ids) for ids in completion_ids])) if len(completion_ids) else 0.0}
    kinds = np.array(judges)
    form, answer, both = (values[:, kinds == kind] for kind in ("form", "answer", "both"))
    if len(values) and (both.shape[1] or (form.shape[1] and answer.shape[1])):
        formed = (form > 0).any(axis=1) | (both > 0).any(axis=1)
        right = (answer > 0).any(axis=1) | (both >= 0.5).any(axis=1)
        found["hacks/format_only"] = float((formed & ~right).mean())
    lengths = np.array([len(ids) for ids in completion_ids], np.float64)
    known = ~np.isnan(rewards)
    if known.sum() > 1 and np.ptp(lengths[known]) > 0 and np.ptp(rewards[known]) > 0:
        found["hacks/length_correlation"] = float(np.corrcoef(lengths[known], rewards[known])[0, 1])
    return found


def loops(ids: Sequence[int]) -> bool:
    """Does some run of up to 64 tokens occur at least 4 times in a row, over at least 24 tokens?"""
    tokens = np.asarray(ids)
    for period in range(1, min(_PERIODS, len(tokens) // _REPEATS) + 1):
        wanted = max((_REPEATS - 1) * period, _SPAN - period)
        breaks = np.flatnonzero(tokens[period:] != tokens[:-period])
        ends = np.concatenate([[-1], breaks, [len(tokens) - period]])
        if np.diff(ends).max() - 1 >= wanted:
            return True
    return False
