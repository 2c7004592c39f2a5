"""How the phases of `tiny_phases` run: plain AdamW in float32 on all weights of the tiny backbone."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmem import model
from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.assets.tiny_phases import Phase, batch_of, boards_of
from jaxmem.backbones import qwen3_vl, vision
from jaxmem.backbones.batch import Array, Batch
from jaxmem.data.boards import SIDE, BoardTokens
from jaxmem.model import Spec
from jaxmem.training.losses import cross_entropy


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What all phases share.

    Attributes:
      spec: the bare backbone.
      batcher: makes batches of boards.
      ids: the tokens of digits and cell names.
      seed: of weights and boards.
      log: takes a line of progress.
    """

    spec: Spec
    batcher: BoardBatcher
    ids: BoardTokens
    seed: int
    log: Callable[[str], None]

    def run(self, base: Any, phase: Phase) -> Any:
        """The weights after a phase. `base` is used up."""
        if phase.trains == "tokens":
            return self._updates(functools.partial(token_loss, self.spec), base, phase, self._batches(phase))
        part = {name: base[name] for name in ("visual", "embed", "head")}
        loss = functools.partial(vision_loss, self.spec, self.ids)
        return {**base, **self._updates(loss, part, phase, self._pictures(phase))}

    def _batches(self, phase: Phase) -> Iterator[tuple]:
        """(batch,) per step."""
        for step in range(phase.steps):
            layout = phase.layouts[step % len(phase.layouts)]
            boards = boards_of(layout, phase.boards + 100 * self.seed, step)
            yield (batch_of(layout, boards, self.batcher, self.ids),)

    def _pictures(self, phase: Phase) -> Iterator[tuple]:
        """(batch, digits of the boards [B, 16]) per step."""
        (layout,) = phase.layouts
        for step in range(phase.steps):
            boards = boards_of(layout, phase.boards + 100 * self.seed, step)
            yield self.batcher(boards, layout.width), np.array([board.grid for board in boards])

    def _updates(self, loss: Callable, params: Any, phase: Phase, data: Iterator[tuple]) -> Any:
        """All updates of a phase; logs the mean loss and accuracy of every sixty steps."""
        rule = optimizer(phase)
        step = functools.partial(_update, loss, rule)
        step = jax.jit(step, donate_argnums=(0, 1))
        state, seen, began = rule.init(params), [], time.perf_counter()
        for index, arrays in enumerate(data, start=1):
            params, state, value, accuracy = step(params, state, *arrays)
            seen.append((float(value), float(accuracy)))
            if index % 60 == 0 or index == phase.steps:
                mean_loss, mean_accuracy = np.mean(seen[-60:], axis=0)
                seconds = time.perf_counter() - began
                name = f"{phase.name} {index:5d}/{phase.steps}"
                self.log(f"{name}  loss {mean_loss:.4f}  accuracy {mean_accuracy:.4f}  {seconds:6.1f} s")
        return params


def _update(
    loss: Callable, rule: optax.GradientTransformation, params: Any, state: Any, *data: Any
) -> tuple[Any, Any, Array, Array]:
    """One optimizer step for `loss(params, *data) -> (loss, accuracy)`."""
    (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params, *data)
    change, state = rule.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value, accuracy


def initialise(spec: Spec, seed: int) -> Any:
    """Random float32 weights: maps and tables N(0, 1/fan_in), so that signals keep their size from the first step."""
    key = jax.random.key(seed)
    paths, tree = jax.tree_util.tree_flatten_with_path(qwen3_vl.init(key, spec.backbone, jnp.float32))
    leaves = [_scaled(jax.random.fold_in(key, place), path[-1].key, leaf) for place, (path, leaf) in enumerate(paths)]
    return jax.tree_util.tree_unflatten(tree, leaves)


def _scaled(key: Array, name: str, leaf: Array) -> Array:
    """A fresh leaf: kernels [.., in, out] and tables [rows, D] by their inputs, biases and norms as they are."""
    if name in ("bias", "scale"):
        return leaf
    fan_in = leaf.shape[-2] if name == "kernel" else leaf.shape[-1]
    return jax.random.normal(key, leaf.shape) / np.sqrt(fan_in)


def optimizer(phase: Phase) -> optax.GradientTransformation:
    """AdamW (b2 0.98, decay 1e-4) behind gradient clipping at norm 1, with the phase's schedule."""
    warm = max(1, phase.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.rate, warm, phase.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=1e-4))


def vision_loss(spec: Spec, ids: BoardTokens, params: Any, batch: Batch, grid: Array) -> tuple[Array, Array]:
    """Cross-entropy of digit and cell from every merged row, DeepStack rows included.

    The classifiers are the language model's own tables: a row should point along the head's vector of its digit and
    along the embedding of its cell's name, so that later a name finds its cell and a cell's content finds its word.

    Args:
      spec: static.
      ids: the tokens of digits and cell names.
      params: {"visual", "embed", "head"} of the backbone.
      batch: only its patches are read.
      grid: [B, 16] the digits of the boards.

    Returns:
      The loss, and the digit accuracy of the main rows.
    """
    visual = vision.see(spec.backbone.vision, params["visual"], batch)
    rows = jnp.concatenate([visual.rows[None], visual.deepstack])  # [1 + taps, B, 16, D]
    names = params["embed"][np.reshape(ids.cells, (2, SIDE**2))]  # without and with a leading space
    digit = jnp.einsum("sbmd,cd->sbmc", rows, params["head"][np.array(ids.digits)])
    cell = jnp.einsum("sbmd,acd->sabmc", rows, names)
    loss = optax.softmax_cross_entropy_with_integer_labels
    digits = jnp.broadcast_to(grid, digit.shape[:-1])
    cells = jnp.broadcast_to(jnp.arange(SIDE**2), cell.shape[:-1])
    return loss(digit, digits).mean() + loss(cell, cells).mean(), (digit[0].argmax(-1) == grid).mean()


def token_loss(spec: Spec, base: Any, batch: Batch) -> tuple[Array, Array]:
    """Mean next-token cross-entropy over the loss mask, and the accuracy there."""
    hidden = model.hidden_states(spec, base, {}, batch)
    sums = cross_entropy(hidden, base["head"], batch.tokens, batch.loss_mask)
    return sums.nll / sums.weight, sums.correct / sums.count
