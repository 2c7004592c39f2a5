"""Folders of CLIP and SigLIP: names in both directions, what config.json leaves out, and what is refused."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from jaxmem.backbones.clip_config import config_from_hf, vision_config
from jaxmem.checkpoints import clip_folder, clip_names
from jaxmem.checkpoints.table import write_tree
from jaxmem.checkpoints.weights import open_weights
from jaxmem.errors import CheckpointError, ConfigError
from tests.backbones.clip_folder import edit, write

KINDS = ("clip", "siglip", "clip_vision", "clip_vision_projected", "siglip_vision")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Kind to (folder, our config, our parameters)."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        write(kind, folder)
        return folder, *clip_folder.load(folder)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_back_bit_for_bit(loaded, kind):
    folder, config, params = loaded(kind)
    stored = open_weights(folder)
    prefix = "" if kind in ("clip_vision", "siglip_vision") else clip_names.VISION
    written = dict(write_tree(clip_names.table(config, prefix), params))
    assert set(written) == set(stored)
    for name, view in written.items():
        np.testing.assert_array_equal(view.read(), stored[name].read(), err_msg=name)


def test_a_vision_tower_is_read_with_and_without_its_prefix(loaded, tmp_path):
    for kind, prefix in (("siglip_vision", "vision_model."), ("clip_vision_projected", "")):
        folder, config, params = loaded(kind)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        bare = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
        other = {name if name == "visual_projection.weight" else prefix + name: bare[name] for name in bare}
        copy = shutil.copytree(folder, tmp_path / kind)
        safetensors.torch.save_file(other, copy / "model.safetensors")
        again = clip_folder.load(copy)
        assert again[0] == config and jax.tree.all(jax.tree.map(np.array_equal, again[1], params))


def test_a_tower_inside_a_backbone_is_read_by_its_own_rules(loaded):
    folder, config, params = loaded("siglip_vision")
    section = json.loads((folder / "config.json").read_text())
    assert vision_config(section) == config.vision
    rules = clip_names.tower(config.vision, "", "vision_tower.vision_model.")
    names = {name for name, _ in write_tree(rules, params["visual"])}
    assert "vision_tower.vision_model.encoder.layers.3.self_attn.out_proj.bias" in names
    assert not any("post_layernorm" in name or ".head." in name for name in names)


def test_shards_and_the_counters_of_early_releases_are_read(loaded, tmp_path):
    write("clip", tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    folder, config, params = loaded("clip")
    assert jax.tree.all(jax.tree.map(np.array_equal, clip_folder.load(tmp_path / "shards")[1], params))
    copy = shutil.copytree(folder, tmp_path / "early")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    counters = {f"{part}_model.embeddings.position_ids": torch.arange(12)[None] for part in ("text", "vision")}
    safetensors.torch.save_file(tensors | counters, copy / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, clip_folder.load(copy)[1], params))


def test_faults_of_a_folder_are_named(loaded, tmp_path):
    folder = shutil.copytree(loaded("clip")[0], tmp_path / "bad")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["extra"] = tensors.pop("vision_model.pre_layrnorm.bias")
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:5].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        clip_folder.load(folder)
    for part in (
        "missing tensors (1): vision_model.pre_layrnorm.bias",
        "unexpected tensors (1): extra",
        "text_projection.weight (5, 28) (expected (18, 28))",
    ):
        assert part in str(caught.value)
    edit(folder / "config.json", model_type="siglip2")
    with pytest.raises(ConfigError, match="bad: config.json: model_type 'siglip2' is not supported.*naflex is not"):
        clip_folder.load(folder)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        clip_folder.load(tmp_path / "nowhere")


def test_what_config_files_leave_out_is_what_transformers_defines():
    for name in ("CLIP", "Siglip"):
        whole = getattr(transformers, f"{name}Config")().to_dict()
        bare = {"model_type": whole["model_type"], "text_config": {"model_type": "x"}, "vision_config": {}}
        assert config_from_hf(bare) == config_from_hf(whole)
        tower = getattr(transformers, f"{name}VisionConfig")().to_dict()
        assert config_from_hf({"model_type": tower["model_type"]}) == config_from_hf(tower)
        assert vision_config(tower) == config_from_hf(whole).vision
    early = {"model_type": "clip", "text_config": {"hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
    assert config_from_hf(early).text.width == transformers.CLIPConfig(**early).text_config.hidden_size == 768
