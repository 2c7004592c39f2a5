"""Qwen2-VL and Qwen2.5-VL folders: both layouts of names in, the published one out, bit for bit; no mixtures."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxmem.adapters import lora
from jaxmem.backbones.published import PUBLISHED
from jaxmem.backbones.registry import backbone, config_from_hf
from jaxmem.checkpoints import peft
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, load_backbone, read_config, save_backbone
from jaxmem.checkpoints.table import expected, flatten
from jaxmem.checkpoints.weights import SINGLE, open_file, open_weights
from jaxmem.errors import CheckpointError
from tests.tiny import write_qwen2_5_vl, write_qwen2_vl

WRITERS = {"qwen2_vl": write_qwen2_vl, "qwen2_5_vl": write_qwen2_5_vl}


@pytest.fixture(scope="module", params=WRITERS)
def source(request, tmp_path_factory):
    """A folder in the published layout, its torch model and its config."""
    folder = tmp_path_factory.mktemp(request.param)
    model = WRITERS[request.param](folder, layers=3)
    return folder, model, config_from_hf(read_config(folder))


def published(name: str) -> str:
    """A parameter's name in torch's memory, as the released files spell it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def rename(folder, change) -> None:
    """Rewrites model.safetensors with changed names."""
    with safe_open(folder / SINGLE, "np") as file:
        tensors = {change(name): file.get_tensor(name) for name in file.keys()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def nested(name: str) -> str:
    """The other way round."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"


def assert_equal_trees(one, two):
    assert flatten(one).keys() == flatten(two).keys()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", WRITERS)
def test_round_trip_is_bit_exact(tmp_path, family, tied, dtype):
    model = WRITERS[family](tmp_path / "in", tied=tied, dtype=dtype, max_shard_size="100KB")
    hf = read_config(tmp_path / "in")
    config = config_from_hf(hf)
    base = load_backbone(tmp_path / "in", config)
    assert ("head" in base) is not tied
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == sum(p.numel() for p in model.parameters())
    save_backbone(tmp_path / "out", base, config, hf_config=hf, max_shard_size=100_000)
    ours, theirs = open_weights(tmp_path / "out"), dict(model.named_parameters())
    assert set(ours) == {published(name) for name in theirs}
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_leaves_lie_as_our_tree_says(source):
    folder, model, config = source
    base, state = load_backbone(folder, config), model.state_dict()
    bias = state["model.language_model.layers.1.self_attn.k_proj.bias"].numpy()
    np.testing.assert_array_equal(base["layers"]["attention"]["k"]["bias"][1], bias)
    patch = state["model.visual.patch_embed.proj.weight"].numpy()
    np.testing.assert_array_equal(base["visual"]["patch_embed"]["kernel"], patch.reshape(32, -1).T)
    merged = state["model.visual.merger.mlp.2.weight"].numpy()
    np.testing.assert_array_equal(base["visual"]["merger"]["fc2"]["kernel"], merged.T)
    assert flatten(base).keys() == flatten(backbone(config.model_type).shapes(config)).keys()


def test_both_layouts_give_the_same_tree(source, tmp_path):
    folder, _, config = source
    copy = shutil.copytree(folder, tmp_path / "copy")
    rename(copy, nested)
    assert all(name.startswith(("model.language_model.", "model.visual.", "lm_head")) for name in open_weights(copy))
    assert_equal_trees(load_backbone(copy, config), load_backbone(folder, config))
    save_backbone(tmp_path / "out", load_backbone(copy, config), config)
    assert set(open_weights(tmp_path / "out")) == set(open_weights(folder))


def test_a_tied_head_stored_twice_is_found_in_both_layouts(tmp_path):
    write_qwen2_vl(tmp_path, tied=True)
    config = config_from_hf(read_config(tmp_path))
    plain = load_backbone(tmp_path, config)
    for change in (lambda name: name, nested):
        with safe_open(tmp_path / SINGLE, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        embed = next(name for name in tensors if "embed_tokens" in name)
        save_file(tensors | {"lm_head.weight": tensors[embed].copy()}, tmp_path / SINGLE, {"format": "pt"})
        assert_equal_trees(load_backbone(tmp_path, config), plain)
        rename(tmp_path, change)
    save_file({nested(n): t for n, t in tensors.items()} | {"lm_head.weight": tensors[embed] + 1}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_backbone(tmp_path, config)


def test_a_mixture_is_refused_by_name(source, tmp_path):
    folder, _, config = source
    copy = shutil.copytree(folder, tmp_path / "copy")
    rename(copy, lambda name: nested(name) if name in ("model.norm.weight", "visual.merger.ln_q.weight") else name)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(copy, config)
    message = str(caught.value)
    assert "tensors named as model.language_model.* and model.visual.* (2)" in message
    assert "model.language_model.norm.weight" in message and "model.visual.merger.ln_q.weight" in message
    assert "tensors named as model.* and visual.* (" in message and "by one layout" in message


def test_missing_tensors_are_named_in_the_layout_of_the_folder(source, tmp_path):
    folder, _, config = source
    copy = shutil.copytree(folder, tmp_path / "copy")
    rename(
        copy, lambda name: nested(name).replace("layers.2.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.offset")
    )
    with pytest.raises(CheckpointError) as caught:
        load_backbone(copy, config)
    stem = "model.language_model.layers.2.self_attn.q_proj"
    assert f"missing tensors (1): {stem}.bias" in str(caught.value)
    assert f"unexpected tensors (1): {stem}.offset" in str(caught.value)


@pytest.mark.parametrize(("name", "tensors"), [("Qwen2-VL-7B-Instruct", 730), ("Qwen2.5-VL-7B-Instruct", 729)])
def test_the_published_folders_are_what_the_table_expects(name, tensors):
    """729 tensors in Qwen2.5-VL-7B: 339 of the decoder with its head, 390 of the tower."""
    config = PUBLISHED[name]
    wanted = expected(BACKBONE_TABLES[config.model_type].table(config), backbone(config.model_type).shapes(config))
    assert len(wanted) == tensors and sum(not key.startswith("visual.") for key in wanted) == 339
    assert wanted["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert wanted["model.layers.27.self_attn.v_proj.bias"] == (512,)
    assert wanted["visual.merger.mlp.2.weight"] == (3584, 5120)


def test_adapters_are_named_as_torch_holds_the_model_and_read_in_both_layouts(source, tmp_path):
    folder, model, config = source
    base = load_backbone(folder, config)
    base = lora.attach(jax.random.key(0), lora.LoRAConfig(rank=2, targets=("q", "down")), base)
    peft.save_adapter(tmp_path, base, config)
    names = set(open_file(tmp_path / peft.WEIGHTS))
    modules = {name for name, _ in model.named_modules()}
    stems = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}
    assert stems <= modules and len(stems) == 6
    plain = load_backbone(folder, config)
    assert_equal_trees(lora.factors(peft.load_adapter(tmp_path, plain, config)), lora.factors(base))
    with safe_open(tmp_path / peft.WEIGHTS, "np") as file:
        tensors = {name.replace("model.language_model.", "model."): file.get_tensor(name) for name in file.keys()}
    save_file(tensors, tmp_path / peft.WEIGHTS)
    assert_equal_trees(lora.factors(peft.load_adapter(tmp_path, plain, config)), lora.factors(base))
