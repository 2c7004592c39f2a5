"""Acceptance checks 8 to 12 of Vision Remember: its layers and blocks against float64 numpy, and what cannot matter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import resampling, vision_remember
from jaxmem.memory.resampling import CrossAttention, LayerSettings, SelfAttention, WholeTiles
from tests.memory import oracle as plain
from tests.memory import vision_oracle as oracle
from tests.memory import vision_world as v
from tests.memory import world as w

SMALL = LayerSettings(width=20, features=14, keys=9, inner=24, heads=3)
ROWS, TOKENS = 2, 5


@functools.partial(jax.jit, static_argnums=0)
def cross(settings: LayerSettings, params: Any, x: Any, windows: Any, mask: Any) -> Any:
    return CrossAttention(settings).apply({"params": params}, x, windows, mask)


@functools.partial(jax.jit, static_argnums=0)
def gradients(settings: LayerSettings, params: Any, x: Any, windows: Any, mask: Any, weights: Any) -> Any:
    loss = lambda *given: jnp.sum(weights * CrossAttention(settings).apply({"params": given[0]}, *given[1:], mask))  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2))(params, x, windows)


def params_of(settings: LayerSettings, seed: int = 0) -> Any:
    """Random parameters of a CrossAttention."""
    shapes = jax.eval_shape(lambda: CrossAttention(settings).init(jax.random.key(0), *arrays(settings)))["params"]
    return w.random_like(shapes, seed)


def arrays(settings: LayerSettings, seed: int = 1, tokens: int = TOKENS) -> tuple[Any, Any, Any]:
    """x, windows and a mask that leaves each window some keys, and one window none."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, tokens, settings.width))
    windows = 3 * rng.standard_normal((ROWS, tokens, settings.keys, settings.features)) + 1
    mask = rng.random((ROWS, tokens, settings.keys)) < 0.6
    mask[..., 2], mask[0, 1] = True, False
    return jnp.asarray(x, jnp.float32), jnp.asarray(windows, jnp.float32), jnp.asarray(mask)


VARIANTS = {
    "plain": {"positions": "none"},
    "bias": {},
    "embedding": {"positions": "embedding"},
    "saliency": {"saliency": "bias"},
}
KINDS = [dataclasses.replace(SMALL, **settings) for settings in VARIANTS.values()]
EVERY = pytest.mark.parametrize("settings", KINDS, ids=VARIANTS)


def by_hand(settings: LayerSettings, params: Any, x: Any, windows: Any, mask: Any, key_bias: Any = 0.0) -> np.ndarray:
    """The oracle, token by token."""
    p, x, windows, mask = plain.float64(params), plain.float64(x), plain.float64(windows), np.asarray(mask)
    out = np.zeros_like(x)
    config = Local(settings)
    for at in np.ndindex(x.shape[:2]):
        places = np.flatnonzero(mask[at]) if mask[at].any() else np.arange(settings.keys)
        out[at] = oracle.cross(config, p, x[at], windows[at][places], places, key_bias)
    return out


@dataclasses.dataclass(frozen=True)
class Local:
    """What the oracle asks of a config."""

    settings: LayerSettings
    local: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)


@EVERY
@pytest.mark.parametrize("impl", ["direct", "absorbed"])
def test_cross_attention_equals_the_oracle(settings, impl):
    settings = dataclasses.replace(settings, impl=impl)
    params, given = params_of(settings), arrays(settings)
    np.testing.assert_allclose(cross(settings, params, *given), by_hand(settings, params, *given), rtol=0, atol=5e-6)


@EVERY
def test_check_08_absorbed_equals_direct(settings):
    other, params, given = dataclasses.replace(settings, impl="absorbed"), params_of(settings), arrays(settings)
    np.testing.assert_allclose(cross(other, params, *given), cross(settings, params, *given), rtol=0, atol=1e-5)
    weights = np.random.default_rng(2).standard_normal((ROWS, TOKENS, settings.width)).astype(np.float32)
    one, two = (gradients(kind, params, *given, weights) for kind in (settings, other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.linalg.norm(a) > 0.01
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)


@EVERY
def test_check_08_absorbed_equals_direct_in_bfloat16(settings):
    params, (x, windows, mask) = params_of(settings), arrays(settings)
    given = x.astype(jnp.bfloat16), windows.astype(jnp.bfloat16), mask
    found = [cross(dataclasses.replace(settings, impl=impl), params, *given) for impl in ("direct", "absorbed")]
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    known = by_hand(settings, params, *given)
    a, b = (np.asarray(one, np.float64).ravel() for one in found)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    assert min(cosine(a, b), cosine(a, known.ravel()), cosine(b, known.ravel())) > 0.999


def test_check_09_a_bias_of_keys_changes_nothing():
    params, given = params_of(SMALL), arrays(SMALL)
    known = by_hand(SMALL, params, *given)
    bias = 5 * np.random.default_rng(3).standard_normal(SMALL.inner)
    np.testing.assert_allclose(by_hand(SMALL, params, *given, bias), known, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cross(SMALL, params, *given), by_hand(SMALL, params, *given, bias), rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", ["direct", "absorbed"])
def test_check_10_nothing_is_gathered(impl):
    settings = dataclasses.replace(SMALL, impl=impl)
    text = cross.lower(settings, params_of(settings), *arrays(settings)).compile().as_text()
    assert " gather(" not in text and " dot(" in text


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("impl", ["direct", "absorbed"])
def test_check_10_flops_are_those_of_the_formulas(impl, ratio):
    """The published sizes, one tile of 24x24 patches; nothing is computed."""
    width, features, inner, heads, tokens, keys = 1536, 3072, 1024, 16, (24 // ratio) ** 2, ratio**2
    settings = LayerSettings(width, features, keys, inner, heads, impl)
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct((1, tokens, *size), dtype)  # noqa: E731
    given = shape(width), shape(keys, features), shape(keys, dtype=bool)
    params = jax.eval_shape(lambda: CrossAttention(settings).init(jax.random.key(0), *map(jnp.zeros_like, given)))
    apply = lambda *given: CrossAttention(settings).apply(*given)  # noqa: E731
    spent = jax.jit(apply).lower(params, *given).cost_analysis()["flops"]
    project, mix = 4 * tokens * width * inner, 4 * tokens * keys
    known = {
        "direct": project + mix * features * inner + mix * inner,
        "absorbed": project + 4 * tokens * features * inner + mix * heads * features,
    }
    assert spent == pytest.approx(known[impl], rel=0.05)
    if ratio == 2:
        assert known[impl] / 1e9 == pytest.approx({"direct": 8.17, "absorbed": 2.85}[impl], rel=0.01)


@EVERY
def test_check_11_masked_keys_do_not_matter(settings):
    params, (x, windows, mask) = params_of(settings), arrays(settings)
    hidden = ~mask & mask.any(-1, keepdims=True)
    assert hidden.any()
    rng = np.random.default_rng(4)
    loud = jnp.where(hidden[..., None], 1e4 * rng.standard_normal(windows.shape), windows)
    found = cross(settings, params, x, windows, mask)
    np.testing.assert_array_equal(cross(settings, params, x, loud, mask), found)
    shut = cross(settings, params, x, loud, jnp.zeros_like(mask))
    assert np.isfinite(found).all() and np.isfinite(shut).all()
    np.testing.assert_allclose(shut, cross(settings, params, x, loud, jnp.ones_like(mask)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["direct", "absorbed"])
def test_check_12_weights_of_the_valid_keys_sum_to_one(impl):
    """The first feature is 1 everywhere, and values are made of it alone: what is found is the sum of the weights."""
    settings = dataclasses.replace(SMALL, impl=impl)
    params, given = params_of(settings), arrays(settings)
    params["norm_key"] = jax.tree.map(
        lambda leaf, one: leaf.at[0].set(one), params["norm_key"], {"scale": 0, "bias": 1}
    )
    params["v"] = {"kernel": jnp.zeros_like(params["v"]["kernel"]).at[0].set(1)}
    params["o"] = {"kernel": jnp.eye(settings.inner, settings.width), "bias": jnp.zeros(settings.width)}
    np.testing.assert_allclose(cross(settings, params, *given), 1, rtol=0, atol=1e-6)


def test_check_16_windows_belong_to_their_tokens_and_keys_to_their_places():
    params, (x, windows, mask) = params_of(SMALL), arrays(SMALL)
    found = cross(SMALL, params, x, windows, mask)
    turned = cross(SMALL, params, x, jnp.roll(windows, 1, axis=1), jnp.roll(mask, 1, axis=1))
    assert np.abs(np.asarray(turned - found)).max(-1).min() > 1e-2  # every token notices
    order = np.random.default_rng(5).permutation(SMALL.keys)
    moved = {**params, "position": params["position"][:, order]}
    np.testing.assert_allclose(
        cross(SMALL, moved, x, windows[:, :, order], mask[:, :, order]), found, rtol=0, atol=1e-6
    )
    unmoved = cross(SMALL, params, x, windows[:, :, order], mask[:, :, order])
    assert np.abs(np.asarray(unmoved - found)).max() > 1e-2


def test_whole_tiles_and_tokens_among_each_other_equal_the_oracle():
    settings = dataclasses.replace(SMALL, keys=0, positions="none")
    rng = np.random.default_rng(6)
    draw = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.float32)  # noqa: E731
    x, features, text = draw(ROWS, TOKENS, SMALL.width), draw(ROWS, 7, SMALL.features), draw(ROWS, 1, SMALL.width)
    mask = rng.random((ROWS, TOKENS, 7)) < 0.5
    mask[..., 3] = True
    init = lambda module, *given: w.random_like(  # noqa: E731
        jax.eval_shape(lambda: module(settings).init(jax.random.key(0), *given))["params"], 7
    )
    whole, config = init(WholeTiles, x, features, mask), Local(settings)
    found, p = WholeTiles(settings).apply({"params": whole}, x, features, mask), plain.float64(whole)
    for at in np.ndindex(ROWS, TOKENS):
        known = oracle.cross(config, p, plain.float64(x[at]), plain.float64(features)[at[0]][mask[at]], [])
        np.testing.assert_allclose(found[at], known, rtol=0, atol=5e-6)
    images = np.array([[1, 1, 2, 2, 2], [1, 0, 0, 3, 1]], np.int32)
    both = init(SelfAttention, x, text, images)
    p = plain.float64(both)
    for given in (text, None):
        found = SelfAttention(settings).apply({"params": both}, x, given, images)
        assert np.isfinite(found).all()
        for row in range(ROWS):
            for image in set(images[row].tolist()) - {0}:
                own = np.flatnonzero(images[row] == image)
                word = None if given is None else plain.float64(given)[row, 0]
                known = oracle.both(config, p, plain.float64(x)[row, own], word)
                np.testing.assert_allclose(np.asarray(found)[row, own], known, rtol=0, atol=5e-6)


BLOCKS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"preset": "vr_v2"},
    "weighted_sum": {"fusion": "weighted_sum", "saliency": "bias"},
    "joined_norm": {"level_norm": "joined", "positions": "embedding"},
    "joined_linear": {"level_norm": "joined", "fusion": "concat_linear", "positions": "none", "impl": "absorbed"},
    "halo": {"halo": 1, "impl": "absorbed"},
    "wide_halo": {"halo": 2, "levels": (0, -2), "saliency": "bias"},
    "ffn_vector_gate": {"ffn": True, "gate_shape": "vector"},
    "last_token": {"preset": "vr_v2", "text_token": "last_prompt_token", "order": "cross_then_self"},
    "pooled": {"preset": "vr_v2", "text_token": "attn_pool", "ffn": True, "gate_shape": "vector"},
    "no_text": {"preset": "vr_v2", "text_token": "none", "order": "cross_then_self", "levels": (2,)},
    "whole_tiles": {"local": False, "preset": "vr_v2"},
}


@functools.partial(jax.jit, static_argnums=(0, 5))
def acted(config: Any, params: Any, batch: Any, levels: Any, x: Any, per_tile: int = 4) -> Any:
    return v.act(config, params, batch, levels, x, 1, per_tile)


def compare(config: Any, batch: Any, per_tile: int = 4) -> None:
    """One block on random features and states, row by row, and what the other rows are."""
    params, levels, x = v.params_of(config), v.features(config, batch), v.stream_like(batch, config.width)
    found, p = np.asarray(acted(config, params, batch, levels, x, per_tile)), plain.float64(params)
    block = plain.slot(p["blocks"], 1)
    for row in range(len(x)):
        own = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row], batch)
        given = [plain.float64(levels[level])[row] for level in config.levels]
        known = oracle.remembered(config, p, block, plain.float64(x)[row], given, own, per_tile)
        np.testing.assert_allclose(found[row], known, rtol=0, atol=2e-5)
    assert np.abs(found - x).max() > 0.3


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_equals_the_oracle(name):
    backbone = v.llava()
    compare(v.config_of(backbone, **BLOCKS[name]), v.batch_of(backbone, padding="left"))


@pytest.mark.parametrize("settings", [{}, {"halo": 2, "positions": "embedding"}])
def test_a_block_with_a_window_around_each_patch_equals_the_oracle(settings):
    backbone = v.llava("mlp")
    assert v.config_of(backbone).margin == 1 and v.config_of(backbone).layer.keys == 9
    compare(v.config_of(backbone, **settings), v.batch_of(backbone, ("several", "text")), v.TILE)


@pytest.mark.parametrize("preset", v.PRESETS)
def test_a_block_behind_a_projector_without_a_grid_equals_the_oracle(preset):
    backbone = v.llava("resampler", queries=3, width=8, heads=2, depth=1)
    compare(v.config_of(backbone, preset, local=False), v.batch_of(backbone), 3)


@pytest.mark.parametrize("preset", v.PRESETS)
@pytest.mark.parametrize("family", v.QWEN)
def test_a_block_behind_merged_patches_equals_the_oracle(family, preset):
    backbone = v.qwen(family)
    for local in (True, False):
        compare(v.config_of(backbone, preset, local=local), v.batch_of(backbone))


def test_no_question_is_never_everything():
    """Where a row marks none of its tokens, what stands for the question depends on none of them."""
    backbone = v.llava()
    batch = v.batch_of(backbone, ("square",))
    batch = batch.replace(question=jnp.zeros_like(batch.question))
    for token in ("question_mean", "attn_pool"):
        config = v.config_of(backbone, "vr_v2", text_token=token)
        params, levels, x = v.params_of(config), v.features(config, batch), v.stream_like(batch, config.width)
        vision = v.Kinds(batch, config.cells.first).vision
        louder = jnp.where(vision[..., None], x, 5 * x)
        found = [acted(config, params, batch, levels, given)[vision] for given in (x, louder)]
        np.testing.assert_array_equal(*found)


def test_fresh_parameters_are_as_described():
    init = jax.jit(vision_remember.init, static_argnums=1)
    scalar = init(jax.random.key(3), v.config_of(v.llava(), fusion="weighted_sum"))
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(scalar))
    assert not np.any(scalar["blocks"]["cross"]["gate"]) and np.allclose(scalar["fusion"]["weights"], 1 / 3)
    config = v.config_of(v.llava(), "vr_v2", gate=0.25, gate_shape="vector", ffn=True, saliency="bias")
    params = init(jax.random.key(3), config)
    np.testing.assert_array_equal(params["blocks"]["cross"]["gate"], np.full((2, config.width), 0.25))
    assert not np.any(params["blocks"]["ffn"]["fc2"]["kernel"]) and not np.any(params["blocks"]["cross"]["saliency"])
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(params))
    kernel = np.asarray(params["blocks"]["cross"]["k"]["kernel"])
    assert not np.array_equal(*kernel) and np.std(kernel) == pytest.approx(0.02, rel=0.1)
    assert resampling.EPS == 1e-6
