"""CoMEM's Q-Former against the published equations in torch, and what padding, order and depth promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import q_former
from jaxmem.memory.q_former import QFormerConfig

CONFIG = QFormerConfig(width=24, in_width=20, latents=3, depth=4, heads=2, head_dim=10)
UNSHARED = dataclasses.replace(CONFIG, shared=False)
FULL = QFormerConfig(width=3584, in_width=3584)
ITEM = 9
LENGTHS = (9, 5, 1, 0)

compress = jax.jit(q_former.compress, static_argnums=0)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(config):
    return jax.eval_shape(lambda: q_former.init(jax.random.key(0), config))


@functools.cache
def params_of(config):
    """From `init`, with lively weights, and norms and biases moved so that all of them matter."""
    params, draw = q_former.init(jax.random.key(0), config), np.random.default_rng(1)
    moved = lambda leaf: leaf + 0.2 * draw.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(moved, params)


def states(seed=0, rows=4, length=ITEM, width=CONFIG.in_width):
    return np.random.default_rng(seed).normal(size=(rows, length, width)).astype(np.float32)


def left_padded(length=ITEM):
    return np.arange(length) >= length - np.array(LENGTHS)[:, None]


def oracle(config, params, hidden, valid, dtype=torch.float32):
    """Section 1.4 as it is printed: every pass makes all keys and values anew, over item and latents together."""
    tensor = lambda leaf: torch.from_numpy(np.array(leaf)).to(dtype)  # noqa: E731
    p = jax.tree.map(tensor, params)

    def norm(x, part):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], part["scale"], part["bias"], config.norm_eps)

    linear = lambda x, part: x @ part["kernel"] + part.get("bias", 0)  # noqa: E731
    split = lambda x: x.reshape(*x.shape[:2], config.heads, config.head_dim).transpose(1, 2)  # noqa: E731
    x, mask = linear(tensor(hidden), p["proj_in"]), torch.from_numpy(np.asarray(valid))
    z = p["latents"].expand(len(x), -1, -1)
    sees = torch.cat([mask, torch.ones(len(x), config.latents, dtype=torch.bool)], 1)[:, None, None]
    for step in range(config.depth):
        b = p["block"] if config.shared else jax.tree.map(lambda leaf, at=step: leaf[at], p["blocks"])
        normed = norm(z, b["norm_latents"])
        both = linear(torch.cat([norm(x, b["norm_item"]), normed], 1), b["kv"])
        key, value = (split(part) for part in both.chunk(2, dim=-1))
        quarter = config.head_dim**-0.25
        scores = (split(linear(normed, b["q"])) * quarter) @ (key * quarter).transpose(-1, -2)
        scores = scores.masked_fill(~sees, -torch.finfo(dtype).max)
        found = scores.float().softmax(-1).to(dtype) @ value
        z = z + linear(found.transpose(1, 2).flatten(2), b["o"])
        z = z + linear(torch.nn.functional.gelu(linear(norm(z, b["norm_ffn"]), b["fc1"])), b["fc2"])
    return norm(linear(z, p["proj_out"]), p["norm_out"]).float().numpy()


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_check_01_the_published_number_of_parameters_at_every_depth(depth):
    tree = shapes(dataclasses.replace(FULL, depth=depth))
    assert size(tree) == 179_895_296 == 14 * 3584**2 + 18 * 3584
    assert len(jax.tree.leaves(tree)) == 18


@pytest.mark.parametrize("config", [CONFIG, UNSHARED, dataclasses.replace(CONFIG, depth=1, in_width=24)])
def test_check_05_equals_torch(config):
    hidden, valid = states(width=config.in_width), left_padded()
    found = compress(config, params_of(config), hidden, valid)
    np.testing.assert_allclose(found, oracle(config, params_of(config), hidden, valid), rtol=0, atol=1e-5)


def test_check_05_equals_torch_in_bf16():
    hidden, valid, params = states(), left_padded(), q_former.init(jax.random.key(0), CONFIG)
    found = compress(CONFIG, params, hidden.astype(jnp.bfloat16), valid)
    assert found.dtype == jnp.bfloat16
    theirs = oracle(CONFIG, params, hidden, valid, torch.bfloat16)
    np.testing.assert_allclose(found.astype(np.float32), theirs, rtol=0, atol=2e-2)


@pytest.mark.slow  # 180 M parameters in both
def test_check_05_equals_torch_at_full_size():
    params, hidden = q_former.init(jax.random.key(0), FULL), states(rows=2, length=50, width=3584)
    valid = np.arange(50) >= np.array([[0], [13]])
    found = compress(FULL, params, hidden, valid)
    np.testing.assert_allclose(found, oracle(FULL, params, hidden, valid), rtol=0, atol=1e-5)


def test_check_06_keys_made_once_equal_keys_made_in_every_pass():
    """A block that is repeated is an unshared one whose passes are all alike, which makes keys in each."""
    hidden, valid, params = states(), left_padded(), params_of(CONFIG)
    repeated = {**params, "blocks": jax.tree.map(lambda leaf: jnp.stack([leaf] * CONFIG.depth), params["block"])}
    again = compress(UNSHARED, repeated, hidden, valid)
    np.testing.assert_allclose(compress(CONFIG, params, hidden, valid), again, rtol=0, atol=1e-6)


def test_check_07_padding_order_and_other_items_do_not_matter():
    hidden, valid, params = states(), left_padded(), params_of(CONFIG)
    known = compress(CONFIG, params, hidden, valid)
    padded = np.concatenate([np.full((len(hidden), 6, CONFIG.in_width), np.nan, np.float32), hidden], 1)
    wider = compress(CONFIG, params, padded, np.pad(valid, ((0, 0), (6, 0))))
    np.testing.assert_allclose(wider, known, rtol=0, atol=5e-6)
    order = np.random.default_rng(2).permutation(ITEM)
    moved = compress(CONFIG, params, hidden[:, order], valid[:, order])
    np.testing.assert_allclose(moved, known, rtol=0, atol=1e-5)
    for row, length in enumerate(LENGTHS):
        alone = compress(CONFIG, params, hidden[row : row + 1, ITEM - length :], np.ones((1, length), bool))
        np.testing.assert_allclose(alone[0], known[row], rtol=0, atol=1e-5)


def test_check_08_fresh_embeddings_have_mean_0_and_deviation_1():
    found = compress(CONFIG, q_former.init(jax.random.key(0), CONFIG), 5 * states(), left_padded())
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(-1), 1, atol=0.05)


def test_check_09_an_item_of_padding_gives_finite_numbers_and_gradients():
    def loss(params):
        return jnp.sum(compress(CONFIG, params, states(), np.zeros((len(LENGTHS), ITEM), bool)) ** 3)

    value, gradient = jax.value_and_grad(loss)(params_of(CONFIG))
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient["proj_in"]["kernel"]) and np.any(gradient["latents"])


def test_check_10_passes_of_their_own_have_depth_times_the_block():
    shared, own = shapes(CONFIG), shapes(UNSHARED)
    assert size(own["blocks"]) == CONFIG.depth * size(shared["block"])
    assert size(own) - size(own["blocks"]) == size(shared) - size(shared["block"])


def test_fresh_weights_have_the_published_distributions():
    params = q_former.init(jax.random.key(3), dataclasses.replace(CONFIG, width=96, in_width=96, head_dim=48))
    for name, part in {**params["block"], "proj_in": params["proj_in"], "proj_out": params["proj_out"]}.items():
        if "kernel" in part:
            assert np.std(part["kernel"]) == pytest.approx(0.02, rel=0.05), name
    assert np.std(params["latents"]) == pytest.approx(96**-0.5, rel=0.1)
    assert not np.any(params["proj_in"]["bias"]) and np.all(params["norm_out"]["scale"] == 1)


def test_faults_are_named():
    with pytest.raises(ConfigError, match="Q-Former: latents 0 must be at least 1; depth -1 must be"):
        QFormerConfig(width=8, in_width=8, latents=0, depth=-1)
    with pytest.raises(DataError, match=r"\(4, 9, 7\) with valid \(4, 9\) are not \[B, L, 20\]"):
        q_former.compress(CONFIG, params_of(CONFIG), states(width=7), left_padded())
