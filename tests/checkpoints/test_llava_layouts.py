"""Checks 22 and 23: LLaVA folders name tensors in four ways, all are read, and what belongs to pooling is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmem
from jaxmem.checkpoints import llava_names
from jaxmem.checkpoints.huggingface import load_backbone, save_backbone
from jaxmem.errors import CheckpointError
from tests.llava_folder import write_llava

FILE = "model.safetensors"


@pytest.fixture(scope="module", params=["next", "onevision"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    write_llava(request.param, folder, seed=6)
    return folder, jaxmem.load(folder)


def renamed(folder: Path, target: Path, layout: llava_names.LlavaLayout) -> dict[str, np.ndarray]:
    """A copy of a folder (as transformers saves it) with the names of another layout."""
    shutil.copytree(folder, target)
    pairs = {"language_model.model.": f"{layout.text}.", "language_model.lm_head.weight": layout.head}
    pairs |= {"vision_tower.": layout.visual, "multi_modal": f"{layout.joint}multi_modal"}
    pairs |= {"image_newline": f"{layout.joint}image_newline"}
    tensors = {}
    for name, tensor in load_file(folder / FILE).items():
        old = next(prefix for prefix in pairs if name.startswith(prefix))
        tensors[pairs[old] + name[len(old) :]] = tensor
    save_file(tensors, target / FILE)
    return tensors


@pytest.mark.parametrize("place", range(4))
def test_check_23_every_layout_gives_the_same_weights(source, tmp_path: Path, place: int) -> None:
    folder, model = source
    layout = llava_names.LAYOUTS[place]
    tensors = renamed(folder, tmp_path / "copy", layout)
    assert any("post_layernorm" in name for name in tensors)  # read past: it belongs to pooling
    again = load_backbone(tmp_path / "copy", model.spec.backbone)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, model.base))


def test_a_stray_tensor_is_named(source, tmp_path: Path) -> None:
    folder, model = source
    tensors = renamed(folder, tmp_path / "copy", llava_names.RELEASE_5)
    save_file(tensors | {"model.vision_tower.extra.weight": np.zeros(3, np.float32)}, tmp_path / "copy" / FILE)
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(1\): model.vision_tower.extra.weight"):
        load_backbone(tmp_path / "copy", model.spec.backbone)


def test_weights_are_written_in_the_published_layout(source, tmp_path: Path) -> None:
    folder, model = source
    save_backbone(tmp_path / "out", model.base, model.spec.backbone)
    names = load_file(tmp_path / "out" / FILE)
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in names
    assert "language_model.model.embed_tokens.weight" in names and "image_newline" in names
    again = load_backbone(tmp_path / "out", model.spec.backbone)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, model.base))
