"""Rewards of a group of completions to advantages relative to that group (numpy, float64, on the host).

Axis letters: B prompts, G completions of a prompt, F reward functions.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
      scale: what the distance from the group's mean is divided by: the "group"'s standard deviation, the "batch"'s,
        or "none" (arXiv 2503.20783 on why one may not want to).
      aggregate: "sum_then_normalize" adds the weighted rewards of a completion first; "normalize_then_sum" normalises
        each function within its group, adds, and normalises over the batch (GDPO, arXiv 2601.05242).
      eps: added to every standard deviation.
      ddof: 1 for the sample standard deviation, 0 for the population's (VisMem, Eq. 13).
    """

    scale: Literal["group", "batch", "none"] = "group"
    aggregate: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    eps: float = 1e-4
    ddof: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scale", ("group", "batch", "none")),
            ("aggregate", ("sum_then_normalize", "normalize_then_sum")),
            ("ddof", (0, 1)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"advantage.{name}: {getattr(self, name)!r} is none of {', '.join(map(str, allowed))}"
                )
        if self.eps <= 0:
            raise ConfigError(f"advantage.eps must be positive, got {self.eps}: a standard deviation may be 0")


@dataclasses.dataclass(frozen=True)
class Advantages:
    """What the loss needs of the rewards.

    Attributes:
      advantage: [B, G] float64; 0 where no function applied to a completion, and throughout a dead group.
      reward: [B, G] float64 weighted sum of the functions that applied; NaN where none did.
      std: [B] float64 standard deviation of a group's rewards; 0 where fewer than two have one.
      dead: [B] bool, groups without signal: all their rewards are exactly equal.
    """

    advantage: np.ndarray
    reward: np.ndarray
    std: np.ndarray
    dead: np.ndarray


def advantages(config: AdvantageConfig, rewards: np.ndarray, weights: np.ndarray) -> Advantages:
    """Group-relative advantages (arXiv 2402.03300, section 4.1).

    Args:
      config: the rule.
      rewards: [B, G, F], NaN where a function does not apply to a completion. Statistics are of what is there.
      weights: [F].

    Returns:
      Advantages.

    Raises:
      ValueError: shapes do not belong together, or a group of one, which is its own mean.
    """
    rewards, weights = np.asarray(rewards, np.float64), np.asarray(weights, np.float64)
    if rewards.ndim != 3 or weights.shape != rewards.shape[2:]:
        raise ValueError(f"rewards {rewards.shape} and weights {weights.shape} should be [B, G, F] and [F]")
    if rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no relative advantage: its reward is its mean; use at least 2 completions")
    total = weighted(rewards, weights)
    centred, std = _centred(total, config.ddof)
    dead = _constant(total) if config.aggregate == "sum_then_normalize" else np.all(_constant(rewards), axis=-1)
    if config.aggregate == "normalize_then_sum":
        apart, spread = _centred(np.swapaxes(rewards, 1, 2), config.ddof)
        each = np.swapaxes(apart / (spread[..., None] + config.eps), 1, 2)
        mixed, overall = _centred(weighted(each, weights).reshape(1, -1), config.ddof)
        advantage = (mixed / (overall[:, None] + config.eps)).reshape(total.shape)
    elif config.scale == "batch":
        advantage = centred / (_centred(total.reshape(1, -1), config.ddof)[1] + config.eps)
    else:
        advantage = centred if config.scale == "none" else centred / (std[:, None] + config.eps)
    advantage = np.where(dead[:, None] | np.isnan(advantage), 0.0, advantage)
    return Advantages(advantage, total, std, dead)


def weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rewards [..., F] and weights [F] -> [...], the sum of what applies; NaN where nothing does."""
    return np.where(np.isnan(values).all(axis=-1), np.nan, np.nansum(values * weights, axis=-1))


def _centred(values: np.ndarray, ddof: int) -> tuple[np.ndarray, np.ndarray]:
    """[..., n] -> values minus the mean of those that are there, and their standard deviation (0 of fewer than 2)."""
    there = ~np.isnan(values)
    count = there.sum(axis=-1)
    mean = np.nansum(values, axis=-1) / np.maximum(count, 1)
    centred = values - mean[..., None]
    variance = np.nansum(centred**2, axis=-1) / np.maximum(count - ddof, 1)
    return centred, np.where(count > 1, np.sqrt(variance), 0.0)


def _constant(values: np.ndarray) -> np.ndarray:
    """[B, G, ...] -> [B, ...]: are all values of a group that are there equal, to the last bit?"""
    highest = np.where(np.isnan(values), -np.inf, values).max(axis=1)
    lowest = np.where(np.isnan(values), np.inf, values).min(axis=1)
    return np.asarray(highest <= lowest)
