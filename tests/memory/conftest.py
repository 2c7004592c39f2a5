"""One random model for all tests of PVM."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import qwen3_vl
from tests.memory import world as w


@dataclasses.dataclass(frozen=True)
class World:
    """The backbone's weights and a memory with open gates."""

    base: Any
    params: Any

    @property
    def memory(self) -> dict[str, Any]:
        """{"pvm": parameters}."""
        return {"pvm": self.params}

    @property
    def closed(self) -> dict[str, Any]:
        """The memory with its gates at zero."""
        return {"pvm": w.with_gates(self.params, 0.0)}


@pytest.fixture(scope="session")
def world() -> World:
    return World(w.random_like(qwen3_vl.shapes(w.BACKBONE), 0), w.random_memory(w.CAUSAL, 1))


@pytest.fixture(scope="session")
def branch(world) -> w.Branch:
    """The branch alone on random arrays, for a right-padded batch."""
    return make_branch(world, w.batch_of(w.rows_of(1)))


def make_branch(world: World, batch: Any) -> w.Branch:
    """Random visual rows and residuals for a batch."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    rows, width = batch.tokens.shape
    x, visual = draw(rows, width, w.BACKBONE.text.width), draw(rows, w.PATCHES // 4, w.BACKBONE.text.width)
    return w.Branch(batch, world.params, visual, 3 * x + 1, x)
