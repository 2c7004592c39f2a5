"""VisMem's query builder against torch's encoder, and what padding, masks and sizes promise."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import query_builder
from jaxmem.memory.query_builder import QueryBuilderConfig

CONFIG = QueryBuilderConfig(width=32, queries=5, heads=4, max_length=40)
STATES = 11
LENGTHS = (11, 7, 1, 0)
PADDINGS = ("left", "right", "scattered")

build = jax.jit(query_builder.build, static_argnums=0)
build_all = jax.jit(query_builder.build_all, static_argnums=0)


@functools.cache
def params_of(config):
    """From `init`, with norms and attention biases moved so that all of them matter."""
    params, draw = query_builder.init(jax.random.key(0), config), np.random.default_rng(1)
    moved = lambda leaf: leaf + 0.2 * draw.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(moved(leaf) if leaf.ndim < 3 else 2 * leaf), params)


def states(seed=0, rows=4, length=STATES, width=32):
    return np.random.default_rng(seed).normal(size=(rows, length, width)).astype(np.float32)


def validity(padding, length=STATES):
    """[B, H]: LENGTHS valid states in each row."""
    if padding == "left":
        return np.arange(length) >= length - np.array(LENGTHS)[:, None]
    if padding == "right":
        return np.arange(length) < np.array(LENGTHS)[:, None]
    places = [np.random.default_rng(row).permutation(length) for row in range(len(LENGTHS))]
    return np.stack([place < count for place, count in zip(places, LENGTHS, strict=True)])


def torch_encoder(config, params):
    """torch's own stack with the weights of `params`."""
    layer = torch.nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.ff_mult * config.width,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=True,
    )
    encoder = torch.nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
    norm = torch.nn.LayerNorm(config.width, eps=config.norm_eps)
    tensor = lambda leaf: torch.from_numpy(np.array(leaf))  # noqa: E731
    linear = lambda name, tree: {f"{name}.weight": tensor(tree["kernel"]).T, f"{name}.bias": tensor(tree["bias"])}  # noqa: E731
    scaled = lambda name, tree: {f"{name}.weight": tensor(tree["scale"]), f"{name}.bias": tensor(tree["bias"])}  # noqa: E731
    for at, module in enumerate(encoder.layers):
        ours = jax.tree.map(lambda leaf, at=at: leaf[at], params["layers"])
        attention = ours["attention"]
        module.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([tensor(attention[name]["kernel"]).T for name in "qkv"]),
                "self_attn.in_proj_bias": torch.cat([tensor(attention[name]["bias"]) for name in "qkv"]),
                **linear("self_attn.out_proj", attention["o"]),
                **linear("linear1", ours["ffn"]["fc1"]),
                **linear("linear2", ours["ffn"]["fc2"]),
                **scaled("norm1", ours["norm1"]),
                **scaled("norm2", ours["norm2"]),
            }
        )
    norm.load_state_dict({"weight": tensor(params["norm"]["scale"]), "bias": tensor(params["norm"]["bias"])})
    return encoder, norm


def torch_rows(config, params, hidden):
    """[H + K, D] of one row without padding [H, D]: the additive mask, one position per row."""
    encoder, norm = torch_encoder(config, params)
    length, total = len(hidden), len(hidden) + config.queries
    x = torch.cat([torch.from_numpy(hidden), torch.from_numpy(np.array(params["q_init"]))])
    x = x + torch.from_numpy(np.array(params["pos_emb"]))[:total]
    mask = torch.zeros(total, total)
    mask[:length, length:] = -torch.inf
    with torch.no_grad():
        return norm(encoder(x[None], mask))[0].numpy()


def test_check_01_shapes_and_hidden_rows_ignore_the_queries():
    params, hidden, valid = params_of(CONFIG), states(), validity("left")
    other = params | {"q_init": params["q_init"] + states(9, 1, 5)[0]}
    one, two = (np.asarray(build_all(CONFIG, p, hidden, valid)) for p in (params, other))
    assert build(CONFIG, params, hidden, valid).shape == (4, 5, 32)
    np.testing.assert_array_equal(build(CONFIG, params, hidden, valid), one[:, STATES:])
    np.testing.assert_array_equal(one[:, :STATES][valid], two[:, :STATES][valid])
    assert (np.abs(one - two)[:, STATES:].max(-1) > 1e-3).all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_check_02_queries_depend_on_every_valid_state_and_on_no_padding(padding):
    params, hidden, valid = params_of(CONFIG), states(), validity(padding)
    want = np.asarray(build(CONFIG, params, hidden, valid))
    for at in range(STATES):
        moved = hidden.copy()
        moved[:, at] = np.where(valid[:, at, None], moved[:, at] + np.linspace(-1, 1, 32), np.nan)
        change = np.abs(np.asarray(build(CONFIG, params, moved, valid)) - want).max((1, 2))
        assert (change[valid[:, at]] > 1e-4).all()
        assert (change[~valid[:, at]] == 0).all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_check_03_padded_rows_equal_their_unpadded_runs(padding):
    params, hidden, valid = params_of(CONFIG), states(), validity(padding)
    padded = np.asarray(build(CONFIG, params, hidden, valid))
    for row, count in enumerate(LENGTHS):
        alone = build(CONFIG, params, hidden[row : row + 1, valid[row]], np.ones((1, count), bool))
        np.testing.assert_allclose(padded[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, QueryBuilderConfig(48, 3, 3, 8, 2, 64, 1e-3)], ids=["default", "odd"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_check_04_equals_torch(config, padding):
    params, hidden, valid = params_of(config), states(width=config.width), validity(padding)
    ours = np.asarray(build_all(config, params, hidden, valid))
    kept = np.concatenate([valid, np.ones((len(valid), config.queries), bool)], 1)
    for row in range(len(LENGTHS)):
        want = torch_rows(config, params, hidden[row, valid[row]])
        np.testing.assert_allclose(ours[row, kept[row]], want, atol=1e-5)


def test_paper_eq10_takes_the_layers_input_as_the_residual():
    config = dataclasses.replace(CONFIG, residual="paper_eq10", layers=1)
    params, hidden, valid = params_of(config), states(), np.ones((4, STATES), bool)
    (got, plain) = (build_all(c, params, hidden, valid) for c in (config, dataclasses.replace(CONFIG, layers=1)))
    encoder, norm = torch_encoder(config, params)
    layer = encoder.layers[0]
    x = np.concatenate([hidden, np.broadcast_to(params["q_init"], (4, 5, 32))], 1) + params["pos_emb"][: STATES + 5]
    x, mask = torch.from_numpy(np.array(x)), torch.zeros(STATES + 5, STATES + 5)
    mask[:STATES, STATES:] = -torch.inf
    with torch.no_grad():
        inner = x + layer._sa_block(layer.norm1(x), mask, None)
        want = norm(x + layer._ff_block(layer.norm2(inner))).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - plain).max() > 0.1


def test_check_05_length_limit():
    params = params_of(CONFIG)
    longest = CONFIG.max_length - CONFIG.queries
    for length in (0, longest):
        made = build(CONFIG, params, states(0, 2, length), np.ones((2, length), bool))
        assert made.shape == (2, 5, 32) and np.isfinite(made).all()
    with pytest.raises(DataError, match="36 hidden states and 5 queries are 41 rows.*at most 35"):
        build(CONFIG, params, states(0, 2, longest + 1), np.ones((2, longest + 1), bool))
    published = QueryBuilderConfig(width=64)
    shape = lambda length: jax.eval_shape(  # noqa: E731
        functools.partial(query_builder.build, published),
        jax.eval_shape(lambda key: query_builder.init(key, published), jax.random.key(0)),
        jax.ShapeDtypeStruct((1, length, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, length), bool),
    )
    assert shape(2040).shape == (1, 8, 64) and shape(2040).dtype == jnp.bfloat16
    with pytest.raises(DataError, match="2041 hidden states"):
        shape(2041)


@pytest.mark.parametrize(
    ("width", "count"), [(2048, 104_931_328), (3584, 315_750_400), (5120, 639_815_680)], ids=["3B", "7B", "32B"]
)
def test_check_06_parameter_counts(width, count):
    config = QueryBuilderConfig(width)
    shapes = jax.eval_shape(lambda key: query_builder.init(key, config), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    assert shapes["q_init"].shape == (8, width) and shapes["pos_emb"].shape == (2048, width)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_names_and_shapes_of_the_parameters():
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params_of(CONFIG))
    }
    linear = lambda name, a, b: {f"layers/{name}/kernel": (2, a, b), f"layers/{name}/bias": (2, b)}  # noqa: E731
    scaled = lambda name: {f"layers/{name}/scale": (2, 32), f"layers/{name}/bias": (2, 32)}  # noqa: E731
    assert shapes == {
        "q_init": (5, 32),
        "pos_emb": (40, 32),
        "norm/scale": (32,),
        "norm/bias": (32,),
        **scaled("norm1"),
        **scaled("norm2"),
        **{k: v for name in "qkvo" for k, v in linear(f"attention/{name}", 32, 32).items()},
        **linear("ffn/fc1", 32, 128),
        **linear("ffn/fc2", 128, 32),
    }


def uniform(leaf, bound):
    """Draws of U(-bound, bound): none outside, the ends reached, and the variance of the distribution."""
    leaf = np.asarray(leaf, np.float64)
    assert np.abs(leaf).max() <= bound and leaf.max() > 0.95 * bound and leaf.min() < -0.95 * bound
    assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_distributions_at_the_start():
    config = QueryBuilderConfig(width=128, max_length=300)
    params = query_builder.init(jax.random.key(3), config)
    layers, d = params["layers"], config.width
    for name in ("q_init", "pos_emb"):
        assert np.std(params[name]) == pytest.approx(0.02, rel=0.05)
    for name in "qkv":
        uniform(layers["attention"][name]["kernel"], math.sqrt(6 / (4 * d)))
    uniform(layers["attention"]["o"]["kernel"], d**-0.5)
    for name, inputs in (("fc1", d), ("fc2", 4 * d)):
        uniform(layers["ffn"][name]["kernel"], inputs**-0.5)
        uniform(layers["ffn"][name]["bias"], inputs**-0.5)
    assert not any(np.any(layers["attention"][name]["bias"]) for name in "qkvo")
    for norm in (params["norm"], layers["norm1"], layers["norm2"]):
        assert (np.asarray(norm["scale"]) == 1).all() and not np.any(norm["bias"])


def test_twin_layers_start_alike_and_others_do_not():
    def same(twin):
        params = query_builder.init(jax.random.key(0), dataclasses.replace(CONFIG, twin_layers=twin))["layers"]
        return {
            name: bool((kernel[0] == kernel[1]).all())
            for name, kernel in (("q", params["attention"]["q"]["kernel"]), ("fc1", params["ffn"]["fc1"]["bias"]))
        }

    assert same(True) == {"q": True, "fc1": True}
    assert same(False) == {"q": False, "fc1": False}


def test_bfloat16_activations_with_float32_parameters():
    params, hidden, valid = params_of(CONFIG), states(), validity("left")
    wide = np.asarray(build(CONFIG, params, hidden, valid))
    narrow = build(CONFIG, params, jnp.asarray(hidden, jnp.bfloat16), valid)
    assert narrow.dtype == jnp.bfloat16
    error = np.abs(np.asarray(narrow, np.float32) - wide)
    assert error.max() < 0.15 and error.mean() < 0.02


def test_gradients_are_finite_reach_every_leaf_and_stop_at_padding():
    params, hidden, valid = params_of(CONFIG), jnp.asarray(states()), validity("scattered")
    loss = lambda params, hidden: jnp.sum(jnp.sin(build(CONFIG, params, hidden, valid)))  # noqa: E731
    grads, towards = jax.jit(jax.grad(loss, (0, 1)))(params, hidden)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        # A constant added to every key changes no softmax.
        is_key_bias = jax.tree_util.keystr(path, simple=True, separator="/") == "layers/attention/k/bias"
        assert is_key_bias or np.abs(leaf).max() > 1e-4, path
    used = np.abs(np.asarray(towards)).max(-1)
    assert (used[valid] > 0).all() and (used[~valid] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 32 is not a multiple of 5 heads"),
        ({"queries": 0}, "queries 0 must be at least 1"),
        ({"max_length": 5}, "max_length 5 leaves no room"),
        ({"residual": "postnorm"}, "'postnorm' is neither"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_shapes_that_do_not_fit():
    with pytest.raises(DataError, match=r"\(4, 11, 16\).*\[B, H, 32\]"):
        build(CONFIG, params_of(CONFIG), states(width=16), validity("left"))
    with pytest.raises(DataError, match=r"valid \(4, 10\)"):
        build(CONFIG, params_of(CONFIG), states(), validity("left")[:, 1:])
