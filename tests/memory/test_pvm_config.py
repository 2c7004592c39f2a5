"""Settings of PVM: what `create` refuses, and what every switch does (arXiv 2605.00814)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.errors import ConfigError
from jaxmem.memory import pvm
from tests.memory import oracle
from tests.memory import world as w


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latnet": 32}, "pvm has no setting latnet; it has .*latent"),
        ({"latent": 36}, "latent width 36 is not divisible by the head size 8"),
        ({"layers": (1, 5)}, r"layers \(1, 5\) must be different and within 0..4"),
        ({"layers": (-1, 2)}, r"layers \(-1, 2\) must be different and within 0..4"),
        ({"layers": (2, 2)}, r"layers \(2, 2\) must be different"),
        ({"layers": ()}, r"layers \(\) must be different"),
        ({"heads": 3}, "3 heads x 8 differ from the latent width 32"),
        ({"kv_heads": 3}, "4 heads are not a multiple of 3 key heads"),
        ({"visibility": "past"}, "visibility 'past' is neither 'causal' nor 'all'"),
        ({"query": "ffn"}, "query 'ffn' is neither 'residual' nor 'normed'"),
        ({"initialiser": "zeros"}, "initialiser 'zeros' is neither 'normal' nor 'fan_in'"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout -0.1 is outside"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        pvm.create(w.BACKBONE, **{"layers": (1, 3, 4), "latent": 32} | settings)


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError, match="(?s)layers.*visibility.*dropout"):
        pvm.create(w.BACKBONE, layers=(9,), latent=32, visibility="x", dropout=2.0)


def test_defaults_follow_the_backbone():
    config = pvm.create(w.BACKBONE, latent=32)
    assert config.layers == (1, 2, 3)
    assert (config.heads, config.kv_heads, config.head_dim, config.width) == (4, 2, 8, 48)
    assert config.mlp_width == 53  # truncated from 53.3
    assert (config.visibility, config.silence, config.query) == ("causal", True, "residual")
    assert config.output_norm and config.dropout == 0 and config.gate == 0 and config.norm_eps == 1e-6
    assert pvm.create(w.BACKBONE, latent=32, mlp_multiple=16).mlp_width == 64
    assert pvm.create(w.BACKBONE, latent=32, layers=[4, 0]).layers == (4, 0)
    assert hash(config) == hash(dataclasses.replace(config))


def test_fan_in_initialiser_and_open_gates():
    config = pvm.create(w.BACKBONE, latent=512, initialiser="fan_in", gate=0.125)
    params = jax.jit(pvm.init, static_argnums=1)(jax.random.key(3), config)
    assert params["gate_alpha"].tolist() == [0.125] * 3
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            np.testing.assert_allclose(np.std(leaf, (1, 2)), leaf.shape[1] ** -0.5, rtol=0.02, err_msg=str(path))


def test_output_norm_off_scales_with_the_map(branch):
    plain = dataclasses.replace(w.CAUSAL, output_norm=False)
    out, normed = branch.inject(plain), branch.inject(w.CAUSAL)
    np.testing.assert_allclose(branch.inject(plain, _doubled(branch.params)), 2 * out, rtol=1e-6)
    gates = np.abs(w.GATES)[:, None, None, None]
    rms = np.sqrt(np.mean(np.square(out), -1, keepdims=True)) / gates
    np.testing.assert_allclose(out, normed * rms, atol=1e-5)
    assert rms[rms > 0].std() > 0.01  # without the norm the gate is no longer the injection's size


def _doubled(params):
    return {**params, "output_expander": {"kernel": 2 * params["output_expander"]["kernel"]}}


def test_dropout_drops_weights_in_training_alone(branch):
    config, key = dataclasses.replace(w.ALL, dropout=0.5), jax.random.key(0)
    whole = np.asarray(branch.inject(config))
    np.testing.assert_allclose(whole, branch.inject(w.ALL), rtol=0, atol=1e-6)
    one, two = (np.asarray(branch.inject(config, key=key)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = np.asarray(branch.inject(config, key=jax.random.key(1)))
    seen = branch.text & np.asarray(branch.batch.is_visual).any(1)[:, None]
    for a, b in ((one, other), (one, whole), (one[:1], one[1:])):
        assert np.all(np.any(a != b, -1)[:, seen].mean(-1) > 0.85)
    assert not np.any(one[:, ~seen])


def test_dropout_reaches_the_forward_through_its_key_alone(world, branch):
    """The forward of a config with dropout is that of the config without, until a key is given."""
    spec = model.Spec(w.BACKBONE, (dataclasses.replace(w.CAUSAL, dropout=0.3),))
    trace = lambda spec, key: jax.make_jaxpr(  # noqa: E731
        lambda base, memory, batch: model.hidden_states(spec, base, memory, batch, dropout=key)
    )(world.base, world.memory, branch.batch)
    assert "random_bits" not in str(trace(spec, None))
    assert "random_bits" in str(trace(spec, jax.random.key(0)))
    assert "random_bits" not in str(trace(w.WITH_CAUSAL, jax.random.key(0)))


def test_dropout_keeps_the_mean_of_what_is_found():
    """Kept weights are scaled up, so that the expected attention output is that without dropout."""
    config = dataclasses.replace(w.CAUSAL, dropout=0.25)
    params = oracle.slot(w.random_memory(w.CAUSAL, 2), 0)
    draw = jax.random.normal(jax.random.key(0), (3, 1, 4000, 32))
    keys, values = draw[:2, :, :7, :16].reshape(2, 1, 7, 2, 8)
    x, seen = jnp.broadcast_to(draw[2, :, :1], (1, 4000, 32)), jnp.ones((1, 4000, 7), bool)

    def attend(module, key):
        return module.cross_attn(x, keys, values, seen, key)

    run = jax.jit(lambda key: pvm.PVM(config).apply({"params": params}, key, method=attend))
    dropped, whole = run(jax.random.key(1)), run(None)
    np.testing.assert_allclose(dropped.mean(1), whole.mean(1), atol=0.05 * float(jnp.abs(whole).max()))
    assert float(jnp.std(dropped, axis=1).min()) > 0
