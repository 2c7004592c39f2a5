"""The policy-gradient losses from their published formulas, as loops over Python floats (float64), and cases."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from jaxmem.training.policy import LossConfig

ROWS, TOKENS, MAX_LENGTH = 8, 7, 9
LENGTHS = (7, 1, 4, 0, 6, 3, 7, 2)
TRUNCATED, DEAD = (0, 6), (4, 5)
double = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # jax 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one step, float64: all [R, N] but `advantages` [R]."""

    new: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray

    def rows(self, part: slice) -> Case:
        return Case(*(getattr(self, field.name)[part] for field in dataclasses.fields(self)))


def case(seed: int = 0, without: tuple[int, ...] = (), moved: float = 0.4) -> Case:
    """Ragged rows, one of them empty. `without` rows do not count. `moved` is how far the policy went since sampling,
    as in a second iteration over the same samples."""
    draw = np.random.default_rng(seed)
    mask = np.array([[float(at < length) for at in range(TOKENS)] for length in LENGTHS])
    mask[list(without)] = 0
    old = -draw.exponential(1.5, (ROWS, TOKENS))
    noise = draw.normal(size=(3, ROWS, TOKENS))
    reference = old + 0.3 * noise[1]
    advantages = draw.normal(size=ROWS) * np.where(np.isin(np.arange(ROWS), DEAD), 0, 1)
    return Case(old + moved * noise[0], old, reference, advantages, mask)


SETTINGS = {
    "plain": {},
    "asymmetric": {"clip_low": 0.1, "clip_high": 0.3},
    "dual": {"clip_high": 0.28, "dual_clip": 1.5},
    "kl": {"kl_weight": 0.3},
    "all": {"clip_low": 0.15, "clip_high": 0.25, "dual_clip": 1.6, "kl_weight": 0.1},
}
CASES = {
    "ragged": case(1),
    "truncated": case(2, without=TRUNCATED),
    "dead groups": case(3, without=DEAD),
    "one row": case(4, without=tuple(range(1, ROWS))),
    "on policy": case(5, moved=0.0),
}


def settings(kind: str, name: str) -> LossConfig:
    """`cispo` has one cap for all and no dual clip."""
    chosen = SETTINGS[name]
    if kind == "cispo":
        chosen = {"kl_weight": chosen.get("kl_weight", 0.0), "clip_high": 1.2}
    return LossConfig(kind, **chosen)


def token_loss(config: LossConfig, ratio: float, weight: float, advantage: float, new: float) -> float:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with both bounds apart (DAPO, eq. 8) and, for negative
    advantages, a largest ratio (dual clip, arXiv 1912.09729, eq. 5); or CISPO's (MiniMax-M1, eq. 4 and 5), where
    `weight`, the capped ratio, is a constant."""
    if config.kind == "cispo":
        return -min(weight, config.clip_high) * advantage * new
    high = config.clip_low if config.clip_high is None else config.clip_high
    objective = min(ratio * advantage, min(max(ratio, 1 - config.clip_low), 1 + high) * advantage)
    if config.dual_clip is not None and advantage < 0:
        objective = max(objective, config.dual_clip * advantage)
    return -objective


def row_losses(config: LossConfig, c: Case, frozen: np.ndarray) -> list[list[float]]:
    """Losses of the tokens that count, row by row. `frozen` is `new` where the formula stops the gradient."""
    rows = []
    for row in range(len(c.advantages)):
        at = [t for t in range(c.mask.shape[1]) if c.mask[row, t]]
        difference = [c.new[row, t] - c.old[row, t] for t in at]
        if config.kind == "gspo" and at:  # eq. 7: the geometric mean of the row's ratios
            difference = [sum(difference) / len(at)] * len(at)
        losses = []
        for t, d in zip(at, difference, strict=True):
            weight = math.exp(frozen[row, t] - c.old[row, t])
            loss = token_loss(config, math.exp(d), weight, c.advantages[row], c.new[row, t])
            r = c.reference[row, t] - c.new[row, t]
            losses.append(loss + config.kl_weight * (math.exp(r) - r - 1))  # DeepSeekMath, eq. 4
        rows.append(losses)
    return rows


def oracle(config: LossConfig, c: Case, frozen: np.ndarray | None = None, parts: tuple[slice, ...] = ()) -> float:
    """The loss of a whole step. `parts` are its microbatches: only bnpo's formula knows them."""
    rows = row_losses(config, c, c.new if frozen is None else frozen)
    counted = [losses for losses in rows if losses]
    if config.kind in ("grpo", "gspo"):  # 1/R sum_i 1/|o_i| sum_t
        return sum(sum(losses) / len(losses) for losses in counted) / len(counted)
    if config.kind == "dr_grpo":  # 1/R sum_i 1/L_max sum_t
        return sum(sum(losses) for losses in counted) / (len(counted) * MAX_LENGTH)
    if config.kind == "bnpo":  # the mean over tokens of every microbatch, then over microbatches
        flat = [[x for losses in rows[part] for x in losses] for part in parts or (slice(None),)]
        means = [sum(part) / len(part) for part in flat if part]
        return sum(means) / len(means)
    return sum(sum(losses) for losses in counted) / sum(len(losses) for losses in counted)  # 1/sum|o_i| sum_i sum_t


def slopes(config: LossConfig, c: Case, step: float = 1e-6) -> np.ndarray:
    """[R, N] central differences of the oracle."""
    found = np.zeros_like(c.new)
    for index in np.ndindex(*c.new.shape):
        nudge = np.zeros_like(c.new)
        nudge[index] = step
        up, down = (oracle(config, dataclasses.replace(c, new=c.new + n), c.new) for n in (nudge, -nudge))
        found[index] = (up - down) / (2 * step)
    return found
