"""Long rows walk through attention, tower and PVM in blocks of queries, and compute what they compute at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.backbones import layers
from tests.distributed import world as w

ROWS, GROUP, NEW = 3, 2, 11


def everything(memory):
    """States of prompts with several images and padding, and of continuations behind them."""
    base, batch = jax.tree.map(jnp.asarray, w.tree()["base"]), w.batch(ROWS)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 150, (ROWS, GROUP, NEW)), jnp.int32)
    lengths = jnp.array([[11, 4], [0, 9], [7, 11]], jnp.int32)
    prompts = model.hidden_states(w.SPEC, base, memory, batch, remat="full")
    valid = jnp.asarray(batch.segments)[..., None] > 0
    later = model.continuation_states(w.SPEC, base, memory, batch, tokens, lengths, remat="full")
    used = (jnp.arange(NEW) < lengths[..., None])[..., None]
    return jnp.where(valid, prompts, 0), jnp.where(used, later, 0)


def outcome(monkeypatch, block):
    monkeypatch.setattr(layers, "BLOCK", block)
    memory = jax.tree.map(jnp.asarray, w.tree()["memory"])
    loss = lambda memory: sum((part**2).mean() for part in everything(memory))  # noqa: E731
    return jax.jit(lambda memory: (everything(memory), jax.grad(loss)(memory)))(memory)


@pytest.mark.slow  # gradients of three programs
@pytest.mark.parametrize("block", [5, 16])
def test_blocks_of_queries_equal_all_at_once(monkeypatch, block):
    whole, parts = outcome(monkeypatch, 1024), outcome(monkeypatch, block)
    for want, found in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


def test_an_odd_number_of_queries_is_padded_and_cut_again():
    queries = jnp.arange(2 * 3 * 17.0).reshape(2, 3, 17, 1)
    seen = []

    def twice(piece):
        seen.append(piece.shape)
        return 2 * piece

    np.testing.assert_array_equal(layers.in_blocks(twice, queries, block=5), 2 * queries)
    assert set(seen) == {(2, 3, 5, 1)}
