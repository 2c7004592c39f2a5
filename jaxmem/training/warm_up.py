"""VisMem's warm-up as a step of the loop: cross-entropy of reference answers behind a memory of random type.

It is the published code's first stage repaired (arXiv 2511.11007, section 3.3 and its code): memories of both types
stand between their control tokens, and images are seen. Its update is GRPO's with one completion per prompt, the
reference, of advantage 1 and ratio 1: the gradient of the mean log-likelihood.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from jaxmem.data.pipeline import Rows, blind_rows
from jaxmem.distributed import hosts
from jaxmem.sampling import splicing
from jaxmem.sampling.slots import Slot
from jaxmem.training import vismem_stages
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.grpo import Samples
from jaxmem.training.grpo_run import Trainer
from jaxmem.training.prompts import batch_of


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Steps of the warm-up, driven like those of `Trainer`, whose update and evaluation it uses."""

    trainer: Trainer

    def step(self, state: TrainState, rows: Rows, done: int) -> tuple[TrainState, Metrics]:
        """One step of the run.

        Raises:
          DataError: a record has no reference answer, or one that does not fit.
        """
        began = time.perf_counter()
        state, learnt = self.trainer.learn(state, self._samples(rows, done, jax.random.fold_in(state.key, done)))
        part, logprobs, _ = learnt.before
        mask, lengths, logprobs, about = hosts.fetch((part.mask, part.lengths, logprobs, learnt.about))
        counted = np.asarray(mask) > 0
        metrics = {
            "loss": -float(np.asarray(logprobs)[counted].mean()) if counted.any() else 0.0,
            "grad_norm": float(np.mean([float(one["grad_norm"]) for one in about])),
            "lr": float(about[-1]["lr"]),
            "tokens": float(lengths.sum()),
            "tokens_in_loss": float(counted.sum()),
            "skipped": float(not all(bool(one["finite"]) for one in about)),
            "step_time": time.perf_counter() - began,
        }
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {**metrics, **self.trainer.report(state.trainable)}

    def _samples(self, rows: Rows, done: int, key: jax.Array) -> Samples:
        trainer, stage = self.trainer, self.trainer.stage
        assert stage is not None, "the warm-up is a stage of VisMem"
        config, player, limit = stage.config, trainer.player, trainer.config.max_new_tokens
        pad, size = player.processor.pad_token, trainer.loop.batch_size
        tokens, kinds, lengths = vismem_stages.references(config, rows.examples, key, limit, pad, stage.settings)
        spliced = splicing.locate(config, tokens, kinds, np.zeros_like(kinds), 1)
        blind = blind_rows(trainer.seed, done, size, trainer.loop.p_block)[: len(kinds)] & with_memory(kinds)
        fill = lambda leaf: np.pad(leaf, [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))  # noqa: E731
        return Samples(
            prompts=batch_of(rows.examples, player.buckets, pad, size, blind),
            tokens=fill(tokens),
            lengths=fill(lengths),
            mask=fill((kinds == Slot.TEXT).astype(np.float32)),
            old=None,
            advantages=np.ones((size, 1), np.float32),
            spliced=jax.tree.map(fill, spliced),
            # Nothing of the first memory's text stands behind a memory, so what is recorded here is never read.
            memories=np.zeros((size, 1, 1, config.longest, config.width), np.float32),
        )


def with_memory(kinds: np.ndarray) -> np.ndarray:
    """[B] bool of kinds [B, 1, N]: rows whose image may be hidden. Without image and memory an answer is a guess."""
    return (kinds == Slot.MEMORY).any(axis=(1, 2))
