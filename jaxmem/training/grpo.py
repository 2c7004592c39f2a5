"""Group-relative policy optimization as pure functions: log-probabilities of sampled completions, and one update.

The training forward computes each prompt once and its completions beside one another, with the same arithmetic that
sampled them. Gradients are taken of the trainable tree only.
Axis letters: A accumulated microbatches, B prompts, G completions of each, N new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxmem import model
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Remat
from jaxmem.training import descent, optimizer, trees
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.losses import token_logprobs
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.policy import LossConfig, PolicySums, policy_loss
from jaxmem.training.trees import Tree


@flax.struct.dataclass
class Samples:
    """Completions ready to be learnt from.

    Attributes:
      prompts: B rows.
      tokens: [B, G, N] int32.
      lengths: [B, G] int32 slots in use.
      mask: [B, G, N] float32, 1 where a sampled token counts in the loss.
      old: [B, G, N] float32 log-probabilities under the policy that sampled.
      advantages: [B, G] float32.
      reference: [B, G, N] float32 under the reference policy; None without one.
    """

    prompts: Batch
    tokens: Array
    lengths: Array
    mask: Array
    old: Array
    advantages: Array
    reference: Array | None = None


Forward = Callable[[Tree, Samples], tuple[jax.Array, jax.Array]]
"""forward({"base", "memory"}, samples) -> states in front of the tokens [B, G, N, D], unembedding [V, D]. Without
dropout: what is trained is what was sampled."""
Score = Callable[[Tree, Tree, Samples], tuple[jax.Array, jax.Array]]
"""score(trainable, frozen, samples) -> log-probabilities and entropies [B, G, N]."""


def model_forward(spec: model.Spec, trainable: Tree, *, remat: Remat = True, base_dtype: Any = None) -> Forward:
    """The model as a function of the merged tree; arguments as for `sft.model_forward`."""
    backward_from = 0 if "base" in trainable else spec.first_port_layer

    def forward(tree: Tree, samples: Samples) -> tuple[jax.Array, jax.Array]:
        tree = descent.computing(tree, base_dtype)
        base, memory = tree["base"], tree.get("memory", {})
        states = model.continuation_states(
            spec,
            base,
            memory,
            samples.prompts,
            jnp.asarray(samples.tokens),
            jnp.asarray(samples.lengths),
            remat=remat,
            backward_from=backward_from,
        )
        return states, model.unembedding(spec, base)

    return forward


def make_score(forward: Forward, temperature: float, chunk: int = 2048) -> Score:
    """Log-probabilities and entropies of all sampled tokens at the sampling temperature; 0 behind the ends."""

    def score(trainable: Tree, frozen: Tree, samples: Samples) -> tuple[jax.Array, jax.Array]:
        states, unembedding = forward(trees.merge(trainable, frozen), samples)
        shape = samples.tokens.shape
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        used = jnp.arange(shape[2]) < jnp.asarray(samples.lengths)[..., None]
        found = token_logprobs(flat(states), unembedding, flat(samples.tokens), flat(used), temperature, chunk)
        return found[0].reshape(shape), found[1].reshape(shape)

    return score


def make_update(
    score: Score,
    loss: LossConfig,
    config: OptimizerConfig,
    steps: int,
    trainable: Tree,
    max_length: int,
    dtype: Any = None,
    donate: bool = True,
) -> Callable[[TrainState, Tree, Samples], tuple[TrainState, PolicySums, Metrics, tuple[Array, Array]]]:
    """One optimizer update, compiled.

    Args:
      score: from `make_score`.
      loss: which loss.
      config: the optimizer.
      steps: length of the run, for the schedule.
      trainable: the tree that trains (arrays or shapes).
      max_length: longest allowed completion.
      dtype, donate: as for `sft.make_train_step`.

    Returns:
      update(state, frozen, samples with leading axes [A, B, ...]) -> the state (its `step` unchanged), the sums of
      the loss, metrics of `descent.descend`, and log-probabilities and entropies [A, B, G, N] in front of the update.
    """
    transform, rate = optimizer.transformation(config, trainable), optimizer.schedule(config, steps)

    def update(state: TrainState, frozen: Tree, samples: Samples) -> Any:
        def total(params: Tree, part: Samples, key: jax.Array) -> Any:
            logprobs, entropies = score(params, frozen, part)
            flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
            sums = policy_loss(
                loss,
                flat(logprobs),
                flat(part.old),
                part.advantages.reshape(-1),
                flat(part.mask),
                max_length,
                None if part.reference is None else flat(part.reference),
            )
            return sums.loss, (sums, (logprobs, entropies))

        key = jax.random.fold_in(state.key, state.step)
        params = descent.computing(state.trainable, dtype)
        summed, sums, kept = descent.accumulate(total, params, samples, key, config.accumulate_dtype)
        state, about = descent.descend(transform, rate(state.step), state, summed, sums.loss, sums.denominator)
        return state, sums, about, kept

    return jax.jit(update, donate_argnums=0 if donate else ())
