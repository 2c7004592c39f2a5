"""Every mesh computes what one device computes, and nothing large lies whole on every device."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmem.backbones import qwen
from jaxmem.backbones.published import PUBLISHED
from jaxmem.distributed import mesh as meshes
from jaxmem.errors import ConfigError
from jaxmem.memory import pvm
from jaxmem.model import Spec, init_memory
from jaxmem.training import descent, trees
from tests.distributed import world as w

EVERYTHING, MEMORY = ("**", "!base/visual"), "memory"
ONE = "1x1"
OTHERS = [name for name in w.MESHES if name != ONE]
RARE = ("fsdp 8 x tensor 1", "data 8", "fsdp 2 x tensor 4", "sequence 4 x tensor 2")  # the others have the same axes
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in OTHERS]


@functools.cache
def outcome(kind, name, trainable):
    make = w.MESH[name]
    return {"supervised": w.supervised, "reinforced": w.reinforced}[kind](make and make(), trainable)


def assert_close(ours, known):
    """Every number to 1e-5, and to 1e-4 of the largest in its leaf."""
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(known), strict=True):
        largest = np.abs(want).max()
        assert largest > 0, path
        np.testing.assert_allclose(leaf, want, rtol=0, atol=min(1e-5, 1e-4 * largest), err_msg=str(path))


@pytest.mark.parametrize("name", MARKED)
def test_supervised_steps_equal_those_of_one_device(name):
    supervised_steps(name, EVERYTHING)


def test_steps_of_a_memory_on_a_frozen_backbone_equal_those_of_one_device():
    supervised_steps("data 2 x fsdp 2 x tensor 2", MEMORY)


def supervised_steps(name, trainable):
    ours, known = outcome("supervised", name, trainable), outcome("supervised", ONE, trainable)
    np.testing.assert_allclose(ours.losses, known.losses, rtol=1e-5)
    assert known.losses[1] < known.losses[0]
    assert_close(ours.grads, known.grads)


@pytest.mark.parametrize("name", MARKED)
def test_sampled_tokens_and_updates_equal_those_of_one_device(name):
    ours, known = outcome("reinforced", name, EVERYTHING), outcome("reinforced", ONE, EVERYTHING)
    np.testing.assert_array_equal(ours.rolled.tokens, known.rolled.tokens)
    np.testing.assert_array_equal(ours.rolled.lengths, known.rolled.lengths)
    np.testing.assert_allclose(ours.rolled.logprobs, known.rolled.logprobs, rtol=0, atol=1e-5)
    assert len(np.unique(known.rolled.lengths)) > 1  # some end early, so rows differ in what they do
    np.testing.assert_allclose(ours.losses, known.losses, rtol=0, atol=1e-5)
    assert_close(ours.grads, known.grads)


@pytest.mark.parametrize("kind", ["supervised", "reinforced"])
@pytest.mark.parametrize("name", MARKED)
def test_steps_leave_every_leaf_where_the_rules_want_it(kind, name):
    state = outcome(kind, name, EVERYTHING).state
    mesh = w.MESH[name]()
    wanted = meshes.shardings(mesh, state)
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), path


@pytest.mark.parametrize("name", ["Qwen3-VL-4B", "Qwen3-VL-8B", "Qwen2-VL-7B", "Qwen2.5-VL-7B"])
@pytest.mark.parametrize("sizes", [(1, 16, 1, 1), (1, 4, 4, 1), (1, 1, 8, 2), (2, 8, 1, 4), (1, 4, 8, 2)])
def test_no_weight_or_moment_above_one_megabyte_lies_whole_everywhere(name, sizes):
    """The real sizes, read from the shardings of weights, memory, optimizer and LoRA-free state."""
    mesh = AbstractMesh(sizes, meshes.AXES, (AxisType.Auto,) * 4)
    backbone = PUBLISHED[f"{name}-Instruct"]
    spec = Spec(backbone, (pvm.create(backbone),))
    memory = jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))
    tree = {"base": qwen.shapes(backbone, jnp.bfloat16), "memory": memory}
    train, frozen = trees.split(tree, EVERYTHING)
    state = jax.eval_shape(lambda tree: descent.init_state(w.OPTIMIZER, tree, 0), train)
    whole = []
    places = jax.tree.leaves(meshes.shardings(mesh, (state, frozen)))
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path((state, frozen)), places, strict=True):
        count = math.prod(leaf.shape) * leaf.dtype.itemsize
        if place.is_fully_replicated and count > 2**20:
            whole.append((jax.tree_util.keystr(path), leaf.shape))
    assert not whole
    per_device = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves((state, frozen)), places, strict=True)
    )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, frozen)))
    cuts = math.prod(sizes[1:])
    assert per_device < 1.03 * total / cuts


def test_what_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"data=1 x fsdp=3 x sequence=1 x tensor=3 needs 9 devices, there are 8"):
        meshes.make_mesh(fsdp=3, tensor=3)
    with pytest.raises(ConfigError, match="needs a multiple of 3 devices, there are 8"):
        meshes.make_mesh(fsdp=-1, tensor=3)
    with pytest.raises(ConfigError, match="one of them may be -1"):
        meshes.make_mesh(fsdp=-1, data=-1)
    assert dict(meshes.make_mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
