"""CoMEM on meshes of eight devices: training learns, and sampling draws, what one device does."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.knowledge import behind_items
from jaxmem.data.positions import mrope_positions, patch_tables
from jaxmem.distributed import mesh as meshes
from jaxmem.memory import comem
from jaxmem.model import Spec
from jaxmem.training import trees
from tests.distributed import world as w
from tests.memory.comem_world import noisy

CONFIG = comem.create(w.BACKBONE, latents=4, depth=2, heads=4, rank=4, alpha=1.0, dropout=0.0)
SPEC = Spec(w.BACKBONE, (CONFIG,))
ROWS, NEW = 4, 12
ONE = "one device"
MESHES = {
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 4 x sequence 2": {"fsdp": 4, "sequence": 2},
}


def row(rng, text, grid):
    """A random row with one image of `grid` patches."""
    vision, cells = w.BACKBONE.vision, grid[0] * grid[1] // w.BACKBONE.vision.merge_unit
    tables = patch_tables([(1, *grid)], vision.table_side, vision.merge_size)
    tokens = rng.integers(10, w.IMAGE, text + cells).astype(np.int32)
    tokens[2 : 2 + cells] = w.IMAGE
    return Example(
        tokens=tokens,
        positions=mrope_positions(len(tokens), [(2, (1, *grid))], vision.merge_size),
        loss_mask=(np.arange(len(tokens)) >= len(tokens) - 4).astype(np.float32),
        visual_rows=np.where(tokens == w.IMAGE, np.arange(len(tokens)) - 2, -1).astype(np.int32),
        patches=rng.normal(size=(grid[0] * grid[1], vision.patch_dim)).astype(np.float32),
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
    )


@functools.cache
def batch():
    """Rows with 3, 1, 2 and no items."""
    rng = np.random.default_rng(0)
    rows = [
        behind_items(row(rng, 20 + i, (4, 4)), [row(rng, 10 + j, (2, 4)) for j in range(count)], CONFIG, 1)
        for i, count in enumerate((3, 1, 2, 0))
    ]
    return collate(rows, Buckets((48,), (16,), (3,), (16,), (8,)), 1)


@functools.cache
def whole():
    memory = noisy(comem.init(jax.random.key(1), CONFIG))
    return {"base": w.tree()["base"], "memory": {"comem": jax.device_get(memory)}}


def mesh_of(name):
    return None if name == ONE else meshes.make_mesh(**MESHES[name])


@functools.cache
def learnt(name):
    return w.learn(SPEC, whole(), batch(), "memory", mesh_of(name))


@functools.cache
def sampled(name):
    return w.draw(SPEC, whole(), batch(), NEW, mesh_of(name))


@pytest.mark.parametrize("name", MESHES)
def test_check_26_training_equals_one_device(name):
    w.assert_learnt_alike(learnt(name), learnt(ONE), 1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_sampling_equals_one_device(name):
    w.assert_drawn_alike(sampled(name), sampled(ONE))


def test_weights_are_cut_to_pieces():
    mesh = mesh_of("fsdp 4 x sequence 2")
    places = meshes.shardings(mesh, whole()["memory"])
    cut = {path: place.spec for path, place in trees.leaves(places)}
    large = [path for path, leaf in trees.leaves(whole()["memory"]) if leaf.size >= 4096 and "lora" not in path]
    assert large and all(any(axis for axis in cut[path]) for path in large), {path: cut[path] for path in large}
