"""Acceptance check 34 of PVM: every way of cutting the model gives what one device gives."""

import jax
import numpy as np
import pytest

from jaxmem.distributed import mesh as meshes
from tests.memory import world as w
from tests.memory.test_pvm_gradients import gradient


def placed(world, batch, sizes):
    """The two trees and the batch on a mesh, cut by the library's rules."""
    mesh = meshes.make_mesh(**sizes)
    base = jax.device_put(world.base, meshes.shardings(mesh, world.base))
    memory = jax.device_put(world.memory, meshes.shardings(mesh, world.memory))
    batch = jax.device_put(batch, meshes.batch_shardings(mesh, batch))
    assert len(batch.tokens.sharding.device_set) == mesh.size
    piece = lambda leaf: leaf.addressable_shards[0].data.shape  # noqa: E731
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    assert piece(memory["pvm"]["text_reducer"]["kernel"]) == (3, 48 // fsdp, 32)
    assert piece(base["layers"]["attention"]["q"]["kernel"]) == (5, 48 // fsdp, 64 // tensor)
    assert piece(batch.tokens) == (len(batch.tokens) // mesh.shape["data"] // fsdp, w.TOKENS)
    assert memory["pvm"]["cross_attn"]["k"]["kernel"].sharding.is_fully_replicated  # few key heads stay whole
    return base, memory, batch


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"tensor": 4}], ids=["dp", "fsdp", "tp"])
def test_check_34_sharded_equals_one_device(world, sizes):
    halves = [w.rows_of(12), w.rows_of(13)]
    want = [w.hidden(w.WITH_CAUSAL, world.base, world.memory, w.batch_of(rows)) for rows in halves]
    base, memory, batch = placed(world, w.batch_of(sum(halves, [])), sizes)
    ours = w.quick_hidden(w.WITH_CAUSAL, base, memory, batch)
    valid = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(np.asarray(ours)[valid], np.concatenate(want)[valid], rtol=0, atol=1e-5)


def test_check_34_sharded_gradient_equals_one_device(world):
    batch = w.batch_of(w.rows_of(12))
    want = gradient(world.params, world.base, batch)
    base, memory, batch = placed(world, batch, {"data": 2, "fsdp": 2, "tensor": 2})
    ours = gradient(memory["pvm"], base, batch)
    for (path, leaf), known in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(want), strict=True):
        size = np.abs(known).max()
        assert size > 0
        np.testing.assert_allclose(leaf, known, rtol=0, atol=1e-5 * size, err_msg=str(path))
