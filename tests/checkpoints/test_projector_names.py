"""Names of projectors' tensors: what every author's class holds, where they lie in a folder, and the way back."""

import jax
import numpy as np
import pytest

from jaxmem.backbones import projectors
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.checkpoints import projector_names
from jaxmem.checkpoints.huggingface import load_tree
from jaxmem.checkpoints.projector_names import HF, ORIGINAL, expected_keys, table
from jaxmem.checkpoints.table import view, write_tree
from jaxmem.errors import CheckpointError, ConfigError
from tests.backbones.projector_oracle import CASES, by_name, pair, read

CLIP = {"in_width": 1024, "out_width": 1536, "side": 24}
FULL = {
    "mlp": ProjectorConfig("mlp", **CLIP),
    "avgpool": ProjectorConfig("avgpool", **CLIP, ratio=2),
    "ldpv2": ProjectorConfig("ldpv2", **CLIP),
    "tokenpacker": ProjectorConfig("tokenpacker", **CLIP, ratio=2),
    "pixel_shuffle": ProjectorConfig("pixel_shuffle", **CLIP, ratio=2),
    "c_abstractor": ProjectorConfig("c_abstractor", **CLIP),
    **{kind: ProjectorConfig("resampler", **CLIP, kind=kind) for kind in ("perceiver", "honeybee", "q_former")},
}


def two(*names, bias=True):
    return {f"{name}.{part}" for name in names for part in (("weight", "bias") if bias else ("weight",))}


def c_abstractor_keys():
    blocks = [f"abstractor.net.{stage}.b{number}" for stage in (0, 2) for number in (1, 2, 3)]
    convolutions = [f"{block}.conv{number}" for block in blocks for number in (1, 2, 3)]
    keys = {f"{conv}.{leaf}" for conv in convolutions for leaf in ("conv.weight", "bn.weight", "bn.bias")}
    keys |= two(*(f"{block}.se.fc{number}" for block in blocks for number in (1, 2)))
    return keys | {"abstractor.pos_emb"} | two("abstractor.readout.0", "abstractor.readout.2")


def perceiver_keys():
    stem = "vision_resampler.perceiver"
    keys = {f"{stem}.latents"} | two(f"{stem}.norm", "mm_projector.0", "mm_projector.2")
    for layer in (f"{stem}.layers.{i}" for i in range(3)):
        keys |= two(f"{layer}.0.norm_media", f"{layer}.0.norm_latents", f"{layer}.1.0")
        maps = ("0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3")
        keys |= two(*(f"{layer}.{name}" for name in maps), bias=False)
    return keys


def honeybee_keys():
    keys = {"abstractor.query_tokens"} | two("abstractor.visual_input_fc", "abstractor.visual_output_fc")
    for layer in (f"abstractor.encoder.layers.{i}.crossattention." for i in range(6)):
        keys |= two(*(f"{layer}attention.{name}" for name in ("query", "key", "value")))
        keys |= two(*(f"{layer}output.{name}" for name in ("out_proj", "norm2")), f"{layer}norm1", f"{layer}normk")
        keys |= two(*(f"{layer}output.mlp.{name}" for name in ("w1", "w2", "w3", "ffn_ln")))
    return keys


TOKENPACKER = {"q_proj_1.weight", "clip_attn.in_proj_weight", "clip_attn.in_proj_bias"}
TOKENPACKER |= two("k_proj_1.0", "k_proj_1.2", "v_proj_1.0", "v_proj_1.2", "ln_q_1", "ln_k_1", "ln_v_1")
TOKENPACKER |= two("clip_attn.out_proj", "mlp.0", "mlp.2")
KEYS = {
    "mlp": two("0", "2"),
    "avgpool": two("mlp_projector.0", "mlp_projector.2"),
    "ldpv2": two("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0"),
    "tokenpacker": TOKENPACKER,
    "pixel_shuffle": two("mlp1.0", "mlp1.1", "mlp1.3"),
    "c_abstractor": c_abstractor_keys(),
    "perceiver": perceiver_keys(),
    "honeybee": honeybee_keys(),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_authors_names(name):
    prefix = ORIGINAL[name]
    assert set(expected_keys(FULL[name], prefix, "original")) == {prefix + key for key in KEYS[name]}


@pytest.mark.parametrize("name", [name for name in KEYS if name not in ("mlp", "pixel_shuffle")])
def test_in_a_folder_the_authors_names_lie_below_one_prefix(name):
    assert set(expected_keys(FULL[name])) == {HF + key for key in KEYS[name]}


def test_two_projectors_have_names_of_their_own_in_a_folder():
    assert set(expected_keys(FULL["mlp"])) == {HF + key for key in two("linear_1", "linear_2")}
    without = expected_keys(ProjectorConfig("mlp", **CLIP, bias=False))
    assert without == {f"{HF}linear_1.weight": (1536, 1024), f"{HF}linear_2.weight": (1536, 1536)}
    shuffled = expected_keys(FULL["pixel_shuffle"], "model.multi_modal_projector.")
    assert set(shuffled) == {f"model.{HF}{key}" for key in two("layer_norm", "linear_1", "linear_2")}
    assert shuffled[f"model.{HF}layer_norm.weight"] == (4096,)


def test_a_q_former_has_the_names_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    with torch.device("meta"):
        model = Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=1024))
    known = {f"qformer.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    known |= {"query_tokens": (1, 32, 768), "language_projection.weight": (1536, 768)}
    assert expected_keys(FULL["q_former"], "", "original") == {**known, "language_projection.bias": (1536,)}


def test_published_shapes():
    known = {
        "ldpv2": {"peg.peg.0.weight": (1536, 1, 3, 3), "peg.peg.0.bias": (1536,), "mlp.mlp.0.weight": (1536, 1024)},
        "tokenpacker": {
            "q_proj_1.weight": (1024, 1024),
            "k_proj_1.0.weight": (1024, 4096),
            "clip_attn.in_proj_weight": (3072, 1024),
            "mlp.0.weight": (1536, 1024),
        },
        "c_abstractor": {
            "abstractor.pos_emb": (1, 576, 1024),
            "abstractor.net.0.b1.conv1.conv.weight": (1024, 1024, 1, 1),
            "abstractor.net.2.b3.conv2.conv.weight": (1024, 1, 3, 3),
            "abstractor.net.0.b2.se.fc1.weight": (256, 1024, 1, 1),
            "abstractor.readout.0.weight": (1536, 1024),
        },
        "perceiver": {"vision_resampler.perceiver.layers.2.0.to_kv.weight": (1024, 1024)},
        "honeybee": {"abstractor.encoder.layers.5.crossattention.output.mlp.w2.weight": (1024, 4096)},
    }
    for name, shapes in known.items():
        found = expected_keys(FULL[name], "", "original")
        assert {key: found[key] for key in shapes} == shapes


def test_a_wider_tower_gives_the_first_block_a_shortcut():
    siglip = {"in_width": 1152, "out_width": 1536, "side": 27}
    wide = expected_keys(ProjectorConfig("c_abstractor", **siglip), "", "original")
    block = "abstractor.net.0.b1."
    shortcut = {f"{block}downsample.{leaf}" for leaf in ("conv.weight", "bn.weight", "bn.bias")}
    assert set(wide) == KEYS["c_abstractor"] | shortcut
    assert wide[f"{block}downsample.conv.weight"] == (1024, 1152, 1, 1)
    assert wide[f"{block}se.fc1.weight"] == (288, 1024, 1, 1)


@pytest.mark.parametrize("case", CASES)
def test_names_go_back_bit_for_bit(case):
    config, (module, params) = CASES[case], pair(case)
    written, stored = by_name(config, params), module.state_dict()
    assert set(written) == set(stored)
    for name, value in stored.items():
        np.testing.assert_array_equal(written[name], value.numpy(), err_msg=name)
    again = read(config, {HF + name: value for name, value in stored.items()}, HF)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_paths_of_ours_have_their_prefix():
    rules = table(CASES["tokenpacker 2"], "base/projector/")
    tree = {"base": {"projector": projectors.shapes(CASES["tokenpacker 2"])}}
    assert dict(write_tree(rules, tree)).keys() == expected_keys(CASES["tokenpacker 2"]).keys()


def test_faults_are_named():
    with pytest.raises(ConfigError, match="style 'llava' of projector names is not known; there are hf, original"):
        table(FULL["mlp"], style="llava")
    config, (module, _) = CASES["ldpv2"], pair("ldpv2")
    tensors = {name: view(value.numpy()) for name, value in module.state_dict().items()}
    del tensors["peg.peg.0.bias"]
    tensors["extra"] = tensors["peg.peg.0.weight"]
    rules = projector_names.table(config, "", "", "original")
    with pytest.raises(CheckpointError, match=r"(?s)missing tensors.*peg.peg.0.bias.*unexpected tensors.*extra"):
        load_tree("here", tensors, rules, projectors.shapes(config))
