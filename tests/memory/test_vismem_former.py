"""VisMem's formers against plain numpy: acceptance checks 7 to 12, and 3 for formers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import lora
from jaxmem.backbones import decoder, qwen3_vl
from jaxmem.backbones.layers import rms_normalise
from jaxmem.memory import former, vismem
from jaxmem.memory.former import Seen
from tests.memory import oracle, vismem_oracle
from tests.memory import vismem_world as v

VISUAL, TEXT, WIDTH = (9, 5, 0, 3), (6, 2, 1, 4), 48  # valid states of every row
KINDS = np.array([0, 1, 1, 0], np.int32)
prefix = jax.jit(former.prefix, static_argnames=("config", "backbone"))


@pytest.fixture(scope="module")
def base() -> Any:
    return v.base_of()


@pytest.fixture(scope="module")
def params() -> Any:
    return v.memory_of()["vismem"]


def seen(lengths: tuple[int, ...], seed: int, padding: str) -> Seen:
    """States of four rows; what stands in the padding is far too large to go unnoticed."""
    draw, width = np.random.default_rng(seed), max(lengths)
    place, count = np.arange(width), np.array(lengths)[:, None]
    valid = place < count if padding == "right" else place >= width - count
    rows = draw.normal(size=(*valid.shape, WIDTH)).astype(np.float32)
    return Seen(np.where(valid[..., None], rows, 100.0).astype(np.float32), valid)


LOOKED, SPOKEN = seen(VISUAL, 1, "right"), seen(TEXT, 2, "left")


def formed(base: Any, params: Any, kinds: Any = KINDS, **past: Any) -> list[np.ndarray]:
    """The memory of every row, as long as its type says."""
    out = np.asarray(v.form(v.CONFIG, v.BACKBONE, base, params, LOOKED, SPOKEN, kinds, **past))
    assert out.shape == (4, v.CONFIG.longest, WIDTH)
    return [one[: v.CONFIG.sizes[kind]] for one, kind in zip(out, np.asarray(kinds), strict=True)]


def by_hand(base: Any, params: Any, kinds: Any = KINDS) -> list[np.ndarray]:
    """The same by numpy, one row after the other, without padding."""
    states = lambda seen, row: seen.rows[row][seen.valid[row]]  # noqa: E731
    return [
        vismem_oracle.memory(v.CONFIG, v.BACKBONE, base, params, kind, states(LOOKED, row), states(SPOKEN, row))
        for row, kind in enumerate(kinds)
    ]


def without_updates(params: Any) -> Any:
    """The parameters with every lora_b at zero."""
    zero = lambda path, leaf: leaf * 0 if path[-1].key == "lora_b" else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(zero, params)


def edited(params: Any, name: str) -> Any:
    """The parameters with one adapter changed."""
    return {**params, name: jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, params[name])}


def test_check_07_memories_have_8_and_16_vectors() -> None:
    """The published sizes: vectors that do not count are there for the shorter type alone."""
    config = vismem.create(v.BACKBONE)
    assert config.sizes == (8, 16) and config.queries == 8
    state = lambda count: Seen(  # noqa: E731
        jax.ShapeDtypeStruct((3, count, WIDTH), jnp.float32), jax.ShapeDtypeStruct((3, count), bool)
    )
    shapes = jax.eval_shape(
        lambda base, *rest: former.form(config, v.BACKBONE, base, *rest),
        qwen3_vl.shapes(v.BACKBONE),
        jax.eval_shape(lambda: vismem.init(jax.random.key(0), config)),
        state(20),
        state(7),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    assert shapes.shape == (3, 16, WIDTH)
    _, used = former._slots(config, {"slots_short": jnp.ones((8, 2)), "slots_long": jnp.ones((16, 2))}, KINDS, float)
    assert used.sum(1).tolist() == [8, 16, 16, 8]


@pytest.mark.parametrize("kinds", [KINDS, 1 - KINDS], ids=["short first", "long first"])
def test_check_03_padded_rows_equal_unpadded_ones_by_numpy(base: Any, params: Any, kinds: np.ndarray) -> None:
    for ours, known in zip(formed(base, params, kinds), by_hand(base, params, kinds), strict=True):
        assert np.abs(known).max() > 1
        np.testing.assert_allclose(ours, known, atol=1e-5)


@jax.jit
def frozen(base: Any, x: Any) -> Any:
    """Embeddings [1, T, D] through the backbone's own layers and norm; positions 0, 1, 2, ... on all axes."""
    place = jnp.arange(x.shape[1])[None]
    stream = decoder.Stream(place, jnp.ones_like(place), jnp.zeros(place.shape, bool), jnp.zeros(1, bool))
    angle = qwen3_vl.rotary_angles(v.BACKBONE, jnp.broadcast_to(place[:, None], (1, 3, x.shape[1])))
    out, _ = decoder.scan_layers(v.BACKBONE.text, base["layers"], x, angle, decoder.among(stream, stream))
    return rms_normalise(out, v.BACKBONE.text.norm_eps) * base["norm"]["scale"]


def test_check_08_without_updates_a_memory_is_the_frozen_decoders_output(base: Any, params: Any) -> None:
    """The first two rows are what the decoder makes of [states, queries, slots], by jax to 1e-6 and by numpy."""
    plain = without_updates(params)
    ours = formed(base, plain)
    for one, known in zip(ours, by_hand(base, plain), strict=True):
        np.testing.assert_allclose(one, known, atol=1e-5)
    p = oracle.float64(plain)
    text = SPOKEN.rows[0][SPOKEN.valid[0]]
    x = vismem_oracle.former_input(v.CONFIG, p, 0, LOOKED.rows[0][LOOKED.valid[0]], text)
    out = np.asarray(frozen(base, x[None].astype(np.float32)))[0, -v.CONFIG.short :]
    np.testing.assert_allclose(ours[0], out, atol=5e-6)
    assert np.abs(ours[0] - formed(base, params)[0]).max() > 0.1  # the adapters of these tests do something


def test_check_09_the_scale_is_alpha_over_rank(base: Any, params: Any) -> None:
    """Published: 32 / 16. Merged into kernels A B alpha / rank gives the same memory, half of it another."""
    assert vismem.create(v.BACKBONE).alpha / vismem.create(v.BACKBONE).rank == 2
    ours = formed(base, params)
    stripped = without_updates(params)
    for kind, name in enumerate(("short", "long")):
        whole = vismem_oracle.merged(v.CONFIG, base, params[name])
        half = vismem_oracle.merged(dataclasses.replace(v.CONFIG, alpha=v.CONFIG.alpha / 2), base, params[name])
        known, wrong = formed(jax.tree.map(jnp.asarray, whole), stripped), formed(half, stripped)
        for row in np.flatnonzero(KINDS == kind):
            np.testing.assert_allclose(ours[row], known[row], atol=2e-5)
            assert np.abs(ours[row] - wrong[row]).max() > 0.05


@pytest.mark.parametrize("kind", [0, 1])
def test_check_10_editing_one_adapter_leaves_the_others_memories(base: Any, params: Any, kind: int) -> None:
    before, after = formed(base, params), formed(base, edited(params, ("short", "long")[kind]))
    for row in range(4):
        if KINDS[row] == kind:
            assert np.abs(before[row] - after[row]).max() > 0.01
        else:
            np.testing.assert_array_equal(before[row], after[row])


def test_check_11_vectors_are_causal(base: Any, params: Any) -> None:
    before = formed(base, params)
    for kind, name in enumerate(("slots_short", "slots_long")):
        for place in range(v.CONFIG.sizes[kind]):
            after = formed(base, {**params, name: params[name].at[place].add(0.3)})
            for row in range(4):
                changed = np.abs(before[row] - after[row]).max(axis=-1) > 0
                assert changed.tolist() == [KINDS[row] == kind and at >= place for at in range(len(changed))]


@pytest.mark.parametrize("kinds", [KINDS, 1 - KINDS], ids=["short first", "long first"])
def test_check_12_kept_keys_and_values_of_the_images_change_nothing(base: Any, params: Any, kinds: np.ndarray) -> None:
    layers = former.adapted(v.CONFIG, base, params, jnp.asarray(kinds))
    past = prefix(v.CONFIG, v.BACKBONE, layers, LOOKED)
    assert past[0].shape == (2, 4, 9, v.BACKBONE.text.kv_heads, v.BACKBONE.text.head_dim)
    for one, same in zip(formed(base, params, kinds, past=past), formed(base, params, kinds), strict=True):
        np.testing.assert_allclose(one, same, atol=1e-5)


def test_memories_take_the_backbones_dtype(base: Any, params: Any) -> None:
    """float32 parameters beside bfloat16 weights and states, traced."""
    narrow = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)  # noqa: E731
    states = [Seen(narrow(one.rows), one.valid) for one in (LOOKED, SPOKEN)]
    form = functools.partial(former.form, v.CONFIG, v.BACKBONE)
    assert jax.eval_shape(form, narrow(base), params, *states, KINDS).dtype == jnp.bfloat16


def test_the_policys_own_adapter_is_left_out(base: Any, params: Any) -> None:
    """A LoRA of the policy beside the kernels is not part of the formers."""
    own = jax.jit(lora.attach, static_argnums=1)(jax.random.key(0), lora.LoRAConfig(rank=2, alpha=4.0), base)
    kinds = jnp.asarray(KINDS)
    ours, known = (former.adapted(v.CONFIG, weights, params, kinds) for weights in (own, base))
    jax.tree.map(np.testing.assert_array_equal, ours, known)
