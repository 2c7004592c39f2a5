"""Acceptance checks 7 to 12 of PVM: when it is the backbone, bit for bit, and how large an injection is."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.sampling.cache import prefill
from tests.memory import world as w


def same(one, two):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("spec", [w.WITH_CAUSAL, w.WITH_ALL], ids=["causal", "all"])
def test_check_07_alpha_zero_is_the_backbone_bit_for_bit(world, spec, padding):
    batch = w.batch_of(w.rows_of(2), padding)
    ours, bare = (
        w.hidden(spec, world.base, world.closed, batch),
        w.hidden(w.BARE, world.base, {}, batch),
    )
    same(ours, bare)
    same(w.logits(w.BARE, world.base, ours), w.logits(w.BARE, world.base, bare))
    open_gates = w.hidden(spec, world.base, world.memory, batch)
    assert np.abs(np.asarray(open_gates - bare)).max() > 0.1  # the gates are what makes them equal


@pytest.mark.parametrize("padding", ["right", "left"])
def test_check_07_alpha_zero_in_cached_decode(world, padding):
    batch = w.batch_of(w.rows_of(2), padding)
    ours, kept = w.prefill(w.WITH_CAUSAL, world.base, world.closed, batch, w.SLOTS)
    bare, plain = w.prefill(w.BARE, world.base, {}, batch, w.SLOTS)
    same(ours, bare)
    for token in (5, 17, 40):
        tokens, active = jnp.full(4, token), jnp.ones(4, bool)
        ours, kept = w.decode(w.WITH_CAUSAL, world.base, world.closed, kept, tokens, active)
        bare, plain = w.decode(w.BARE, world.base, {}, plain, tokens, active)
        same(ours, bare)
        same(w.logits(w.BARE, world.base, ours), w.logits(w.BARE, world.base, bare))
    jax.tree.map(same, kept.layers, plain.layers)


def test_check_07_alpha_zero_in_bfloat16_without_excess_precision(world):
    options = {"xla_allow_excess_precision": False}  # no rounding is left out where operations are fused
    run = jax.jit(model.hidden_states, static_argnames="spec", compiler_options=options)
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), world.base)
    batch = w.batch_of(w.rows_of(2))
    ours = run(w.WITH_CAUSAL, base, world.closed, batch)
    assert ours.dtype == jnp.bfloat16
    same(ours, run(w.BARE, base, {}, batch))


def text_only():
    return w.batch_of([w.example((length,), 70 + length) for length in (9, 4, 1, 12)], tokens=12)


def program(spec, world, batch, function):
    """The traced program, with the weights closed over: what is not read is not in it."""
    memory = world.memory if spec.memories else {}
    text = str(jax.make_jaxpr(lambda base: function(spec, base, memory, batch))(world.base))
    return re.sub("0x[0-9a-f]+", "", text)


@pytest.mark.parametrize("stage", ["forward", "prefill", "decode"])
def test_check_08_no_image_no_branch(world, stage):
    """Not only equal results: a batch without images runs the backbone's own program."""
    batch = text_only()

    def decode(spec, base, memory, batch):
        _, kept = w.prefill_and_fork(spec, base, memory, batch, 16)
        return w.decode_step(spec, base, memory, kept, jnp.arange(4), jnp.ones(4, bool))

    run = {"forward": model.hidden_states, "prefill": lambda *a: prefill(*a, 16), "decode": decode}[stage]
    programs = [program(spec, world, batch, run) for spec in (w.BARE, w.WITH_CAUSAL, w.WITH_ALL)]
    assert programs[0] == programs[1] == programs[2]
    pictures = w.batch_of(w.rows_of(2))
    if stage == "forward":
        assert program(w.BARE, world, pictures, run) != program(w.WITH_CAUSAL, world, pictures, run)


def test_check_08_no_image_is_bit_identical_for_any_alpha(world):
    batch, broken = text_only(), {"pvm": jax.tree.map(lambda leaf: leaf * jnp.nan, world.params)}
    bare = w.quick_hidden(w.BARE, world.base, {}, batch)
    assert np.isfinite(bare).all()
    same(w.quick_hidden(w.WITH_CAUSAL, world.base, broken, batch), bare)


@pytest.mark.parametrize("garbage", ["zeros", "huge", "nan"])
@pytest.mark.parametrize("spec", [w.WITH_CAUSAL, w.WITH_ALL], ids=["causal", "all"])
def test_check_09_rows_without_images_are_the_backbone(world, spec, garbage):
    batch = w.batch_of(w.rows_of(3))
    fill = {"zeros": 0.0, "huge": 1e4, "nan": np.nan}[garbage]
    padding = np.asarray(batch.patch_segments)[..., None] == 0
    noise = fill * np.random.default_rng(0).standard_normal(batch.patches.shape)
    batch = batch.replace(patches=jnp.asarray(np.where(padding, noise, batch.patches), jnp.float32))
    ours, bare = w.hidden(spec, world.base, world.memory, batch), w.hidden(w.BARE, world.base, {}, batch)
    same(ours[2], bare[2])
    if garbage != "nan":  # finite garbage behind a row's own images is read by nobody
        same(ours, w.hidden(spec, world.base, world.memory, w.batch_of(w.rows_of(3))))
        assert np.all(np.abs(np.asarray(ours - bare)).max((1, 2))[[0, 1, 3]] > 0.1)


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_check_10_injection_has_the_size_of_the_gate(branch, config):
    bare = dataclasses.replace(config, output_norm=False)
    size = np.mean(np.square(branch.inject(bare, w.with_gates(branch.params, 1.0))), -1)
    out, reached = np.asarray(branch.inject(config)), size > 1e-3
    visual = np.asarray(branch.batch.is_visual)
    pictured = branch.text & visual.any(1)[:, None]
    if config is w.CAUSAL:
        pictured &= np.cumsum(visual, 1) > 0
    np.testing.assert_array_equal(reached, np.broadcast_to(pictured, reached.shape))
    rms = np.sqrt(np.mean(np.square(out, dtype=np.float64), -1))
    for slot, gate in enumerate(w.GATES):
        np.testing.assert_allclose(rms[slot][reached[slot]], abs(gate), rtol=1e-3)
    assert np.all(out[:, visual] == 0)
    assert np.all(out[:, ~pictured] == 0)


def test_check_11_odd_in_alpha_and_free_of_scales(branch):
    out = np.asarray(branch.inject(w.ALL))
    same(branch.inject(w.ALL, w.with_gates(branch.params, [-gate for gate in w.GATES])), -out)
    expander = branch.params["output_expander"]["kernel"]
    doubled = {**branch.params, "output_expander": {"kernel": 2 * expander}}
    np.testing.assert_allclose(branch.inject(w.ALL, doubled), out, atol=1e-5)
    for scale in (0.25, 3.0, 1e3):
        np.testing.assert_allclose(branch.inject(w.ALL, x=scale * branch.x), out, atol=1e-5)
    moved = np.asarray(branch.inject(w.ALL, visual=3 * branch.visual)) - out
    assert np.abs(moved).max() > 0.05  # the size of what is seen does matter: the latent MLP is not linear (1.3)


def test_check_12_nothing_seen_nothing_injected(branch):
    assert not np.any(branch.inject(w.ALL, visual=jnp.zeros_like(branch.visual)))
    assert not np.any(branch.inject(w.CAUSAL, visual=jnp.zeros_like(branch.visual)))
