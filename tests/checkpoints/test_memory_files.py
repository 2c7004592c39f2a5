"""A memory as one file with the official names (acceptance checks 1 and 6)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.checkpoints import pvm_names
from jaxmem.checkpoints.huggingface import load_memory, read_memory_config, save_memory
from jaxmem.checkpoints.table import expected
from jaxmem.errors import CheckpointError
from jaxmem.memory import pvm

TEXT = TextConfig(layers=6, width=64, mlp_width=96, heads=4, kv_heads=2, head_dim=16, vocab=512, rope_section=(4, 2, 2))
VISION = VisionConfig(depth=3, width=32, mlp_width=48, heads=4, out_width=64, taps=(0, 2), table_side=8)
BACKBONE = BackboneConfig("qwen3_vl", TEXT, VISION, 500, 501, 502, 503)
CONFIG = pvm.create(BACKBONE, layers=(1, 4), latent=32)
SHAPES = jax.eval_shape(lambda key: pvm.init(key, CONFIG), jax.random.key(0))


@pytest.fixture
def params():
    """Random values everywhere, gates and norms included."""
    leaves, structure = jax.tree.flatten(SHAPES)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def test_check_06_round_trip_and_official_names(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, params, load_memory(tmp_path, CONFIG, BACKBONE, SHAPES))
    tensors = load_file(tmp_path / "memory.safetensors")
    block = "model.language_model.layers.{}.pvm_block."
    parts = ["text_reducer", "vision_reducer", "output_expander", "input_norm", "post_attn_norm"]
    parts += [f"cross_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = {block.format(layer) + name for layer in (1, 4) for name in [*(f"{p}.weight" for p in parts), "gate_alpha"]}
    assert set(tensors) == names
    np.testing.assert_array_equal(tensors[block.format(4) + "gate_alpha"], params["gate_alpha"][1:2])
    key = tensors[block.format(1) + "cross_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, params["cross_attn"]["k"]["kernel"][0].T)
    expander = tensors[block.format(4) + "output_expander.weight"]
    assert expander.shape == (64, 32)
    np.testing.assert_array_equal(expander, params["output_expander"]["kernel"][1].T)


def test_check_06_official_state_dict_is_read(tmp_path):
    rng, wanted = np.random.default_rng(0), expected(pvm_names.table(CONFIG), SHAPES)
    official = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wanted.items()}
    save_memory(tmp_path, jax.tree.map(lambda x: jnp.zeros(x.shape), SHAPES), CONFIG, BACKBONE)
    save_file(official, tmp_path / "memory.safetensors")
    got = load_memory(tmp_path, CONFIG, BACKBONE, SHAPES, dtype="bfloat16")
    down = official["model.language_model.layers.4.pvm_block.mlp.down_proj.weight"]
    np.testing.assert_array_equal(got["mlp"]["down"]["kernel"][1], down.T.astype(jnp.bfloat16))


def test_check_01_official_tensors_of_the_8b_shape():
    text = dataclasses.replace(TEXT, layers=36, width=4096, mlp_width=12288, heads=32, kv_heads=8, head_dim=128)
    config = pvm.create(dataclasses.replace(BACKBONE, text=text), layers=(8, 16, 24))
    shapes = expected(pvm_names.table(config), jax.eval_shape(lambda key: pvm.init(key, config), jax.random.key(0)))
    assert len(shapes) == 45
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 27_922_179
    assert shapes["model.language_model.layers.16.pvm_block.gate_alpha"] == (1,)
    assert shapes["model.language_model.layers.24.pvm_block.mlp.down_proj.weight"] == (512, 1536)


def test_settings_come_back(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    name, settings = read_memory_config(tmp_path, BACKBONE)
    assert name == "pvm" and settings["layers"] == [1, 4]
    assert pvm.PVMConfig(**settings | {"layers": tuple(settings["layers"])}) == CONFIG


def test_sharded_target(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    placed = load_memory(tmp_path, CONFIG, BACKBONE, SHAPES, sharding=sharding)
    assert len(placed["gate_alpha"].addressable_shards) == 8
    jax.tree.map(np.testing.assert_array_equal, params, placed)


def test_another_backbone(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    other = dataclasses.replace(BACKBONE, text=dataclasses.replace(TEXT, layers=7))
    with pytest.raises(CheckpointError, match=r"another backbone \(1\): layers: stored 6, this run has 7"):
        load_memory(tmp_path, CONFIG, other, SHAPES)


def test_another_memory(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    about = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps(about | {"memory": "vismem"}))
    with pytest.raises(CheckpointError, match="holds the memory 'vismem', asked for 'pvm'"):
        load_memory(tmp_path, CONFIG, BACKBONE, SHAPES)


def test_other_layers_or_widths(params, tmp_path):
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    with pytest.raises(CheckpointError, match=r"missing tensors \(15\): model.language_model.layers.5.pvm_block"):
        load_memory(tmp_path, dataclasses.replace(CONFIG, layers=(1, 5)), BACKBONE, SHAPES)
    wide = pvm.create(BACKBONE, layers=(1, 4), latent=64)
    shapes = jax.eval_shape(lambda key: pvm.init(key, wide), jax.random.key(0))
    with pytest.raises(CheckpointError, match="wrongly shaped tensors"):
        load_memory(tmp_path, wide, BACKBONE, shapes)


def test_damaged_files(params, tmp_path):
    with pytest.raises(CheckpointError, match=r"memory\.json: no such file"):
        load_memory(tmp_path, CONFIG, BACKBONE, SHAPES)
    save_memory(tmp_path, params, CONFIG, BACKBONE)
    path = tmp_path / "memory.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"memory\.safetensors: truncated"):
        load_memory(tmp_path, CONFIG, BACKBONE, SHAPES)
    (tmp_path / "memory.json").write_text('{"memory": "pvm"}')
    with pytest.raises(CheckpointError, match="has no config, backbone"):
        read_memory_config(tmp_path)
