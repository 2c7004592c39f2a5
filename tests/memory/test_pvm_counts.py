"""Acceptance checks 1 to 5 of PVM: parameter counts, shapes and names at the released sizes. Nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.checkpoints import pvm_names, qwen3_vl_names
from jaxmem.checkpoints.huggingface import load_backbone, load_tree, save_backbone
from jaxmem.checkpoints.table import expected, flatten
from jaxmem.checkpoints.weights import open_weights
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.memory import pvm
from tests.memory import world as w

SIZES = {  # layers, width, ffn, heads, kv heads, tied, tower depth, width, mlp width, taps
    "2B": (28, 2048, 6144, 16, 8, True, 24, 1024, 4096, (5, 11, 17)),
    "4B": (36, 2560, 9728, 32, 8, True, 24, 1024, 4096, (5, 11, 17)),
    "8B": (36, 4096, 12288, 32, 8, False, 27, 1152, 4304, (8, 16, 24)),
    "32B": (64, 5120, 25600, 64, 8, False, 27, 1152, 4304, (8, 16, 24)),
    "30B-A3B": (48, 2048, 6144, 32, 4, False, 27, 1152, 4304, (8, 16, 24)),
    "235B-A22B": (94, 4096, 12288, 64, 4, False, 27, 1152, 4304, (8, 16, 24)),
}
BACKBONES = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
TOWERS = {"2B": 406_957_056, "4B": 415_347_712, "8B": 576_388_336, "32B": 595_266_800}


def backbone(name: str) -> BackboneConfig:
    layers, width, ffn, heads, kv_heads, tied, depth, tower, mlp, taps = SIZES[name]
    text = TextConfig(layers, width, ffn, heads, kv_heads, 128, 151_936, tied=tied)
    vision = VisionConfig(depth, tower, mlp, 16, width, taps)
    return BackboneConfig("qwen3_vl", text, vision, 151_655, 151_656, 151_652, 151_653)


def shapes(config: pvm.PVMConfig):
    return jax.eval_shape(lambda: pvm.init(jax.random.key(0), config))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def closed_form(config: pvm.PVMConfig) -> int:
    """Specs/pvm 1.4, per layer."""
    d, r, key, m = config.width, config.latent, config.kv_heads * config.head_dim, config.mlp_width
    return 3 * d * r + 2 * r * r + 2 * r * key + 3 * r * m + 2 * r + 2 * config.head_dim + 1


def test_check_01_counts_of_8b():
    config = pvm.create(backbone("8B"))
    assert config.layers == (8, 16, 24)
    tensors = expected(pvm_names.table(config), shapes(config))
    assert len(tensors) == 45 and len(jax.tree.leaves(shapes(config))) == 15
    assert count(shapes(config)) == sum(map(math.prod, tensors.values())) == 27_922_179
    for layer in config.layers:
        assert sum(math.prod(s) for name, s in tensors.items() if f".layers.{layer}." in name) == 9_307_393
    whole = count(qwen3_vl.shapes(backbone("8B")))
    assert whole == 8_767_123_696
    assert f"{27_922_179 / whole:.4%}" == "0.3185%"


@pytest.mark.parametrize(
    ("name", "total", "layers", "mlp_width"),
    [
        ("4B", 22_728_963, (5, 11, 17), 1945),
        ("2B", 18_878_211, (6, 12, 18), 1536),
        ("32B", 37_359_363, (14, 28, 42), 2560),
        ("30B-A3B", 18_484_995, None, 1536),
        ("235B-A22B", 27_922_179, None, 1536),
    ],
)
def test_check_02_counts_of_other_sizes(name, total, layers, mlp_width):
    config = pvm.create(backbone(name))
    assert count(shapes(config)) == total == 3 * closed_form(config)
    assert config.mlp_width == mlp_width
    assert config.layers == (layers or config.layers)


@pytest.mark.parametrize("name", BACKBONES)
def test_check_02_backbone_totals(name):
    tree = qwen3_vl.shapes(backbone(name))
    assert count(tree) == BACKBONES[name]
    assert count(tree["visual"]) == TOWERS[name]


@pytest.mark.parametrize(
    ("latent", "heads", "kv_heads", "total"),
    [(256, 2, 1, 11_798_787), (1024, 8, 2, 73_931_523), (2048, 16, 4, 220_214_019)],
)
def test_check_03_other_latent_widths(latent, heads, kv_heads, total):
    config = pvm.create(backbone("8B"), latent=latent)
    assert (config.heads, config.kv_heads) == (heads, kv_heads)
    assert count(shapes(config)) == total == 3 * closed_form(config)


@pytest.mark.parametrize("latent", [500, 64, 129])
def test_check_03_latent_that_heads_do_not_divide(latent):
    with pytest.raises(ConfigError, match=f"latent width {latent} is not divisible by the head size 128"):
        pvm.create(backbone("8B"), latent=latent)


@pytest.mark.parametrize(("name", "kv_heads"), [("8B", 1), ("4B", 1), ("2B", 2), ("32B", 1)])
def test_check_04_heads_and_biases(name, kv_heads):
    config = pvm.create(backbone(name))
    assert (config.heads, config.kv_heads, config.head_dim) == (4, kv_heads, 128)
    leaves = flatten(shapes(config))
    for part in ("k", "v"):
        assert leaves[f"cross_attn/{part}/kernel"].shape == (3, 512, 128 * kv_heads)
    assert not [path for path in leaves if "bias" in path]
    assert leaves["gate_alpha"].shape == (3,) and leaves["gate_alpha"].dtype == jnp.float32


def official_8b() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released 8B checkpoint, the PVM paper."""
    tower, text = "model.visual.", "model.language_model."
    names = {tower + "patch_embed.proj.weight": (1152, 3, 2, 16, 16), tower + "patch_embed.proj.bias": (1152,)}
    names[tower + "pos_embed.weight"] = (2304, 1152)

    def linear(name, out, into):
        names[f"{name}.weight"], names[f"{name}.bias"] = (out, into), (out,)

    def norm(name, width):
        names[f"{name}.weight"] = names[f"{name}.bias"] = (width,)

    for i in range(27):
        block = f"{tower}blocks.{i}."
        norm(block + "norm1", 1152), norm(block + "norm2", 1152)
        linear(block + "attn.qkv", 3456, 1152), linear(block + "attn.proj", 1152, 1152)
        linear(block + "mlp.linear_fc1", 4304, 1152), linear(block + "mlp.linear_fc2", 1152, 4304)
    for merger, width in [("merger.", 1152)] + [(f"deepstack_merger_list.{i}.", 4608) for i in range(3)]:
        norm(tower + merger + "norm", width)
        linear(tower + merger + "linear_fc1", 4608, 4608), linear(tower + merger + "linear_fc2", 4096, 4608)
    names |= {text + "embed_tokens.weight": (151_936, 4096), "lm_head.weight": (151_936, 4096)}
    names[text + "norm.weight"] = (4096,)
    for i in range(36):
        layer = f"{text}layers.{i}."
        for x, rows in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            names[f"{layer}self_attn.{x}_proj.weight"] = (rows, 4096)
        for x, shape in (("gate", (12288, 4096)), ("up", (12288, 4096)), ("down", (4096, 12288))):
            names[f"{layer}mlp.{x}_proj.weight"] = shape
        names |= {f"{layer}self_attn.{x}_norm.weight": (128,) for x in "qk"}
        names |= {f"{layer}{x}_layernorm.weight": (4096,) for x in ("input", "post_attention")}
    return names


def test_check_05_tree_without_pvm_is_the_plain_backbone():
    config = backbone("8B")
    assert expected(qwen3_vl_names.table(config), qwen3_vl.shapes(config)) == official_8b()


def test_check_05_backbone_checkpoint_lacks_the_45_tensors_alone(world, tmp_path):
    save_backbone(tmp_path, world.base, w.BACKBONE)
    jax.tree.map(np.testing.assert_array_equal, load_backbone(tmp_path, w.BACKBONE), world.base)
    tensors = open_weights(tmp_path)
    both = (*qwen3_vl_names.table(w.BACKBONE), *pvm_names.table(w.CAUSAL))
    wanted = expected(both, qwen3_vl.shapes(w.BACKBONE) | shapes(w.CAUSAL))
    assert set(tensors) < set(wanted)
    missing = set(wanted) - set(tensors)
    assert len(missing) == 45 and all(".pvm_block." in name for name in missing)
    with pytest.raises(CheckpointError, match=r"missing tensors \(45\)"):
        load_tree(tmp_path, tensors, both, qwen3_vl.shapes(w.BACKBONE) | shapes(w.CAUSAL))
