"""Supervised fine-tuning as pure functions: one optimizer step, one evaluation.

Gradients are taken of the trainable tree only; the frozen tree is a plain argument, so neither a gradient nor any
optimizer state of it exists. Axis letters: A accumulated microbatches, B rows of one, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem import model
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.decoder import Remat
from jaxmem.training import descent, optimizer, trees
from jaxmem.training.descent import Metrics, TrainState
from jaxmem.training.losses import TokenLoss, cross_entropy
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.trees import Tree

Forward = Callable[[Tree, Batch, Any], tuple[jax.Array, jax.Array]]
"""forward({"base", "memory"}, batch, dropout key or None) -> hidden [B, T, D], unembedding [V, D]."""


def model_forward(spec: model.Spec, trainable: Tree, *, remat: Remat = True, base_dtype: Any = None) -> Forward:
    """The model as a function of the merged tree.

    Args:
      spec: what is computed.
      trainable: which leaves train (arrays or shapes): where only memories do, no backward pass runs below the first
        layer that a memory touches.
      remat: what of a decoder layer is recomputed in the backward pass (`decoder.REMAT`).
      base_dtype: see `descent.computing`.
    """
    backward_from = 0 if "base" in trainable else spec.first_port_layer

    def forward(tree: Tree, batch: Batch, dropout: Any) -> tuple[jax.Array, jax.Array]:
        tree = descent.computing(tree, base_dtype)
        base, memory = tree["base"], tree.get("memory", {})
        states = model.hidden_states(
            spec, base, memory, batch, remat=remat, backward_from=backward_from, dropout=dropout
        )
        return states, model.unembedding(spec, base)

    return forward


def token_loss(
    forward: Forward, trainable: Tree, frozen: Tree, batch: Batch, dropout: Any = None, chunk: int = 2048
) -> TokenLoss:
    """Sums of the loss over the supervised tokens of a batch [B, T]."""
    hidden, unembedding = forward(trees.merge(trainable, frozen), batch, dropout)
    return cross_entropy(hidden, unembedding, jnp.asarray(batch.tokens), jnp.asarray(batch.loss_mask), chunk)


def accumulate(
    forward: Forward,
    trainable: Tree,
    frozen: Tree,
    batches: Batch,
    key: jax.Array,
    chunk: int = 2048,
    dtype: Any = jnp.float32,
) -> tuple[Tree, TokenLoss]:
    """Gradient of the *sum* of the loss over all microbatches, and the sums to divide it by.

    Args:
      forward: the model.
      trainable: what is differentiated.
      frozen: the rest.
      batches: leaves with two leading axes [A, B, ...].
      key: for dropout; every microbatch gets its own.
      chunk: see `cross_entropy`.
      dtype: see `descent.accumulate`.

    Returns:
      (gradients like `trainable`, TokenLoss), both summed over A: dividing once by the weight is exact for any
      distribution of supervised tokens over microbatches.
    """

    def loss(params: Tree, batch: Batch, dropout: jax.Array) -> tuple[jax.Array, tuple[TokenLoss, None]]:
        total = token_loss(forward, params, frozen, batch, dropout, chunk)
        return total.nll, (total, None)

    return descent.accumulate(loss, trainable, batches, key, dtype)[:2]


def make_train_step(
    forward: Forward,
    config: OptimizerConfig,
    steps: int,
    trainable: Tree,
    *,
    report: Callable[[Tree], Metrics] = lambda trainable: {},
    chunk: int = 2048,
    dtype: Any = None,
    donate: bool = True,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step, compiled.

    Args:
      forward: the model.
      config: the optimizer.
      steps: length of the run, for the schedule.
      trainable: the tree that trains (arrays or shapes).
      report: further metrics of the updated parameters, such as `gates`.
      chunk: see `cross_entropy`.
      dtype: see `descent.computing`: backbone weights that train are differentiated in it.
      donate: the new state takes the memory of the old one.

    Returns:
      step(state, frozen, batches [A, B, ...]) -> (state, metrics). Metrics are scalars: loss and accuracy per
      supervised token, tokens, grad_norm before clipping, lr, skipped. A step whose loss or gradient is not finite,
      or that has nothing to learn from, leaves parameters and optimizer as they were and says skipped.
    """
    transform, rate = optimizer.transformation(config, trainable), optimizer.schedule(config, steps)

    def step(state: TrainState, frozen: Tree, batches: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params = descent.computing(state.trainable, dtype)
        summed, total = accumulate(forward, params, frozen, batches, key, chunk, config.accumulate_dtype)
        state, about = descent.descend(transform, rate(state.step), state, summed, total.nll, total.weight)
        state = dataclasses.replace(state, step=state.step + 1)
        metrics = {**_summary(total), "grad_norm": about["grad_norm"], "lr": about["lr"], "skipped": ~about["updated"]}
        return state, {**metrics, **report(state.trainable)}

    return jax.jit(step, donate_argnums=0 if donate else ())


def _summary(total: TokenLoss) -> Metrics:
    """Sums -> means per supervised token."""
    count = jnp.maximum(total.count, 1)
    weight = jnp.where(total.weight > 0, total.weight, 1.0)
    return {"loss": total.nll / weight, "accuracy": total.correct / count, "tokens": total.count}


def make_eval_step(forward: Forward, chunk: int = 2048) -> Callable[[Tree, Tree, Batch], TokenLoss]:
    """Compiled sums of the loss of one batch: eval_step(trainable, frozen, batch [B, T]) -> TokenLoss."""
    return jax.jit(lambda trainable, frozen, batch: token_loss(forward, trainable, frozen, batch, None, chunk))


def evaluate(
    eval_step: Callable[[Tree, Tree, Batch], TokenLoss], trainable: Tree, frozen: Tree, batches: Iterable[Batch]
) -> dict[str, float]:
    """Teacher-forced loss and accuracy per supervised token over an evaluation set.

    Args:
      eval_step: from `make_eval_step`.
      trainable, frozen: the two parts of the parameters.
      batches: batches [B, T]; their sums are added before they are divided.

    Returns:
      loss, accuracy, tokens.
    """
    sums = [eval_step(trainable, frozen, batch) for batch in batches]
    nll, weight, correct, count = (sum(float(value) for value in column) for column in zip(*sums, strict=True))
    return {"loss": nll / max(weight, 1e-12), "accuracy": correct / max(count, 1), "tokens": count}


def gates(spec: model.Spec, trainable: Tree) -> Metrics:
    """The gate of every layer of every memory that trains: {"gate/pvm/layer_8": scalar, ...}."""
    found, memory = {}, trainable.get("memory", {})
    for config in spec.memories:
        values = memory.get(config.name, {}).get("gate_alpha")
        if values is not None:
            found |= {f"gate/{config.name}/layer_{layer}": values[i] for i, layer in enumerate(config.layers)}
    return found
