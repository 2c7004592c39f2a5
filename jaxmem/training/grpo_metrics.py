"""What a step of GRPO says of itself, under the names that TRL made common; samples and events for people.

Axis letters: A microbatches, B prompts, G completions of each, N new tokens, F reward functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.data.images import load_image
from jaxmem.distributed import hosts
from jaxmem.training.advantages import Advantages, weighted
from jaxmem.training.grpo import Samples
from jaxmem.training.playing import Played
from jaxmem.training.policy import PolicySums
from jaxmem.training.rewards.hacks import hack_metrics
from jaxmem.training.rewards.scored import means
from jaxmem.training.rewards.settings import RewardConfig

_THUMBNAIL = 160
THUMBNAILS = "samples"


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What the updates of a step left.

    Attributes:
      sums: of the loss, one per update.
      about: metrics of `descent.descend`, one per update.
      before: the first minibatch [A, B, ...] and its log-probabilities and entropies [A, B, G, N] in front of the
        first update.
    """

    sums: Sequence[PolicySums]
    about: Sequence[Mapping[str, Any]]
    before: tuple[Samples, Any, Any]


def of_rewards(played: Played, config: RewardConfig) -> dict[str, float]:
    """reward, rewards/<function>/..., completions/..., hacks/... of some groups."""
    rewards = weighted(played.rewards, np.asarray(config.weights)).reshape(-1)
    given = rewards[~np.isnan(rewards)]
    found = {"reward": _mean(given), "reward_std": float(given.std(ddof=1)) if len(given) > 1 else 0.0}
    found |= means(config.labels, _rows(played.rewards))
    for label in config.labels:
        for kind in ("errors", "timeouts"):
            failed = sum(getattr(scored, kind)[label] for scored in played.scored)
            found[f"rewards/{label}/{kind[:-1]}_rate"] = failed / sum(len(scored.values) for scored in played.scored)
    judges = [reward.function.judges for reward in config.rewards]
    ids = [
        row[:length] for row, length in zip(_rows(played.rolled.tokens), played.rolled.lengths.reshape(-1), strict=True)
    ]
    hacks = hack_metrics(_rows(played.rewards), judges, ids, rewards)
    return {**found, **of_lengths(played), **hacks}


def of_lengths(played: Played) -> dict[str, float]:
    """completions/... in tokens; the terminated ones are those that ended by themselves."""
    lengths, cut = played.rolled.lengths.reshape(-1), played.rolled.truncated.reshape(-1)
    found = {"completions/clipped_ratio": _mean(cut), "completions/empty_ratio": _mean(lengths == 0)}
    for name, values in (("", lengths), ("terminated_", lengths[~cut])):
        found |= {f"completions/{kind}_{name}length": value for kind, value in _extent(values).items()}
    return found


def of_step(
    played: Played, compared: Advantages, learnt: Learnt, attempts: int, config: RewardConfig
) -> dict[str, float]:
    """All metrics of a training step but its times; one transfer from the devices."""
    part, logprobs, entropies = learnt.before
    wanted = (learnt.sums, learnt.about, part.mask, part.old, logprobs, entropies)
    sums, about, mask, old, logprobs, entropies = hosts.fetch(wanted)
    totals = {name: float(sum(getattr(one, name) for one in sums)) for name in PolicySums._fields}
    tokens = max(totals["tokens"], 1.0)
    counted = np.asarray(mask) > 0
    gap = np.abs(np.asarray(logprobs) - np.asarray(old))[counted]
    finite = all(bool(one["finite"]) for one in about)
    losses = [float(one.loss) / max(float(one.denominator), 1.0) for one in sums]
    return {
        **of_rewards(played, config),
        "frac_reward_zero_std": _mean(compared.dead),
        "loss": _mean(losses),
        "grad_norm": _mean([float(one["grad_norm"]) for one in about]),
        "lr": float(about[-1]["lr"]),
        "kl": totals["kl"] / tokens,
        "entropy": _mean(np.asarray(entropies)[counted]),
        "clip_ratio/low_mean": totals["clipped_low"] / tokens,
        "clip_ratio/high_mean": totals["clipped_high"] / tokens,
        "clip_ratio/region_mean": (totals["clipped_low"] + totals["clipped_high"]) / tokens,
        "sampling/sampling_logp_difference/mean": _mean(gap),
        "sampling/sampling_logp_difference/p99": float(np.quantile(gap, 0.99)) if gap.size else 0.0,
        "sampling/sampling_logp_difference/max": float(gap.max(initial=0.0)),
        "tokens": float(played.rolled.lengths.sum()),
        "tokens_in_loss": float(counted.sum()),
        "num_tokens": float(played.rolled.lengths.sum()) + sum(len(p.example) for p in played.prompts),
        "groups_resampled": float(attempts),
        "no_signal": float(not any(bool(one["updated"]) for one in about) and finite),
        "skipped": float(not finite),
    }


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """time/<phase>: shares of the step's wall time, and step_time in seconds."""
    total = sum(seconds.values())
    return {"step_time": total, **{f"time/{phase}": value / max(total, 1e-9) for phase, value in seconds.items()}}


def events(played: Played, compared: Advantages, no_signal: bool) -> list[dict[str, Any]]:
    """What went differently from what a user may expect, by name: failed rewards, empty completions, no signal."""
    found: list[dict[str, Any]] = [
        {"event": "reward_failed", "detail": message} for scored in played.scored for message in scored.messages
    ]
    empty = int((played.rolled.lengths == 0).sum())
    if empty:
        found.append({"event": "empty_completions", "count": empty})
    if no_signal:
        reason = "all rewards are equal within every group"
        if not compared.dead.all():
            reason = "all completions of the groups with a signal were cut off or judged by no function"
        found.append({"event": "no_signal", "detail": f"{reason}; nothing was learnt"})
    return found


def sample(played: Played, compared: Advantages, row: int, labels: Sequence[str]) -> dict[str, Any]:
    """One prompt with all its completions, as JSON."""
    rolled = played.rolled
    return {
        "name": played.names[row],
        "prompt": played.prompts[row].text,
        "completions": [
            {
                "text": text,
                "tokens": int(rolled.lengths[row, member]),
                "truncated": bool(rolled.truncated[row, member]),
                "reward": _number(compared.reward[row, member]),
                "advantage": float(compared.advantage[row, member]),
                "rewards": {
                    label: _number(value) for label, value in zip(labels, played.rewards[row, member], strict=True)
                },
            }
            for member, text in enumerate(played.texts[row])
        ],
    }


def thumbnail(images: Sequence[Any], folder: Path, name: str) -> str | None:
    """Writes a small PNG of the first image below `folder` and returns its path relative to it; None without images."""
    if not images:
        return None
    picture = load_image(images[0])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    path = folder / THUMBNAILS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return str(path.relative_to(folder))


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else 0.0


def _extent(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
