"""What VisMem's stages add to a step of GRPO: where memories come, what else is played, and what is rewarded.

Axis letters: B prompts, G completions of each, N slots, I memories of a completion, M vectors of the longer memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmem.data import control
from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory.vismem import TYPES, VisMemConfig
from jaxmem.sampling import splicing
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import Rollout
from jaxmem.sampling.slots import Slot
from jaxmem.sampling.splicing import Spliced
from jaxmem.training.advantages import weighted
from jaxmem.training.playing import Played
from jaxmem.training.prompts import Prompt
from jaxmem.training.vismem_rewards import penalties, stage2_reward
from jaxmem.training.vismem_settings import VisMemStage

Again = Callable[[SamplerConfig, int], Played]
"""again(settings, group): the same prompts with the same random keys, sampled otherwise."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage in a run.

    Attributes:
      settings: of the stage.
      config: of the memory.
      delimiters: ids of tokens that end with a delimiter.
      steps: length of the run.
      anywhere: probability of a memory behind any token, in the second part of Stage I.
    """

    settings: VisMemStage
    config: VisMemConfig
    delimiters: tuple[int, ...]
    steps: int
    anywhere: float

    def sampler(self, plain: SamplerConfig, done: int) -> SamplerConfig:
        """The sampling of the step after `done` others."""
        if self.settings.stage == "invocation":
            return self._with(plain, mode="free")
        if done < self.settings.anywhere_from * self.steps:
            return self._with(plain, mode="random", anywhere=False, delimiters=self.delimiters)
        return self._with(plain, mode="random", anywhere=True, probability=self.anywhere)

    def trials(self, plain: SamplerConfig) -> dict[str, SamplerConfig]:
        """The sampling of an evaluation ("") and of its controls: in Stage II as the policy calls, in front of it a
        memory behind every delimiter, as many as there may be."""
        memory = self._with(plain, mode="free")
        if self.settings.stage != "invocation":
            memory = self._with(plain, mode="random", anywhere=False, probability=1.0, delimiters=self.delimiters)
        found = {"": memory}
        for name in self.settings.controls:
            change: dict[str, Any] = {"mode": "off"} if name == "off" else {"content": name}
            invoke = dataclasses.replace(memory.invoke, **change)
            found[name] = dataclasses.replace(memory, invoke=invoke)
        return found

    def _with(self, plain: SamplerConfig, **changes: Any) -> SamplerConfig:
        return dataclasses.replace(plain, invoke=dataclasses.replace(self.settings.invoke, **changes))

    def rewarded(self, played: Played, weights: np.ndarray, sampler: SamplerConfig, again: Again) -> Played:
        """The groups with what the stage rewards: S - S_base, and in Stage II the penalties (Eq. 7 and 8)."""
        scores, invoked = weighted(played.rewards, weights), invocations(played.rolled) > 0
        group, extra = scores.shape[1], {}
        base = np.zeros(scores.shape)
        if self.settings.baseline != "none":
            off = self._with(sampler, mode="off")
            bare = again(off, 1 if self.settings.baseline == "shared" else group)
            base = np.broadcast_to(weighted(bare.rewards, weights), scores.shape)
            extra["base"] = base
        if self.settings.stage != "invocation":
            return dataclasses.replace(played, extra={**extra, "shaped": scores - base})
        reverse = np.full(scores.shape, np.nan)
        if invoked.any():
            reverse = weighted(again(self._with(sampler, mode="free", reverse=True), group).rewards, weights)
        p_type, p_neg = penalties(scores, reverse, invoked)
        shaped = stage2_reward(scores, base, reverse, invoked, self.settings.penalty, self.settings.gate_penalties)
        return dataclasses.replace(played, extra={**extra, "p_type": p_type, "p_neg": p_neg, "shaped": shaped})

    def spliced(self, rolled: Rollout) -> Spliced:
        """Where the memories of a rollout stand."""
        assert rolled.permits is not None, "memories were off"
        return splicing.locate(
            self.config, rolled.tokens, rolled.kinds, rolled.permits, self.settings.invoke.max_invocations
        )


def open_stage(
    settings: VisMemStage, config: VisMemConfig | None, processor: Processor, prompts: Sequence[Prompt], steps: int
) -> Stage:
    """A stage of a run.

    Args:
      settings: of the stage.
      config: the model's memory.
      processor: knows which tokens are delimiters.
      prompts: some of the dataset, with reference answers, to learn how frequent delimiters are.
      steps: length of the run.

    Raises:
      ConfigError: the model has no VisMem, or `probability_anywhere` cannot be derived.
    """
    if config is None:
        raise ConfigError('grpo.vismem trains a VisMem, and the model has none; set memory={"name": "vismem"}')
    delimiters = settings.invoke.delimiters or control.delimiter_ids(processor.tokenizer)
    anywhere = settings.probability_anywhere
    if not anywhere and settings.stage == "memory" and settings.anywhere_from < 1:
        answers = [prompt.answer for prompt in prompts if prompt.answer]
        if not answers:
            raise ConfigError(
                "grpo.vismem.probability_anywhere is 0 and no record has an answer to count delimiters in; set it"
            )
        share = np.mean(np.isin(np.concatenate([np.asarray(a) for a in answers]), delimiters))
        anywhere = float(settings.invoke.probability * share)
    return Stage(settings, config, tuple(delimiters), steps, anywhere)


def invocations(rolled: Rollout) -> np.ndarray:
    """[B, G] invocation tokens of each completion."""
    return np.isin(rolled.kinds, (Slot.FORCED, Slot.INVOKE)).sum(axis=-1)


def types_of(config: VisMemConfig, rolled: Rollout) -> np.ndarray:
    """[B, G, N] int8: 0 and 1 at short and long invocation tokens, -1 elsewhere."""
    invoking = np.isin(rolled.kinds, (Slot.FORCED, Slot.INVOKE))
    types = np.where(rolled.tokens == config.invoke_ids[1], 1, 0)
    return np.where(invoking, types, -1).astype(np.int8)


def metrics(config: VisMemConfig, played: Played) -> dict[str, float]:
    """vismem/...: memories per completion and share with one, by type, and means of what was played beside."""
    types, found = types_of(config, played.rolled), {}
    for kind, name in enumerate(TYPES):
        count = (types == kind).sum(axis=-1)
        found |= {
            f"vismem/{name}_per_completion": float(count.mean()),
            f"vismem/{name}_share": float((count > 0).mean()),
        }
    for name, values in played.extra.items():
        if name != "shaped" and not np.isnan(values).all():
            found[f"vismem/{name}"] = float(np.nanmean(values))
    return found


def references(
    config: VisMemConfig, prompts: Sequence[Prompt], key: jax.Array, limit: int, pad: int, settings: VisMemStage
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The warm-up's continuations: reference answers with a memory of random type in front, or at a random place.

    Args:
      config: of the memory.
      prompts: B prompts with answers.
      key: decides types and places, and which rows are bare.
      limit: slots of a continuation, N.
      pad: token of memory slots and padding.
      settings: `bare` is the share of rows without a memory; `invoke.anywhere` puts memories at random places.

    Returns:
      tokens [B, 1, N] int32, kinds [B, 1, N] int8, lengths [B, 1] int32.

    Raises:
      DataError: a prompt has no answer, or one that does not fit.
    """
    kinds = np.zeros((len(prompts), 1, limit), np.int8)
    tokens = np.full(kinds.shape, pad, np.int32)
    lengths = np.zeros(kinds.shape[:2], np.int32)
    types = np.asarray(jax.random.bernoulli(key, 0.5, (len(prompts),))).astype(int)
    plain = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), (len(prompts),))) < settings.bare
    places = np.asarray(jax.random.uniform(jax.random.fold_in(key, 2), (len(prompts),))) * settings.invoke.anywhere
    for row, (prompt, kind) in enumerate(zip(prompts, types, strict=True)):
        if not prompt.answer:
            raise DataError("grpo.vismem.stage 'warm_up' learns from reference answers, and a record has none")
        size, answer = config.sizes[kind], prompt.answer
        invoke, end = (config.invoke_ids[kind], Slot.FORCED), (config.end_ids[kind], Slot.END)
        slots, place = [(token, Slot.TEXT) for token in answer], int(places[row] * len(answer))
        if not plain[row]:
            slots[place:place] = [invoke, *[(pad, Slot.MEMORY)] * size, end]
        if len(slots) > limit:
            raise DataError(
                f"a memory of {size} vectors and an answer of {len(answer)} tokens exceed grpo.max_new_tokens {limit};"
                " raise it"
            )
        lengths[row, 0] = len(slots)
        tokens[row, 0, : len(slots)], kinds[row, 0, : len(slots)] = zip(*slots, strict=True)
    return tokens, kinds, lengths
