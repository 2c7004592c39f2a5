"""LoRA against weights that were added up by hand, in numpy and in torch."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import jaxmem
from jaxmem.adapters import lora
from jaxmem.adapters.lora import LoRAConfig
from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import text_batch
from jaxmem.backbones.layers import Linear
from jaxmem.checkpoints import huggingface, peft
from jaxmem.distributed.mesh import make_mesh, spec_for
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.model import Spec
from jaxmem.model import logits as logits_of
from jaxmem.sampling.generate import generate
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.training import trees
from tests.memory import world as w
from tests.tiny import write_qwen3_vl

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=("q", "v", "layers/ffn/*"), layers=(0, 3))
TARGETS = {"layers/attention/q", "layers/attention/v", *(f"layers/ffn/{name}" for name in ("gate", "up", "down"))}


@pytest.fixture(scope="module")
def base():
    return w.random_like(qwen3_vl.shapes(w.BACKBONE), 0)


def opened(base, seed=1):
    """The same tree with every lora_b random: the update is no longer zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) * 0.2 if path.endswith("lora_b") else leaf

    return trees.map_with_path(draw, base)


@pytest.fixture(scope="module")
def adapted(base):
    return opened(lora.attach(jax.random.key(1), CONFIG, base))


@pytest.fixture(scope="module")
def batch():
    return w.batch_of(w.rows_of(1))


def by_hand(base):
    """Kernels with the update added in float64, one layer and one kernel at a time."""
    plain = {path: np.asarray(leaf, np.float64) for path, leaf in trees.leaves(base) if "/lora_" not in path}
    leaves = dict(trees.leaves(base))
    for path in TARGETS:
        for layer in CONFIG.layers:
            a, b = (np.asarray(leaves[f"{path}/lora_{x}"][layer], np.float64) for x in "ab")
            plain[f"{path}/kernel"][layer] += 6.0 / 3 * a @ b
    return plain


def test_at_the_start_it_is_the_backbone_bit_for_bit(base, batch):
    fresh = lora.attach(jax.random.key(1), CONFIG, base)
    states = lambda: [np.asarray(w.hidden(w.BARE, tree, {}, batch)) for tree in (base, fresh)]  # noqa: E731
    np.testing.assert_allclose(*states(), rtol=0, atol=5e-6)  # the compiler may fuse the two differently
    with jax.disable_jit():
        before, after = states()
    assert before.tobytes() == after.tobytes()
    assert set(lora.factors(fresh)) == TARGETS
    for path, factor in lora.factors(fresh).items():
        inputs = base["layers"][path.split("/")[1]][path.split("/")[2]]["kernel"].shape[1]
        assert np.abs(factor["lora_a"]).max() <= inputs**-0.5 and not np.any(factor["lora_b"])
        np.testing.assert_allclose(np.std(factor["lora_a"]), (3 * inputs) ** -0.5, rtol=0.15)
        assert factor["lora_scale"].tolist() == [2, 0, 0, 2, 0]


def test_one_linear_in_numpy():
    rng = np.random.default_rng(0)
    x, kernel, bias, a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, 6), (6, 5), (5,), (6, 2), (2, 5)))
    params = {"kernel": kernel, "bias": bias, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.5)}
    got = Linear(5, use_bias=True).apply({"params": params}, jnp.asarray(x))
    x, a, b = (np.asarray(one, np.float64) for one in (x, a, b))
    np.testing.assert_allclose(got, x @ kernel + 0.5 * (x @ a) @ b + bias, rtol=1e-5, atol=1e-5)
    got = Linear(5, use_bias=True).apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16


def test_merged_equals_added_by_hand_and_unmerged(base, adapted, batch):
    merged, wanted = lora.merge(adapted), by_hand(adapted)
    assert {path for path, _ in trees.leaves(merged)} == {path for path, _ in trees.leaves(base)} == set(wanted)
    for path, leaf in trees.leaves(merged):
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=2e-6, err_msg=path)
    one, two, off = (w.hidden(w.BARE, tree, {}, batch) for tree in (adapted, merged, base))
    valid = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(one[valid], two[valid], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(one - off)[valid]).max() > 0.1
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapted)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(half))} == {jnp.dtype("bfloat16")}
    assert lora.has_lora(adapted) and not lora.has_lora(lora.strip(adapted))
    jax.tree.map(np.testing.assert_array_equal, lora.strip(adapted), base)


def test_gradients_reach_the_factors_of_chosen_layers_alone(adapted, batch):
    fresh = lora.attach(jax.random.key(1), CONFIG, lora.strip(adapted))

    def gradient(base, patterns):
        trainable, frozen = trees.split({"base": base, "memory": {}}, patterns)
        loss = lambda part: jnp.sum(jnp.square(w.quick_hidden(w.BARE, trees.merge(part, frozen)["base"], {}, batch)))  # noqa: E731
        return dict(trees.leaves(jax.grad(loss)(trainable)))

    for base, a_moves in ((fresh, False), (adapted, True)):
        found = gradient(base, (*lora.TRAINABLE, "base/**/lora_scale"))
        assert set(found) == {f"base/{path}/{name}" for path in TARGETS for name in lora.LEAVES}
        for path, leaf in found.items():
            moved = [bool(np.any(layer)) for layer in np.asarray(leaf)]
            moves = path.endswith("lora_b") or (path.endswith("lora_a") and a_moves)
            assert moved == [moves and layer in CONFIG.layers for layer in range(5)], path
    assert set(gradient(adapted, lora.TRAINABLE)) == {f"base/{path}/lora_{x}" for path in TARGETS for x in "ab"}


def test_count(adapted):
    per_layer = 48 + 64 + 48 + 32 + 3 * (48 + 80)  # q, v, and the FFN's three kernels
    assert lora.count(adapted) == 2 * 3 * per_layer
    trainable, _ = trees.split({"base": adapted}, lora.TRAINABLE)
    assert trees.count(trainable) == 5 * 3 * per_layer  # layers that are not chosen keep their place in the stack
    assert lora.count(lora.strip(adapted)) == 0


def test_generation_equals_that_of_merged_weights(adapted, batch):
    settings = SamplerConfig(max_new_tokens=6)
    one, two = (generate(w.BARE, tree, {}, batch, settings) for tree in (adapted, lora.merge(adapted)))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-5)


def test_sharding_cuts_the_model_widths():
    mesh = make_mesh(fsdp=2)
    assert spec_for("layers/attention/o/lora_a", (3, 64, 8), mesh) == jax.P(None, "fsdp", None)
    assert spec_for("layers/ffn/up/lora_b", (3, 8, 256), mesh) == jax.P(None, None, "fsdp")
    assert spec_for("layers/ffn/up/lora_scale", (3,), mesh) == jax.P()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q", "w")}, r"lora.targets: 'w' names no kernel of the decoder; there are layers/attention/"),
        ({"layers": (0, 5)}, r"lora.layers \(0, 5\) must be different and within 0..4"),
        ({"layers": ()}, r"lora.layers \(\) must be different"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_wrong_settings_are_named(base, settings, message):
    with pytest.raises(ConfigError, match=message):
        lora.attach(jax.random.key(0), LoRAConfig(**settings), base)


def test_a_second_attach_is_refused(adapted):
    with pytest.raises(ConfigError, match="has LoRA factors already"):
        lora.attach(jax.random.key(0), CONFIG, adapted)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A torch model, its tree, and the tree with factors."""
    folder = tmp_path_factory.mktemp("backbone")
    torch_model = write_qwen3_vl(folder, layers=3)
    config = qwen3_vl.config_from_hf(huggingface.read_config(folder))
    base = huggingface.load_backbone(folder, config)
    chosen = LoRAConfig(rank=2, alpha=3.0, targets=("q", "o", "down"), layers=(0, 2))
    return torch_model, config, base, opened(lora.attach(jax.random.key(3), chosen, base))


def test_peft_names_shapes_and_round_trip(original, tmp_path):
    _, config, base, adapted = original
    peft.save_adapter(tmp_path, adapted, config, "somewhere")
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    stem = "base_model.model.model.language_model.layers.{}.{}.lora_{}.weight"
    sizes = {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64), "mlp.down_proj": (96, 64)}
    wanted = {}
    for layer in (0, 2):
        for name, (inputs, outputs) in sizes.items():
            wanted |= {stem.format(layer, name, "A"): (2, inputs), stem.format(layer, name, "B"): (outputs, 2)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == wanted
    b = adapted["layers"]["ffn"]["down"]["lora_b"][2]
    np.testing.assert_array_equal(tensors[stem.format(2, "mlp.down_proj", "B")], b.T)
    about = json.loads((tmp_path / peft.CONFIG).read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 2, 3)
    assert sorted(about["target_modules"]) == ["down_proj", "o_proj", "q_proj"]
    assert about["layers_to_transform"] == [0, 2] and about["base_model_name_or_path"] == "somewhere"
    back = peft.load_adapter(tmp_path, base, config)
    active = jnp.array([0, 2])
    for path, factor in lora.factors(adapted).items():
        got = lora.factors(back)[path]
        np.testing.assert_array_equal(got["lora_scale"], factor["lora_scale"])
        for name in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(got[name][active], factor[name][active])
    jax.tree.map(np.testing.assert_array_equal, lora.merge(back), lora.merge(adapted))


def test_torch_with_the_saved_factors_gives_our_logits(original, tmp_path):
    torch_model, config, _, adapted = original
    peft.save_adapter(tmp_path, adapted, config)
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    weights = dict(torch_model.named_parameters())
    tokens = np.random.default_rng(0).integers(0, 400, (2, 7)).astype(np.int32)
    want = {name: weights[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name in [name for name in tensors if ".lora_A." in name]:
            a, b = (torch.from_numpy(tensors[name.replace("lora_A", x)]) for x in ("lora_A", "lora_B"))
            weights[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 3.0 / 2 * b @ a
        theirs = torch_model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
        for name, weight in want.items():
            weights[name].copy_(weight)
    spec, batch = Spec(config), text_batch(tokens, patch_dim=config.vision.patch_dim)
    ours = logits_of(spec, adapted, w.hidden(spec, adapted, {}, batch))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_adapters_that_do_not_fit_are_named(original, tmp_path):
    _, config, base, adapted = original
    with pytest.raises(CheckpointError, match="no LoRA factors to save"):
        peft.save_adapter(tmp_path, base, config)
    with pytest.raises(CheckpointError, match="no such file"):
        peft.load_adapter(tmp_path / "nothing", base, config)
    peft.save_adapter(tmp_path, adapted, config)
    with pytest.raises(ConfigError, match="factors already"):
        peft.load_adapter(tmp_path, adapted, config)
    about = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps(about | {"r": 4}))
    with pytest.raises(CheckpointError, match=r"wrongly shaped tensors.*\(2, 64\) \(expected \(4, 64\)\)"):
        peft.load_adapter(tmp_path, base, config)
    (tmp_path / peft.CONFIG).write_text(json.dumps(about | {"use_dora": True, "rank_pattern": {"q_proj": 4}}))
    with pytest.raises(CheckpointError, match=r"not plain LoRA \(2\): use_dora = True, rank_pattern"):
        peft.load_adapter(tmp_path, base, config)


def test_the_face(tmp_path):
    model = jaxmem.load(dtype="float32")
    with pytest.raises(ConfigError, match=r"unknown key 'lora.rnk'.*lora.rank"):
        model.attach_lora(rnk=2)
    adapted = model.attach_lora(rank=2, targets=["q"], layers=[1])
    adapted.save_lora(tmp_path)
    again = model.restore_lora(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.merge_lora().base, model.base)
    assert lora.count(again.base) == lora.count(adapted.base) == 2 * (128 + 128)
