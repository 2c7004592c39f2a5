"""The MLP branch: as large as a PVM, equal to its formula in numpy, blind to the images."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.distributed.mesh import make_mesh, shardings
from jaxmem.errors import ConfigError
from jaxmem.memory import mlp_branch, pvm
from jaxmem.model import Spec
from jaxmem.training import sft
from tests.memory import world as w

CONFIG = mlp_branch.create(w.BACKBONE, layers=(1, 3), latent=32)
SPEC = Spec(w.BACKBONE, (CONFIG,))
GATES = (0.4, -0.3)


@pytest.fixture(scope="module")
def params():
    fresh = w.random_like(jax.eval_shape(lambda: mlp_branch.init(jax.random.key(0), CONFIG)), 2)
    return {**fresh, "gate_alpha": jnp.asarray(GATES)}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("settings", [{"latent": 32}, {"latent": 32, "layers": (4,)}, {"latent": 512}])
def test_the_count_is_the_nearest_to_a_pvm(settings):
    config = mlp_branch.create(w.BACKBONE, **settings)
    twin = jax.eval_shape(lambda: pvm.init(jax.random.key(0), pvm.create(w.BACKBONE, **settings)))
    own = jax.eval_shape(lambda: mlp_branch.init(jax.random.key(0), config))
    assert count(own) == config.parameters and count(twin) == config.matched
    off = [
        abs(dataclasses.replace(config, mlp_width=config.mlp_width + d).parameters - config.matched) for d in (-1, 0, 1)
    ]
    assert off[1] == min(off)
    assert off[1] <= len(config.layers) * 3 * config.latent / 2


def layer_by_hand(params, slot, x):
    """gate * norm(expand(swiglu(norm(reduce(x))))) in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf[slot], np.float64), params)
    norm = lambda v: v / np.sqrt(np.mean(v * v, -1, keepdims=True) + 1e-6)  # noqa: E731
    h = norm(x @ p["text_reducer"]["kernel"]) * p["input_norm"]["scale"]
    gate, up = h @ p["mlp"]["gate"]["kernel"], h @ p["mlp"]["up"]["kernel"]
    out = (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"] @ p["output_expander"]["kernel"]
    return GATES[slot] * norm(out)


def test_the_branch_equals_its_formula_and_is_silent_on_images(params, branch):
    (port,) = mlp_branch.ports(CONFIG, params, None, branch.stream).beside_ffn
    visual = np.asarray(branch.batch.is_visual)
    assert port.layers == (1, 3)
    for slot in range(2):
        out = np.asarray(port.act(jax.tree.map(operator.itemgetter(slot), port.slots), branch.x, None))
        wanted = layer_by_hand(params, slot, np.asarray(branch.x, np.float64))
        np.testing.assert_allclose(out[~visual], wanted[~visual], rtol=0, atol=1e-5)
        assert not np.any(out[visual])


def test_closed_gates_are_the_backbone_bit_for_bit(world, params):
    batch = w.batch_of(w.rows_of(1))
    closed = {"mlp": {**params, "gate_alpha": jnp.zeros(2)}}
    bare, shut, on = (
        np.asarray(w.hidden(spec, world.base, memory, batch))
        for spec, memory in ((w.BARE, {}), (SPEC, closed), (SPEC, {"mlp": params}))
    )
    assert bare.tobytes() == shut.tobytes() and np.abs(on - bare).max() > 0.1


def test_attach_generate_save_and_restore(tmp_path):
    model = jaxmem.load(dtype="float32").attach("mlp", layers=(0, 2), latent=32, initialiser="fan_in")
    chat = [{"role": "user", "content": "Read and add C F"}]
    assert model.generate(chat, max_new_tokens=4) == model.without_memory().generate(chat, max_new_tokens=4)
    config = model.spec.memories[0]
    assert config.parameters == count(model.memory)
    assert abs(config.parameters - config.matched) <= 96
    model.save(tmp_path)
    again = jaxmem.load(dtype="float32", memory=tmp_path)
    assert again.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, again.memory, model.memory)
    assert set(sft.gates(model.spec, {"memory": model.memory})) == {"gate/mlp/layer_0", "gate/mlp/layer_2"}


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="mlp has no setting heads; it has .*latent"):
        mlp_branch.create(w.BACKBONE, heads=2)
    with pytest.raises(ConfigError, match=r"layers \(5,\) must be different and within 0..4"):
        mlp_branch.create(w.BACKBONE, layers=(5,), latent=32)


def test_sharding_cuts_it_like_a_pvm():
    mesh = make_mesh(fsdp=2, tensor=2)
    shapes = {"mlp": jax.eval_shape(lambda: mlp_branch.init(jax.random.key(0), CONFIG))}
    placed = shardings(mesh, shapes)["mlp"]
    assert placed["text_reducer"]["kernel"].spec == jax.P(None, "fsdp", None)
    assert placed["mlp"]["down"]["kernel"].spec[2] == "fsdp"
    assert placed["gate_alpha"].is_fully_replicated
