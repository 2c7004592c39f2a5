"""Memories spliced in on a mesh of eight devices and on one: acceptance check 28."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxmem.distributed import mesh as meshes
from jaxmem.sampling.rollout import Rollout
from jaxmem.training import placing
from tests.memory import vismem_world as v
from tests.sampling.insertion_world import VARIANTS, base, members, play

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def on(mesh: Any, **settings: Any) -> Rollout:
    """A rollout of the world's prompts, weights and rows where the rules want them."""
    if mesh is None:
        return play("free", **settings)
    with meshes.current(mesh):
        whole = {"base": base(), "memory": VARIANTS["free"].memory}
        placed = jax.device_put(whole, meshes.shardings(mesh, whole))
        return play("free", placing.put(v.kept_rows(), mesh), **placed, **settings)


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.0, marks=pytest.mark.slow)], ids=["sampled", "greedy"])
def test_check_28_a_mesh_makes_the_same_continuations(temperature: float) -> None:
    """Every device picks the rows that invoke of its own prompts."""
    one, many = (on(mesh, temperature=temperature) for mesh in (None, meshes.make_mesh(**SIZES)))
    for name in ("tokens", "kinds", "lengths", "permits", "truncated"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
    np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-4)
    np.testing.assert_allclose(many.memories, one.memories, atol=1e-4)
    called = [tuple(call.slot for call in v.calls(one, *member)) for member in members(one)]
    assert len(set(called)) > 2 and max(map(len, called)) > 1
