"""GRPO as a step of the loop: play, judge, compare within groups, learn, and say what happened.

Axis letters: U minibatches, A microbatches, B prompts, G completions of each, N new tokens, F reward functions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.data.batching import Buckets
from jaxmem.data.pipeline import Pipeline, Rows, blind_rows
from jaxmem.distributed import hosts
from jaxmem.distributed.mesh import constrain_weights
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.slots import Slot
from jaxmem.training import descent, grpo, grpo_metrics, loop, trees, vismem_stages
from jaxmem.training.advantages import Advantages, advantages
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.grpo import Samples
from jaxmem.training.grpo_settings import GRPOConfig
from jaxmem.training.loop import LoopConfig
from jaxmem.training.placing import place
from jaxmem.training.playing import Played, Player, resampled
from jaxmem.training.prompts import batch_of
from jaxmem.training.trees import Tree
from jaxmem.training.vismem_stages import Stage

INVOCATIONS = "invocations.npz"


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything that a step needs beside its state; `step` is what the loop drives.

    Attributes:
      config: of the method.
      loop: rows, microbatches and blindfolds.
      seed: of blindfolds and resampled prompts.
      player: samples and judges.
      sampler: of the rollouts.
      data: the dataset, for prompts that replace others.
      update: from `grpo.make_update`.
      score: compiled, from `grpo.make_score`.
      cast: trainable -> the weights that sample.
      frozen: the tree that does not train.
      reference: trainable tree of the reference policy; None where the loss has no divergence.
      report: further metrics of the trainable tree, such as gates.
      folder: for samples and events.
      mesh: devices.
      stage: of VisMem, or None.
    """

    config: GRPOConfig
    loop: LoopConfig
    seed: int
    player: Player
    sampler: SamplerConfig
    data: Pipeline
    update: Callable[..., Any]
    score: Callable[..., Any]
    cast: Callable[[Tree], Tree]
    frozen: Tree
    reference: Tree | None
    report: Callable[[Tree], Metrics]
    folder: Path
    mesh: Any = None
    stage: Stage | None = None

    def step(self, state: TrainState, rows: Rows, done: int) -> tuple[TrainState, Metrics]:
        """One step of the run: everything in it is a function of the state, the rows and `done`."""
        played, attempts = self._play(state, rows, done)
        compared = self._compare(played)
        began = time.perf_counter()
        samples = self._samples(played, compared)
        self._write(played, compared, done + 1)
        state, learnt = self.learn(state, samples)
        metrics = grpo_metrics.of_step(played, compared, learnt, attempts, self.config.rewards)
        if self.stage is not None:
            metrics |= vismem_stages.metrics(self.stage.config, played)
        metrics |= grpo_metrics.shares({**played.seconds, "update": time.perf_counter() - began})
        self._note(played, compared, bool(metrics["no_signal"]), done + 1)
        return dataclasses.replace(state, step=state.step + 1), {**metrics, **self.report(state.trainable)}

    def _play(self, state: TrainState, rows: Rows, done: int) -> tuple[Played, int]:
        """The step's groups, and how often some were replaced."""
        tree = trees.merge(self.cast(state.trainable), self.frozen)
        key = jax.random.fold_in(state.key, done)
        share = self.loop.p_block
        blind = blind_rows(self.seed, done, self.loop.batch_size, share) if share else None
        sampler = self.sampler if self.stage is None else self.stage.sampler(self.sampler, done)

        def play(prompts: Sequence[Any], names: Sequence[str], attempt: int) -> Played:
            chosen = jax.random.fold_in(key, attempt)
            again = lambda settings, group: self.player(tree, prompts, names, chosen, settings, group, blind)  # noqa: E731
            played = again(sampler, self.config.group)
            if self.stage is None:
                return played
            return self.stage.rewarded(played, np.asarray(self.config.rewards.weights), sampler, again)

        def again(attempt: int) -> Played | None:
            draw = np.random.default_rng((self.seed, done, attempt, 0xD4A0))
            found = self.data.pick(draw.integers(len(self.data.source), size=self.loop.batch_size).tolist())
            return play(found.examples, found.names, attempt) if found.examples else None

        dead = lambda played: self._compare(played).dead  # noqa: E731
        return resampled(play(rows.examples, rows.names, 0), dead, again, self.config.resample)

    def _compare(self, played: Played) -> Advantages:
        if "shaped" in played.extra:
            return advantages(self.config.advantage, played.extra["shaped"][..., None], np.ones(1))
        return advantages(self.config.advantage, played.rewards, np.asarray(self.config.rewards.weights))

    def _samples(self, played: Played, compared: Advantages) -> Samples:
        """`loop.batch_size` prompts, padded to the shortest allowed completion length that holds them all."""
        rolled, rows = played.rolled, self.loop.batch_size
        width = _width(int(rolled.lengths.max()), self.config.max_new_tokens)
        fill = lambda leaf: np.pad(leaf, [(0, rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))  # noqa: E731
        mask = np.isin(rolled.kinds, (Slot.TEXT, Slot.INVOKE))
        mask &= ~(compared.dead[:, None] | np.isnan(compared.reward))[..., None]
        if self.config.mask_truncated:
            mask &= ~rolled.truncated[..., None]
        player, spliced, memories = self.player, None, None
        if self.stage is not None:
            cut = jax.tree.map(lambda leaf: leaf[..., :width], (rolled.tokens, rolled.kinds, rolled.permits))
            short = dataclasses.replace(rolled, tokens=cut[0], kinds=cut[1], permits=cut[2])
            spliced, memories = jax.tree.map(fill, self.stage.spliced(short)), fill(rolled.memories)
        return Samples(
            prompts=batch_of(played.prompts, player.buckets, player.processor.pad_token, rows, played.blind),
            tokens=fill(rolled.tokens[..., :width]),
            lengths=fill(rolled.lengths),
            mask=fill(mask[..., :width].astype(np.float32)),
            old=fill(rolled.logprobs[..., :width]),
            advantages=fill(compared.advantage.astype(np.float32)),
            spliced=spliced,
            memories=memories,
        )

    def learn(self, state: TrainState, samples: Samples) -> tuple[TrainState, grpo_metrics.Learnt]:
        """All updates of the step."""
        config = self.config
        cut = lambda leaf: np.split(np.asarray(leaf), config.minibatches)  # noqa: E731
        leaves, structure = jax.tree.flatten(samples)
        parts = [structure.unflatten(part) for part in zip(*map(cut, leaves), strict=True)]
        sampled = [place(part, self.loop.accumulate, self.mesh) for part in parts]
        parts = [self._anchored(state, part) for part in sampled]
        sums, about, kept = [], [], []
        for part in parts * config.iterations:
            state, total, facts, found = self.update(state, self.frozen, part)
            sums.append(total)
            about.append(facts)
            kept = kept or [found]
        return state, grpo_metrics.Learnt(sums, about, (sampled[0], *kept[0]))

    def _anchored(self, state: TrainState, part: Samples) -> Samples:
        """The minibatch [A, B, ...] with the log-probabilities that must be known before the first update."""
        score = self.score
        if self.config.old_logprobs == "trainer":
            part = dataclasses.replace(part, old=score(state.trainable, self.frozen, part)[0])
        if self.reference is not None:
            part = dataclasses.replace(part, reference=score(self.reference, self.frozen, part)[0])
        return part

    def _write(self, played: Played, compared: Advantages, step: int) -> None:
        """Some prompts with all their completions, for people to read."""
        if not self.config.samples or (step - 1) % self.config.samples_every or not hosts.first():
            return
        with open(self.folder / loop.SAMPLES, "a", encoding="utf-8") as file:
            for row, prompt in enumerate(played.prompts[: self.config.samples]):
                image = grpo_metrics.thumbnail(prompt.images, self.folder, f"{step}_{row}")
                line = grpo_metrics.sample(played, compared, row, self.config.rewards.labels)
                file.write(json.dumps({"step": step, "image": image, **line}) + "\n")

    def _note(self, played: Played, compared: Advantages, no_signal: bool, step: int) -> None:
        """Events that a reader of the metrics will want named."""
        events = grpo_metrics.events(played, compared, no_signal)
        if events and hosts.first():
            with open(self.folder / loop.EVENTS, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **event}) + "\n" for event in events)


def _width(longest: int, limit: int, parts: int = 4) -> int:
    """The shortest of `parts` allowed lengths up to `limit` that holds `longest`: few shapes, few programs."""
    unit = -(-limit // parts)
    return min(limit, max(1, -(-longest // unit)) * unit)


def evaluator(
    trainer: Trainer, data: Pipeline, buckets: Buckets, seed: int
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"eval/reward", "eval/rewards/<function>/mean", "eval/completions/..."} over a whole evaluation set.

    As in training, the share `loop.p_block` of its rows has visual-key blocking, the same rows in every evaluation.

    Args:
      trainer: gives weights, rewards and settings.
      data: the evaluation's prompts.
      buckets: lengths that they may have.
      seed: of the sampling, where `eval_temperature` is not 0; the same for every evaluation.
    """
    config = trainer.config
    settings = dataclasses.replace(trainer.sampler, temperature=config.eval_temperature)
    player = dataclasses.replace(trainer.player, buckets=buckets, rows=data.batch_size)

    stage = trainer.stage
    trials = {"": settings} if stage is None else stage.trials(settings)
    blind = lambda batch: blind_rows(seed, batch, data.batch_size, trainer.loop.p_block)  # noqa: E731

    def evaluate(state: TrainState) -> dict[str, float]:
        tree, found = trees.merge(trainer.cast(state.trainable), trainer.frozen), {}
        for name, sampling in trials.items():
            played = [
                player(tree, rows.examples, rows.names, jax.random.key(seed + i), sampling, config.eval_group, blind(i))
                for i, rows in enumerate(data.epoch())
            ]
            whole = functools.reduce(lambda a, b: a + b, played)
            about = grpo_metrics.of_rewards(whole, config.rewards)
            if stage is not None and not name:
                about |= vismem_stages.metrics(stage.config, whole)
                hosts.once("the invocations", lambda whole=whole: _keep_invocations(trainer, stage, whole))
            if name:  # of a control the reward alone is of interest
                about = {"reward": about["reward"]}
            found |= {f"eval/{name}/{key}" if name else f"eval/{key}": value for key, value in about.items()}
        return found

    return evaluate


def _keep_invocations(trainer: Trainer, stage: Stage, played: Played) -> None:
    """Writes where memories came in the last evaluation, for `jaxmem.analysis.invocations`."""
    rolled = played.rolled
    types = vismem_stages.types_of(stage.config, rolled)
    np.savez_compressed(trainer.folder / INVOCATIONS, kinds=rolled.kinds, types=types, lengths=rolled.lengths)


def caster(dtype: Any) -> Callable[[Tree], Tree]:
    """trainable -> the same tree as it computes (`descent.computing`), compiled."""
    return jax.jit(lambda trainable: constrain_weights(descent.computing(trainable, dtype)))


def compiled_score(score: grpo.Score) -> Callable[[Tree, Tree, Samples], Any]:
    """`score` over microbatches [A, B, ...], one after the other."""

    @jax.jit
    def all_parts(trainable: Tree, frozen: Tree, samples: Samples) -> Any:
        return jax.lax.map(lambda part: score(trainable, frozen, part), samples)

    return all_parts
