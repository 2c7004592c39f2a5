"""AdamW with warm-up, cosine and clipping: every number is a field, and it sees only what trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxmem.errors import ConfigError
from jaxmem.training import trees

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are those of PVM's first stage.

    Attributes:
      learning_rate: peak.
      schedule: what follows the warm-up: "cosine" or "linear" to `final_fraction`, or "constant".
      warmup_ratio: share of the run's steps over which the rate rises from 0, rounded up.
      warmup_steps: that length in steps; when not None it replaces `warmup_ratio`.
      final_fraction: the rate at the end, as a share of the peak.
      beta1, beta2, eps: Adam's.
      weight_decay: decoupled, multiplied by the learning rate.
      decay_exclude: path patterns of parameters without weight decay.
      clip_norm: largest global norm of the gradient; 0 switches clipping off.
      multipliers: (path pattern, factor) of the learning rate; the last pattern that matches counts,
        e.g. (("**/gate_alpha", 5.0),).
      moment_dtype: in which Adam's first moment is kept (the second stays float32); "bfloat16" saves 2 bytes a
        parameter.
      accumulate_dtype: in which gradients of several microbatches are added.
    """

    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    warmup_steps: int | None = None
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_exclude: tuple[str, ...] = ("**/scale", "**/bias", "**/gate_alpha")
    clip_norm: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optimizer.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.learning_rate < 0 or not 0 <= self.warmup_ratio <= 1:
            raise ConfigError("optimizer: learning_rate must not be negative, warmup_ratio lies between 0 and 1")


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one pass over `rows`; the last batch may be smaller."""
    return math.ceil(rows / batch_size)


def schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """The learning rate as a function of the number of updates done before.

    It is 0 at 0, the peak after the warm-up and `final_fraction` of the peak at `steps`.

    Args:
      config: the peak, the warm-up and the shape.
      steps: length of the run.

    Returns:
      A function of an int or int32 scalar that returns a float32 scalar.
    """
    warmup = math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
        falling = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done, "constant": jnp.ones_like(done)}
        after = config.final_fraction + (1 - config.final_fraction) * falling[config.schedule]
        if config.schedule == "constant":
            after = falling["constant"]
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), after)

    return rate


def transformation(config: OptimizerConfig, trainable: trees.Tree) -> optax.GradientTransformation:
    """Everything but the learning rate: clipping, Adam, weight decay and the multipliers.

    The step multiplies the result by `-schedule(step)`, so the state holds no counter beside Adam's own.

    Args:
      config: the numbers.
      trainable: the tree that trains (arrays or shapes), to check the path patterns.

    Returns:
      An optax transformation.

    Raises:
      ConfigError: a multiplier's pattern matches no trainable parameter.
    """
    trees.check_patterns([pattern for pattern, _ in config.multipliers], trainable, "optimizer.multipliers")
    decays = trees.map_with_path(
        lambda path, _: not any(trees.matches(pattern, path) for pattern in config.decay_exclude), trainable
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, decays) if config.weight_decay else optax.identity(),
        optax.stateless(lambda updates, _: _multiplied(config, updates)),
    )


def _multiplied(config: OptimizerConfig, updates: trees.Tree) -> trees.Tree:
    """Every update times the factor of its path."""

    def scaled(path: str, update: jax.Array) -> jax.Array:
        factors = [factor for pattern, factor in config.multipliers if trees.matches(pattern, path)]
        return update * factors[-1] if factors else update

    return trees.map_with_path(scaled, updates)
