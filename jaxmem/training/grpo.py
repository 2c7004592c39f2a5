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
from jaxmem.memory import vismem
from jaxmem.sampling import splicing
from jaxmem.sampling.splicing import Spliced
from jaxmem.training import descent, optimizer, trees
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.losses import Control, token_logprobs
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
      old: [B, G, N] float32 log-probabilities under the policy that sampled; None takes the policy that trains as it
        is, so that every ratio is 1.
      advantages: [B, G] float32.
      reference: [B, G, N] float32 under the reference policy; None without one.
      spliced: where VisMem's memories stand; None without them.
      memories: [B, G, I, M, D] float32, the memories as they were recorded; None likewise.
    """

    prompts: Batch
    tokens: Array
    lengths: Array
    mask: Array
    old: Array | None
    advantages: Array
    reference: Array | None = None
    spliced: Spliced | None = None
    memories: Array | None = None


Forward = Callable[[Tree, Samples], tuple[jax.Array, jax.Array, Control | None]]
"""forward({"base", "memory"}, samples) -> states in front of the tokens [B, G, N, D], unembedding [V, D], and VisMem's
control tokens with `allowed` [B, G, N, 4]. Without dropout: what is trained is what was sampled."""
Score = Callable[[Tree, Tree, Samples], tuple[jax.Array, jax.Array]]
"""score(trainable, frozen, samples) -> log-probabilities and entropies [B, G, N]."""


def model_forward(spec: model.Spec, trainable: Tree, *, remat: Remat = True, base_dtype: Any = None) -> Forward:
    """The model as a function of the merged tree; arguments as for `sft.model_forward`."""
    backward_from = 0 if "base" in trainable else spec.first_port_layer
    again = _forms(trainable)

    def forward(tree: Tree, samples: Samples) -> tuple[jax.Array, jax.Array, Control | None]:
        tree = descent.computing(tree, base_dtype)
        base, memory = tree["base"], tree.get("memory", {})
        options: dict[str, Any] = {"remat": remat, "backward_from": backward_from}
        if samples.spliced is None or samples.memories is None:
            states = model.continuation_states(
                spec, base, memory, samples.prompts, samples.tokens, samples.lengths, **options
            )
        else:
            states = _spliced_states(spec, base, memory, samples, again, options)
        return states, model.unembedding(spec, base), _control(spec, memory, samples)

    return forward


def _forms(trainable: Tree) -> bool:
    """Does anything train that memories are formed with?"""
    own = trainable.get("memory", {}).get("vismem", {})
    return any(name != "rows" for name in own)


def _spliced_states(
    spec: model.Spec, base: Any, memory: Any, samples: Samples, again: bool, options: dict[str, Any]
) -> jax.Array:
    """States in front of the slots of continuations with memories.

    Where formers train, memories are formed again, of the states that they were formed of when the continuation was
    sampled: those that follow from the recorded memories (arXiv 2511.11007, section 3.4). Else the recorded ones stand.
    """
    prompt = model.read(spec, base, memory, samples.prompts, **options)
    tokens, lengths = jnp.asarray(samples.tokens), jnp.asarray(samples.lengths)
    memories, spliced = jnp.asarray(samples.memories), samples.spliced
    assert spliced is not None and spec.vismem is not None

    def follow(memories: jax.Array) -> jax.Array:
        x = splicing.embeddings(spec, base, memory, tokens, memories, spliced.place)
        return model.follow(spec, base, memory, samples.prompts, prompt, x, lengths, **options)

    if again:
        before = follow(memories)
        if not spec.vismem.backprop_hidden:
            before = jax.lax.stop_gradient(before)
        memories = splicing.formed(spec, base, memory, prompt, before, spliced, remat=options["remat"])
    return follow(memories)


def _control(spec: model.Spec, memory: Any, samples: Samples) -> Control | None:
    """The control tokens of a model that has them; none could be sampled where no memories are spliced in."""
    config = spec.vismem
    if config is None:
        return None
    shape = (*samples.tokens.shape, 4)
    allowed = jnp.zeros(shape, bool) if samples.spliced is None else jnp.asarray(samples.spliced.control)
    rows = vismem.unembedding(config, memory[config.name])
    return Control(rows, vismem.bias(config), allowed, jnp.int32(config.vocab))


def make_score(forward: Forward, temperature: float, chunk: int = 2048) -> Score:
    """Log-probabilities and entropies of all sampled tokens at the sampling temperature; 0 behind the ends."""

    def score(trainable: Tree, frozen: Tree, samples: Samples) -> tuple[jax.Array, jax.Array]:
        states, unembedding, control = forward(trees.merge(trainable, frozen), samples)
        shape = samples.tokens.shape
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        used = jnp.arange(shape[2]) < jnp.asarray(samples.lengths)[..., None]
        if control is not None:
            control = control._replace(allowed=flat(control.allowed))
        tokens = flat(jnp.asarray(samples.tokens))
        found = token_logprobs(flat(states), unembedding, tokens, flat(used), temperature, chunk, control)
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
                flat(jax.lax.stop_gradient(logprobs) if part.old is None else part.old),
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
