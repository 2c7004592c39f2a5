"""The section `grpo` of a configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmem.errors import ConfigError
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.training.advantages import AdvantageConfig
from jaxmem.training.policy import LossConfig
from jaxmem.training.rewards.settings import RewardConfig
from jaxmem.training.vismem_settings import VisMemStage


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimization; the defaults are those of PVM's second stage (arXiv 2605.00814).

    A step of the run samples `loop.batch_size` prompts, `group` completions each, and makes `iterations` passes over
    them, each of `minibatches` optimizer updates of `loop.accumulate` microbatches.

    Attributes:
      rewards: functions and their limits.
      group: completions per prompt, G.
      max_new_tokens: longest completion, N.
      temperature, top_p, top_k, min_p: of the sampling; log-probabilities are always of the full vocabulary.
      loss: which loss.
      advantage: how rewards become advantages.
      iterations: passes over the completions of a step.
      minibatches: updates per pass; prompts of a step are dealt to them in order.
      mask_truncated: completions that the limit cut off are in no sum and no divisor of the loss; their rewards stay
        in their group's statistics.
      old_logprobs: the sampling policy's log-probabilities: "rollout" as the sampler recorded them, "trainer" as the
        training forward gives them in front of the step (then the first ratio is 1 whatever the dtype).
      prompts_at_once: prompts that are sampled together on each of the mesh's data x fsdp ways, because their caches
        take memory; 0 samples all prompts of a step together.
      resample: further batches of prompts that a step may sample to replace groups without signal; 0 replaces none.
      eval_group: completions per prompt of an evaluation.
      eval_temperature: of an evaluation; 0 takes the most likely tokens.
      samples: prompts whose completions a step writes to `samples.jsonl`.
      samples_every: steps between two such steps.
      vismem: which stage of VisMem the run is; None for every other memory.
    """

    rewards: RewardConfig
    group: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    loss: LossConfig = LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    iterations: int = 1
    minibatches: int = 1
    mask_truncated: bool = True
    old_logprobs: Literal["rollout", "trainer"] = "rollout"
    prompts_at_once: int = 0
    resample: int = 0
    eval_group: int = 1
    eval_temperature: float = 0.0
    samples: int = 2
    samples_every: int = 10
    vismem: VisMemStage | None = None

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ConfigError(
                f"grpo.group is {self.group}: a completion's advantage is relative to its group, which needs at least 2"
            )
        for name in ("iterations", "minibatches", "eval_group", "samples_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"grpo.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("resample", "samples", "prompts_at_once"):
            if getattr(self, name) < 0:
                raise ConfigError(f"grpo.{name} must not be negative, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ConfigError(f"grpo.temperature is {self.temperature}: a group of greedy completions has no spread")
        if self.old_logprobs not in ("rollout", "trainer"):
            raise ConfigError(f"grpo.old_logprobs: {self.old_logprobs!r} is neither 'rollout' nor 'trainer'")

    def sampler(self, plain: SamplerConfig) -> SamplerConfig:
        """`plain` (a model's stop, pad and banned tokens) with the sampling of rollouts."""
        return dataclasses.replace(
            plain,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )
