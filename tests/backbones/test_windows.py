"""Attention in windows against a brute-force loop, and the windowed tower on meshes and in gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import qwen2_5_vl, vision
from jaxmem.backbones.batch import Batch, text_batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.backbones.windows import attend_in_windows, by_window, reorder
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.positions import patch_tables
from jaxmem.distributed.mesh import current, make_mesh, shardings

SIZES = {"depth": 4, "width": 32, "mlp_width": 44, "heads": 4, "out_width": 64, "patch_size": 14, "table_side": 0}
TOWER = VisionConfig(**SIZES, norm="rms", mlp="swiglu", patch_bias=False, window=2, full_blocks=(2,))
TEXT = TextConfig(2, 64, 96, 4, 2, 16, 160, qk_norm=False, qkv_bias=True, rope_interleaved=False)
BACKBONE = BackboneConfig("qwen2_5_vl", TEXT, TOWER, 156, 157, 158, 159, False, 2.0)
GRIDS = [[(1, 10, 6), (2, 2, 14)], [(1, 4, 4)], [(3, 6, 8)]]  # windows of 1 to 4 cells; rows of unequal length


def example(grids: list, seed: int) -> Example:
    """A row of visual tokens alone."""
    tables = patch_tables(grids, 0, 2, TOWER.window)
    count = len(tables.segments)
    patches = np.random.default_rng(seed).standard_normal((count, TOWER.patch_dim)).astype(np.float32)
    places = np.arange(count // 4, dtype=np.int32)
    return Example(
        tokens=np.full(count // 4, 156, np.int32),
        positions=np.stack([places] * 3),
        loss_mask=np.zeros(count // 4, np.float32),
        visual_rows=places,
        patches=patches,
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
        patch_windows=tables.windows,
    )


def batch() -> Batch:
    return collate([example(grids, i) for i, grids in enumerate(GRIDS)], Buckets(tokens=(64,), patches=(160,)))


def tower() -> dict:
    """Random weights, norms and biases included."""
    shapes, rng = jax.eval_shape(lambda: vision.init(jax.random.key(0), TOWER)), np.random.default_rng(7)
    noise = lambda s: rng.standard_normal(s.shape) / (s.shape[-2] ** 0.5 if len(s.shape) > 1 else 2)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(noise(s), jnp.float32), shapes)


@pytest.mark.parametrize(("length", "reach"), [(5, 16), (16, 16), (37, 4), (37, 16)])
def test_windows_equal_a_loop_over_queries(length, reach):
    rng, heads, width = np.random.default_rng(length), 2, 8
    sizes, numbers = rng.integers(1, reach + 1, (2, length)), np.zeros((2, length), np.int32)
    for row in range(2):  # as many patches per number as fit, then padding
        run = np.repeat(np.arange(1, length + 1), sizes[row])[: length - 3 * row]
        numbers[row, : len(run)] = run
    query, key, value = rng.standard_normal((3, 2, length, heads, width)).astype(np.float32)
    found = attend_in_windows(jnp.asarray(numbers), reach)(*map(jnp.asarray, (query, key, value)))
    for row, place in np.argwhere(numbers > 0):
        mates = numbers[row] == numbers[row, place]
        for head in range(heads):
            scores = key[row, mates, head].astype(np.float64) @ query[row, place, head] / width**0.5
            weights = np.exp(scores - scores.max())
            want = weights @ value[row, mates, head] / weights.sum()
            ours = found[row, place].reshape(heads, width)[head]
            np.testing.assert_allclose(ours, want, atol=1e-5, rtol=0)
    assert np.isfinite(found).all()


def test_cells_of_a_window_stand_together_and_find_back():
    windows = jnp.asarray(batch().patch_windows)
    order = by_window(windows, 4)
    sorted_windows = np.asarray(reorder(windows, order, 4))
    for row in sorted_windows:
        held = row[row > 0]
        assert (np.diff(held) >= 0).all() and not row[len(held) :].any()
        assert np.bincount(held).max() <= TOWER.window_patches
    np.testing.assert_array_equal(reorder(jnp.asarray(sorted_windows), jnp.argsort(order, axis=1), 4), windows)


def everywhere(params, batch):
    """The same tower with windows as masks on whole rows: no order, no neighbours."""
    windows, frames = jnp.asarray(batch.patch_windows), jnp.asarray(batch.patch_segments)
    x = vision._patch_rows(TOWER, params, batch)
    angle = vision._axial_angles(jnp.asarray(batch.patch_coords), TOWER)
    for i in range(TOWER.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        among = vision._in_frames(frames if i in TOWER.full_blocks else windows)
        x = vision._Block(TOWER).apply({"params": block}, x, angle, among)
    return vision._Merger(TOWER, False).apply({"params": params["merger"]}, x)


def outcome(function, params):
    """Rows of real cells, and the gradient of their squares."""
    real = jnp.asarray(batch().patch_windows)[:, ::4, None] > 0
    rows = lambda params: jnp.where(real, function(params, batch()), 0)  # noqa: E731
    return jax.jit(lambda params: (rows(params), jax.grad(lambda p: (rows(p) ** 2).mean())(params)))(params)


@functools.cache
def masked():
    return outcome(everywhere, tower())


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2)], ids=["one", "eight"])
def test_the_tower_equals_windows_as_masks(sizes):
    """Rows and gradients: on one device, and on a mesh that cuts rows, patches and heads."""
    params, known = tower(), masked()
    mesh = sizes and make_mesh(*sizes)
    with current(mesh):
        placed = jax.device_put({"visual": params}, shardings(mesh, {"visual": params})) if mesh else {"visual": params}
        found = outcome(lambda params, some: vision.see(TOWER, params, some).rows, placed["visual"])
    for ours, want in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(ours, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


def test_a_batch_without_windows_is_refused():
    base = jax.eval_shape(lambda: qwen2_5_vl.init(jax.random.key(0), BACKBONE))
    bare = dataclasses.replace(batch(), patch_windows=None)
    with pytest.raises(ValueError, match="no patch_windows: encode it anew"):
        jax.eval_shape(lambda base: qwen2_5_vl.see(BACKBONE, base, bare), base)
    assert qwen2_5_vl.see(BACKBONE, base, text_batch(jnp.ones((1, 4)), patch_dim=TOWER.patch_dim)) is None
