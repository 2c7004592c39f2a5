"""The reward of VisMem's second stage (arXiv 2511.11007, equation 8), on the host in numpy.

Each trajectory of a group has, beside its own score, that of its reverse (same prompt and random keys, every
invocation's type swapped) and that of a base trajectory without memory. Axis letters: B prompts, G trajectories.
"""

from __future__ import annotations

import numpy as np


def penalties(scores: np.ndarray, reverse: np.ndarray, invoked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a trajectory loses for the wrong memory type, and for being worse than its group.

    Args:
      scores: [B, G] S; NaN where no judge applied.
      reverse: [B, G] S_rev; read only where a trajectory invoked, so it may be NaN elsewhere.
      invoked: [B, G] bool, did the trajectory invoke memory at all?

    Returns:
      p_type = max(0, S_rev - S), 0 without invocation, and p_neg = max(0, mean of the group - S), both [B, G] float64.
      The mean is that of the scores that are there; NaN where a score that is needed is missing.

    Raises:
      ValueError: shapes differ.
    """
    scores, reverse, invoked = (
        np.asarray(scores, np.float64),
        np.asarray(reverse, np.float64),
        np.asarray(invoked, bool),
    )
    if scores.ndim != 2 or reverse.shape != scores.shape or invoked.shape != scores.shape:
        raise ValueError(f"scores {scores.shape}, reverse {reverse.shape}, invoked {invoked.shape} should be [B, G]")
    there = np.maximum((~np.isnan(scores)).sum(axis=1, keepdims=True), 1)
    mean = np.nansum(scores, axis=1, keepdims=True) / there
    return np.where(invoked, np.maximum(0.0, reverse - scores), 0.0), np.maximum(0.0, mean - scores)


def stage2_reward(
    scores: np.ndarray,
    base: np.ndarray,
    reverse: np.ndarray,
    invoked: np.ndarray,
    alpha: float = 0.3,
    gate_penalties: bool = False,
) -> np.ndarray:
    """R = S - S_base - alpha * (p_type + p_neg), to be normalised within the group (`advantages`, ddof 0).

    Args:
      scores, reverse, invoked: [B, G] as for `penalties`.
      base: S_base, [B] one base trajectory for the group, or [B, G] one for each trajectory. The first is a constant
        of the group and cancels in the advantages.
      alpha: weight of the penalties.
      gate_penalties: trajectories without invocation have no penalty at all; False is the paper's equation.

    Returns:
      [B, G] float64; NaN where a score that is needed is missing, which `advantages` takes for no reward.

    Raises:
      ValueError: shapes do not belong together.
    """
    p_type, p_neg = penalties(scores, reverse, invoked)
    base = np.asarray(base, np.float64)
    if base.shape not in (p_type.shape, p_type.shape[:1]):
        raise ValueError(f"base {base.shape} should be [B] or [B, G] = {p_type.shape}")
    if gate_penalties:
        p_neg = np.where(invoked, p_neg, 0.0)
    return np.asarray(scores, np.float64) - base.reshape(len(base), -1) - alpha * (p_type + p_neg)
