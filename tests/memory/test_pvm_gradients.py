"""Acceptance checks 13 to 15 and 18 of PVM: the first state, the first gradients, and finite differences.

Checks 16 and 17 (what trains, what stays) are tests of the training step: tests/training/test_sft.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.api import Model
from jaxmem.backbones import decoder
from jaxmem.backbones.config import BackboneConfig, TextConfig
from jaxmem.checkpoints.huggingface import load_backbone, save_backbone
from jaxmem.memory import pvm
from jaxmem.model import Spec
from tests.memory import oracle
from tests.memory import world as w


def check_fresh(params):
    assert not np.any(params["gate_alpha"]) and params["gate_alpha"].dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            np.testing.assert_allclose(np.std(leaf, (1, 2)), 0.02, rtol=0.02, err_msg=str(path))
            assert np.all(np.abs(np.mean(leaf, (1, 2))) < 1e-3)
            assert np.mean(leaf[0] == leaf[1]) < 1e-3  # every layer draws its own
        elif path[-1].key == "scale":
            assert np.all(leaf == 1)


def test_check_13_fresh_parameters():
    check_fresh(jax.jit(pvm.init, static_argnums=1)(jax.random.key(0), pvm.create(w.BACKBONE, latent=512)))


def test_check_13_fresh_parameters_over_a_backbone_checkpoint(world, tmp_path):
    save_backbone(tmp_path, world.base, w.BACKBONE)
    loaded = Model(Spec(w.BACKBONE), load_backbone(tmp_path, w.BACKBONE), {}, None, tmp_path)
    check_fresh(jax.jit(lambda: loaded.attach("pvm", latent=512).memory["pvm"])())


@functools.partial(jax.jit, static_argnames=("backward_from", "remat"))
def gradient(params, base, batch, backward_from=0, remat=False):
    """Of the mean negative log-likelihood of the text, with respect to the memory."""

    def loss(params):
        forward = functools.partial(model.hidden_states, backward_from=backward_from, remat=remat)
        states = forward(w.WITH_CAUSAL, base, {"pvm": params}, batch)
        scores = jax.nn.log_softmax(model.logits(w.WITH_CAUSAL, base, states))[:, :-1]
        chosen = jnp.take_along_axis(scores, batch.tokens[:, 1:, None], -1)[..., 0]
        return -(chosen * batch.loss_mask[:, 1:]).sum() / batch.loss_mask[:, 1:].sum()

    return jax.grad(loss)(params)


def moved(tree):
    """{path: [slots] bool}: which tensors of which layers have a gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [bool(np.any(leaf[s])) for s in range(3)] for path, leaf in leaves}


def test_check_14_only_gates_learn_first_then_everything(world):
    batch, start = w.batch_of(w.rows_of(4)), world.closed["pvm"]
    first = gradient(start, world.base, batch)
    for path, slots in moved(first).items():
        assert slots == [path == "['gate_alpha']"] * 3, path
    updated = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, start, first)
    second = moved(gradient(updated, world.base, batch))
    assert len(second) == 15
    for path, slots in second.items():
        assert all(slots), path


def test_check_15_gates_and_output_map_at_zero_never_train(world):
    """Forbidden: every gradient carries alpha or passes through the output map (`pvm.init` says so)."""
    dead = {**world.closed["pvm"], "output_expander": {"kernel": jnp.zeros((3, 32, 48))}}
    for path, slots in moved(gradient(dead, world.base, w.batch_of(w.rows_of(4)))).items():
        assert not any(slots), path
    assert "dead" in pvm.init.__doc__


def test_no_backward_below_the_first_branch_gives_the_same_gradient(world):
    batch = w.batch_of(w.rows_of(4))
    whole = gradient(world.params, world.base, batch)
    short = gradient(world.params, world.base, batch, backward_from=w.WITH_CAUSAL.first_port_layer, remat=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        size = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(leaf, _at(short, path), atol=1e-5 * size, err_msg=str(path))


def _at(tree, path):
    return functools.reduce(lambda node, key: node[key.key], path, tree)


SMALL = TextConfig(layers=2, width=6, mlp_width=9, heads=4, kv_heads=2, head_dim=2, vocab=8, rope_section=(1, 0, 0))
NARROW = pvm.create(BackboneConfig("qwen3_vl", SMALL, w.BACKBONE.vision, 4, 5, 6, 7), layers=(1,), latent=8)


def narrow_case(config):
    """Parameters, residual, visual rows and a direction in which the output is measured, all float32 exact."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = w.batch_of([w.example((2, (1, 2), 2, (2, 1), 3), 0)], tokens=16, patches=20)
    x, visual, measure = draw(1, 16, 6), draw(1, 5, 6), draw(1, 1, 16, 6)
    return w.random_memory(config, 4, (0.7,)), x, visual, measure, batch


@pytest.mark.parametrize("visibility", ["causal", "all"])
def test_check_18_every_gradient_is_the_float64_finite_difference(visibility):
    """Central differences of the float64 oracle, for every single parameter and input of the branch."""
    config = dataclasses.replace(NARROW, visibility=visibility)
    params, x, visual, measure, batch = narrow_case(config)
    assert (config.heads, config.kv_heads, config.mlp_width) == (4, 2, 12)

    def ours(params, x, visual):
        out, _ = w.injected(config, params, visual, batch.visual_rows, decoder.stream_of(batch), x, None, None)
        return (out * measure).sum()

    seen = oracle.visible(config, np.asarray(batch.segments)[0], np.asarray(batch.visual_rows)[0], 5)

    def plain(params, x, visual):
        return (oracle.inject(config, oracle.slot(params, 0), x[0], visual[0], seen) * measure[0, 0]).sum()

    point = oracle.float64((params, x, visual))
    value, slopes = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(params, jnp.asarray(x), jnp.asarray(visual))
    assert float(value) == pytest.approx(plain(*point), abs=1e-5)
    leaves, structure = jax.tree.flatten(point)
    for number, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(slopes), strict=True)):
        differences = np.zeros_like(leaf)
        for place in np.ndindex(leaf.shape):
            sides = []
            for step in (1e-5, -1e-5):
                nudged = leaf.copy()
                nudged[place] += step
                sides.append(plain(*structure.unflatten([*leaves[:number], nudged, *leaves[number + 1 :]])))
            differences[place] = (sides[0] - sides[1]) / 2e-5
        size = np.abs(differences).max()
        assert size > 1e-3
        np.testing.assert_allclose(slope, differences, atol=2e-5 * max(1.0, size), err_msg=f"leaf {number}")
