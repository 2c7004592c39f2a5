"""`jaxmem bench compile`: trace and compile time of a deep and of a shallow training step.

One scan over stacked layers makes both about equal; an unrolled model would compile nine times longer.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.backbones import qwen3_vl
from jaxmem.bench.models import backbone, prompts
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.memory import pvm
from jaxmem.model import Spec, hidden_states, init_memory, unembedding
from jaxmem.training.losses import cross_entropy


def run(deep: int = 36, shallow: int = 4, width: int = 256, runs: int = 5) -> list[Comparison]:
    """Compiles the gradient step of PVM on models of two depths, in turns, from an empty compilation cache."""
    seconds = alternate({"ours": _compile(deep, width), "peer": _compile(shallow, width)}, runs)
    slow, fast = median(seconds["ours"]), median(seconds["peer"])
    label = f"trace and compile, {deep} layers against {shallow}"
    return [Comparison(label, "s", slow, fast, slow / fast, "ratio <= 1.5", seconds)]


def _compile(layers: int, width: int) -> Callable[[], None]:
    """A function that traces and compiles one gradient step without running it."""
    config = backbone(layers, width, 3 * width, heads=4, kv_heads=2, vocab=1024)
    spec = Spec(config, (pvm.create(config, layers=(1, 2, 3), latent=128),))
    base, batch = qwen3_vl.shapes(config), prompts(config, rows=2, grid=(8, 8), text=32)
    memory = jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))

    def loss(memory: dict, base: dict) -> jax.Array:
        hidden = hidden_states(spec, base, memory, batch, remat=True, backward_from=spec.first_port_layer)
        total = cross_entropy(hidden, unembedding(spec, base), jnp.asarray(batch.tokens), jnp.asarray(batch.loss_mask))
        return total[0]

    def work() -> None:
        jax.clear_caches()
        jax.jit(jax.value_and_grad(loss)).lower(memory, base).compile()

    return work
