"""What every kind of training shares: the state, exact accumulation of gradients, and one optimizer update.

Axis letters: A accumulated microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxmem.distributed.mesh import constrain_weights
from jaxmem.training import optimizer
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.trees import Tree

Metrics = dict[str, Any]
Loss = Callable[[Tree, Any, jax.Array], tuple[jax.Array, tuple[Any, Any]]]
"""loss(trainable, microbatch, key) -> the *sum* of the loss, and (sums that add over microbatches, values to keep)."""


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step, and all that a checkpoint must hold beside the data position.

    Attributes:
      step: int32 scalar, batches consumed, skipped ones included.
      trainable: nested dict of the parameters that train.
      opt_state: optax state of exactly those parameters.
      key: random key of the run; a step derives its own from it and `step`.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Any
    key: jax.Array


def init_state(config: OptimizerConfig, trainable: Tree, seed: int) -> TrainState:
    """The state in front of the first step, every leaf where the current mesh wants it.

    The parameters are float32 copies, whatever the dtype they came in.
    """
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)

    @jax.jit
    def rest(trainable: Tree) -> tuple[Any, jax.Array, jax.Array]:
        opt_state = optimizer.transformation(config, trainable).init(trainable)
        return constrain_weights((opt_state, jnp.int32(0), jax.random.key(seed)))

    opt_state, step, key = rest(trainable)
    return TrainState(step, trainable, opt_state, key)


def computing(tree: Tree, dtype: Any) -> Tree:
    """A tree {"base", ...} as it computes: backbone weights in `dtype`, everything else as it is.

    What trains keeps its float32 original with the optimizer. None leaves every leaf as it is; memories cast for
    themselves.
    """
    if dtype is None or "base" not in tree:
        return tree
    return {**tree, "base": jax.tree.map(lambda leaf: leaf.astype(dtype), tree["base"])}


def accumulate(loss: Loss, trainable: Tree, batches: Any, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Gradient of the sum of the loss over all microbatches.

    Args:
      loss: of one microbatch.
      trainable: what is differentiated, in the dtypes that it computes in: a microbatch's gradients have them too.
      batches: leaves with a leading axis A.
      key: every microbatch gets its own.
      dtype: in which gradients of several microbatches are added.

    Returns:
      (gradients like `trainable`, sums), both added over A, so that dividing once is exact for any distribution of
      tokens over microbatches; and the kept values, stacked on a leading axis A.
    """

    def one(batch: Any, key: jax.Array) -> tuple[tuple[Tree, Any], Any]:
        grads, (sums, kept) = jax.grad(loss, has_aux=True)(trainable, batch, key)
        return (constrain_weights(grads), sums), kept

    count = jax.tree.leaves(batches)[0].shape[0]
    keys = jax.random.split(key, count)
    first = jax.tree.map(lambda leaf: leaf[0], (batches, keys))
    if count == 1:
        (grads, sums), kept = one(*first)
        return grads, sums, jax.tree.map(lambda leaf: leaf[None], kept)
    shapes = jax.eval_shape(one, *first)[0]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    zeros = constrain_weights(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), shapes[0]))

    def body(total: Any, microbatch: Any) -> tuple[Any, Any]:
        added, kept = one(*microbatch)
        return jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, added), kept

    (grads, sums), kept = jax.lax.scan(body, (zeros, nothing), (batches, keys))
    return grads, sums, kept


def descend(
    transform: optax.GradientTransformation, rate: jax.Array, state: TrainState, summed: Tree, loss: Any, divisor: Any
) -> tuple[TrainState, Metrics]:
    """One update from a summed gradient; `state.step` stays.

    Args:
      transform: from `optimizer.transformation`.
      rate: learning rate.
      state: before the update.
      summed: gradient of the sum.
      loss: the sum, only to see whether it is finite.
      divisor: what makes means of sums.

    Returns:
      The state, and grad_norm (before clipping), lr, finite, updated (bool scalars). When loss or gradient is not
      finite, or the divisor is 0 (nothing to learn from), parameters and optimizer stay as they were.
    """
    share = 1.0 / jnp.where(divisor > 0, divisor, 1.0)
    grads = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype) * share, summed, state.trainable)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    good = finite & (divisor > 0)
    updates, opt_state = transform.update(grads, state.opt_state, state.trainable)
    updated = jax.tree.map(lambda leaf, update: leaf - rate * update, state.trainable, updates)
    keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
    trainable = jax.tree.map(keep, updated, state.trainable)
    opt_state = jax.tree.map(keep, opt_state, state.opt_state)
    trainable, opt_state = constrain_weights((trainable, opt_state))
    state = TrainState(state.step, trainable, opt_state, state.key)
    return state, {"grad_norm": norm, "lr": rate, "finite": finite, "updated": good}
