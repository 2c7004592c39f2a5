"""Prompts to completions with their rewards: what a step of GRPO knows before it learns.

Axis letters: B prompts, G completions of each, N new tokens, F reward functions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmem.backbones.batch import Batch
from jaxmem.data.batching import Buckets
from jaxmem.data.processor import Processor
from jaxmem.distributed import hosts
from jaxmem.model import Spec
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.sampling.slots import text_tokens
from jaxmem.training.placing import put
from jaxmem.training.prompts import Prompt, batch_of
from jaxmem.training.rewards.runner import RewardRunner, Scored
from jaxmem.training.sft import gates
from jaxmem.training.trees import Tree


@dataclasses.dataclass(frozen=True)
class Played:
    """Groups of completions of B prompts.

    Attributes:
      prompts: B of them.
      names: of their records.
      rolled: arrays [B, G, N].
      blind: [B] bool, prompts whose text could not see the image in the backbone.
      texts: B lists of G completions, decoded.
      rewards: [B, G, F] float64, NaN where a function does not apply or failed.
      scored: one account per call of the reward functions.
      seconds: wall time by phase, "rollout" and "reward".
      extra: what a stage of VisMem played and made beside, [B, G] float64 by name; "shaped" is learnt from instead of
        the weighted rewards.
    """

    prompts: tuple[Prompt, ...]
    names: tuple[str, ...]
    rolled: Rollout
    blind: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    rewards: np.ndarray
    scored: tuple[Scored, ...]
    seconds: dict[str, float]
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def take(self, rows: Sequence[int] | np.ndarray) -> Played:
        """Some of the prompts; the accounts stay whole."""
        index = np.asarray(rows, int)
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in index),
            names=tuple(self.names[i] for i in index),
            rolled=jax.tree.map(lambda leaf: leaf[index], self.rolled),
            blind=self.blind[index],
            texts=tuple(self.texts[i] for i in index),
            rewards=self.rewards[index],
            extra={name: values[index] for name, values in self.extra.items()},
        )

    def __add__(self, other: Played) -> Played:
        return Played(
            self.prompts + other.prompts,
            self.names + other.names,
            jax.tree.map(lambda a, b: np.concatenate([a, b]), self.rolled, other.rolled),
            np.concatenate([self.blind, other.blind]),
            self.texts + other.texts,
            np.concatenate([self.rewards, other.rewards]),
            self.scored + other.scored,
            {phase: seconds + other.seconds[phase] for phase, seconds in self.seconds.items()},
            {name: np.concatenate([values, other.extra[name]]) for name, values in self.extra.items()},
        )


@dataclasses.dataclass(frozen=True)
class Player:
    """Samples completions and has them judged.

    Attributes:
      spec: what samples.
      processor: decodes.
      buckets: lengths that prompts may have.
      rewards: the judges, started; None on hosts other than the first, which judges for all.
      rows: prompts of every batch; fewer are filled up.
      mesh: that the prompts are spread over; None is the default device.
      at_once: prompts that are sampled together; 0 takes all of a batch.
    """

    spec: Spec
    processor: Processor
    buckets: Buckets
    rewards: RewardRunner | None
    rows: int
    mesh: Mesh | None = None
    at_once: int = 0

    def __call__(
        self,
        tree: Tree,
        prompts: Sequence[Prompt],
        names: Sequence[str],
        key: jax.Array,
        settings: SamplerConfig,
        group: int,
        blind: np.ndarray | None = None,
    ) -> Played:
        """Plays one batch.

        Args:
          tree: {"base", "memory"}, the weights that sample.
          prompts: at most `rows`.
          names: of their records.
          key: random key of the batch.
          settings: of the sampling.
          group: completions per prompt.
          blind: [rows] prompts whose text cannot see the image in the backbone.

        Raises:
          RewardError: a reward function failed on every row too many times in a row.
          DataError: prompt and completion do not fit into the backbone's positions.
        """
        began, count = time.perf_counter(), len(prompts)
        blind = np.zeros(self.rows, bool) if blind is None else blind
        batch = batch_of(prompts, self.buckets, self.processor.pad_token, self.rows, blind)
        rolled = jax.tree.map(lambda leaf: leaf[:count], self._sample(tree, batch, settings, key, group))
        texts = tuple(
            tuple(self.processor.decode(text_tokens(*one)) for one in zip(*member, strict=True))
            for member in zip(rolled.tokens, rolled.kinds, rolled.lengths, strict=True)
        )
        sampled = time.perf_counter()
        # Gates may lie on several hosts, so all of them read.
        open_gates = {name: float(value) for name, value in gates(self.spec, tree).items()}
        scored = hosts.once("the rewards", lambda: self._judge(prompts, texts, rolled, open_gates))
        seconds = {"rollout": sampled - began, "reward": time.perf_counter() - sampled}
        rewards = scored.values.reshape(count, group, -1)
        return Played(tuple(prompts), tuple(names), rolled, blind[:count], texts, rewards, (scored,), seconds)

    def _sample(self, tree: Tree, batch: Batch, settings: SamplerConfig, key: jax.Array, group: int) -> Rollout:
        """Completions of a whole batch on the host, a few prompts at a time."""
        size, keys = self.at_once or self.rows, jax.random.split(key, self.rows)
        found = []
        for start in range(0, self.rows, size):
            part = jax.tree.map(lambda leaf, at=start: np.asarray(leaf)[at : at + size], batch)
            some, memory = put(part, self.mesh), tree.get("memory", {})
            found.append(rollout(self.spec, tree["base"], memory, some, settings, keys[start : start + size], group))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def _judge(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], rolled: Rollout, open_gates: dict[str, float]
    ) -> Scored:
        """All completions in one call, [B * G] rows. Diagnostics say how each came about, with the memories' gates."""
        assert self.rewards is not None, "the first host judges"
        group = rolled.tokens.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(group)]
        members = zip(*(_flat(leaf) for leaf in (rolled.tokens, rolled.kinds, rolled.lengths)), strict=True)
        ids = [text_tokens(*member) for member in members]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in repeated] for name in names}
        mean = [
            float(row[:length].mean()) if length else 0.0 for row, length in _members(rolled.logprobs, rolled.lengths)
        ]
        cut = rolled.truncated.reshape(-1).tolist()
        return self.rewards(
            [prompt.messages for prompt in repeated],
            [text for member in texts for text in member],
            ids,
            columns,
            images=[prompt.images for prompt in repeated],
            diagnostics=[
                {"length": len(one), "truncated": end, "mean_logprob": level, "gates": open_gates}
                for one, end, level in zip(ids, cut, mean, strict=True)
            ],
        )


def _flat(leaf: np.ndarray) -> np.ndarray:
    """[B, G, ...] -> [B * G, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])


def _members(values: np.ndarray, lengths: np.ndarray) -> Any:
    """(row [N], length) of every completion."""
    return zip(values.reshape(-1, values.shape[-1]), lengths.reshape(-1).tolist(), strict=True)


def resampled(
    played: Played, dead: Callable[[Played], np.ndarray], again: Callable[[int], Played | None], limit: int
) -> tuple[Played, int]:
    """Replaces groups without signal by those of other prompts (DAPO's dynamic sampling, arXiv 2503.14476, Eq. 11).

    Args:
      played: B groups.
      dead: which groups of a `Played` carry no signal, [B] bool.
      again: plays other prompts, given the number of the attempt from 1 on; None when there are none.
      limit: attempts.

    Returns:
      B groups again, those with signal first, and the number of attempts. Where the limit comes first, groups without
      signal stay.
    """
    wanted, attempt = len(played.prompts), 0
    while attempt < limit and dead(played).any():
        attempt += 1
        more = again(attempt)
        if more is None:
            break
        played = played + more
        order = np.argsort(dead(played), kind="stable")
        played = played.take(order[:wanted])
    return played, attempt
