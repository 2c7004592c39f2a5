"""Acceptance check 34 of PVM: every way of cutting the model gives what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.distributed import mesh as meshes
from tests.memory import world as w

MESHES = {
    "dp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"tensor": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


@functools.partial(jax.jit, static_argnums=0)
def loss_and_slopes(spec, base, memory, batch):
    """Hidden states, and the gradient of a loss with respect to the memory."""

    def loss(memory):
        states = model.hidden_states(spec, base, memory, batch, backward_from=spec.first_port_layer)
        scores = jax.nn.log_softmax(model.logits(spec, base, states))[:, :-1]
        chosen = jnp.take_along_axis(scores, batch.tokens[:, 1:, None], -1)[..., 0]
        return -(chosen * batch.loss_mask[:, 1:]).sum() / batch.loss_mask[:, 1:].sum(), states

    slopes, states = jax.grad(loss, has_aux=True)(memory)
    return states, slopes


@pytest.fixture(scope="module")
def single(world):
    batch = w.batch_of(w.rows_of(12) + w.rows_of(13))
    return batch, jax.tree.map(np.array, loss_and_slopes(w.WITH_CAUSAL, world.base, world.memory, batch))


@pytest.mark.parametrize("name", MESHES)
def test_check_34_sharded_equals_one_device(world, single, name):
    batch, (states, slopes) = single
    mesh = meshes.make_mesh(**MESHES[name])
    base = jax.device_put(world.base, meshes.shardings(mesh, world.base))
    memory = jax.device_put(world.memory, meshes.shardings(mesh, world.memory))
    placed = jax.device_put(batch, meshes.batch_sharding(mesh))
    assert len(placed.tokens.sharding.device_set) == mesh.size
    pieces = memory["pvm"]["text_reducer"]["kernel"].addressable_shards[0].data.shape
    assert pieces == (3, 48 // mesh.shape["fsdp"], 32)
    heads = base["layers"]["attention"]["q"]["kernel"].addressable_shards[0].data.shape
    assert heads == (5, 48 // mesh.shape["fsdp"], 64 // mesh.shape["tensor"])
    assert memory["pvm"]["cross_attn"]["k"]["kernel"].sharding.is_fully_replicated
    ours, grads = loss_and_slopes(w.WITH_CAUSAL, base, memory, placed)
    np.testing.assert_allclose(ours, states, rtol=0, atol=1e-5)
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(leaf, want, atol=1e-5 * max(1e-2, np.abs(want).max()), err_msg=str(path))
