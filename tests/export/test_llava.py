"""LLaVA-style backbones with projectors and tilings that transformers lacks, back in torch without a memory."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmem
from jaxmem.backbones import projectors, vit
from jaxmem.checkpoints import projector_names
from jaxmem.checkpoints.huggingface import load_backbone
from jaxmem.checkpoints.table import write_tree
from jaxmem.export import hf, llava

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.backbones.projector_oracle import CASES, features  # noqa: E402
from tests.export import vision_world as w  # noqa: E402
from tests.llava_folder import write_llava  # noqa: E402

PACKER = {"name": "tokenpacker", "levels": [1, 3], "width": 12, "heads": 3}
BACKBONES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "mlp": ("onevision", None, {"vision_aspect_ratio": "anyres", "projector_hidden_act": "gelu_pytorch_tanh"}),
    "avgpool": ("onevision", {"name": "avgpool", "ratio": 2}, {"vision_aspect_ratio": "anyres_max_2"}),
    "ldpv2": ("next", {"name": "ldpv2", "queries": 4}, {"vision_aspect_ratio": "single"}),
    "tokenpacker": ("next", PACKER | {"ratio": 3}, {"vision_feature_layer": -1}),
    "pixel_shuffle": ("next", {"name": "pixel_shuffle", "ratio": 3, "bias": False}, {"vision_feature_layer": [-2, 1]}),
    "c_abstractor": ("onevision", {"name": "c_abstractor", "queries": 9, "width": 12, "depth": 1}, {"tied": True}),
    "resampler": ("next", {"name": "resampler", "queries": 3, "width": 6, "heads": 2, "depth": 2}, {}),
}
ROWS = ("square", "wide", "several", "text", "turns")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[jaxmem.Model, Any, Path]]:
    """Ours, torch's and the folder between them."""

    @functools.cache
    def make(name: str) -> tuple[jaxmem.Model, Any, Path]:
        kind, projector, settings = BACKBONES[name]
        ours = w.write(kind, tmp_path_factory.mktemp("backbone"), projector=projector, **settings)
        folder = w.export(ours, tmp_path_factory.mktemp("exported") / "folder")
        return ours, w.load(folder), folder

    return make


@functools.cache
def torch_projectors() -> Any:
    """The module as users get it."""
    source = hf._CODE / "projectors_jaxmem.py"
    spec = importlib.util.spec_from_file_location("projectors_jaxmem", str(source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_a_projector_gives_our_tokens(case: str) -> None:
    config = CASES[case]
    params = w.random_like(projectors.shapes(config), 4)
    module = torch_projectors().make_projector(llava.projector_section(config)).eval()
    stored = {
        name: torch.tensor(part.read()) for name, part in write_tree(projector_names.table(config, "", ""), params)
    }
    module.load_state_dict(stored)  # all of its tensors, and no others
    given, levels = features(config)
    wanted = np.asarray(jax.jit(projectors.project, static_argnums=0)(config, params, given, levels))
    with torch.no_grad():
        found = module(torch.tensor(given), [torch.tensor(level) for level in levels]).numpy()
    assert found.shape == (3, config.tokens, config.out_width) and np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_and_greedy_answers_equal_ours(exported: Any, name: str) -> None:
    ours, theirs, _ = exported(name)
    w.check(ours, theirs, w.ask(ours, ROWS))


def test_every_projector_is_tried() -> None:
    assert set(BACKBONES) == {*projectors.PROJECTORS, "resampler"}
    assert set(torch_projectors().PROJECTORS) == {*projectors.PROJECTORS, *projectors.RESAMPLERS}


@pytest.mark.parametrize("name", ["tokenpacker", "avgpool"])
def test_tensors_come_back_bit_for_bit(exported: Any, name: str) -> None:
    ours, theirs, folder = exported(name)
    back = load_backbone(folder, ours.spec.backbone)
    assert jax.tree.all(jax.tree.map(lambda one, two: bool((one == two).all()), back, ours.base))
    prefix = "model.multi_modal_projector."
    held = {key for key, _ in theirs.named_parameters() if key.startswith(prefix)}
    assert held == set(projector_names.expected_keys(ours.spec.backbone.vision.projector, prefix))


@pytest.mark.parametrize("name", ["tokenpacker", "ldpv2", "resampler", "avgpool", "c_abstractor"])
def test_the_folder_s_processor_counts_tokens_as_the_model_does(exported: Any, name: str) -> None:
    """With the pixels of transformers' own image processor, from messages to logits."""
    ours, theirs, folder = exported(name)
    reader = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    for chat in ("square", "several", "wide", "text"):
        asked = w.ask(ours, [chat])
        shown = lambda part: {**part, "image": Image.fromarray(part["image"])} if "image" in part else part  # noqa: E731
        messages = [{**turn, "content": [shown(part) for part in turn["content"]]} for turn in asked.chats[0]]
        inputs = reader.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == asked.inputs["input_ids"][0][asked.valid[0]].tolist()
        with torch.no_grad():
            found = theirs(**inputs).logits[0].numpy()
        np.testing.assert_allclose(found, w.logits(theirs, asked)[0][asked.valid[0]], atol=1e-4, rtol=0)


def test_a_saved_processor_is_the_same(exported: Any, tmp_path: Path) -> None:
    _, theirs, folder = exported("tokenpacker")
    first = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    theirs.save_pretrained(tmp_path)
    first.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, backend="pil")
    sizes = [(58, 70), (28, 100), (90, 26), (11, 9)]
    assert [again.tiling.count_tokens(size) for size in sizes] == [first.tiling.count_tokens(size) for size in sizes]
    assert again.image_token == first.image_token == "<|image_pad|>"


def test_several_continuations(exported: Any) -> None:
    ours, theirs, _ = exported("tokenpacker")
    asked = w.ask(ours, ["several", "text", "square"])
    beams = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    out = theirs.generate(**asked.inputs, **beams)[:, asked.inputs["input_ids"].shape[1] :]
    for row, name in enumerate(("several", "text", "square")):
        alone = w.ask(ours, [name])
        said = theirs.generate(**alone.inputs, **beams)[:, alone.inputs["input_ids"].shape[1] :]
        assert said.tolist() == out[2 * row : 2 * row + 2].tolist()


def test_the_folder_has_a_type_of_its_own(exported: Any) -> None:
    ours, theirs, folder = exported("tokenpacker")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "jaxmem_llava_next" and config["jaxmem"]["memory"] is None
    assert config["projector"] == PACKER | {"ratio": 3} and isinstance(
        theirs, transformers.LlavaNextForConditionalGeneration
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "settings", "own"),
    [
        ("next", {}, False),
        ("next", {"vision_aspect_ratio": "single"}, True),
        ("next", {"projector": {"name": "mlp", "act": "silu"}}, False),
        ("next", {"projector": {"name": "avgpool", "ratio": 2}}, True),
        ("onevision", {}, False),
        ("onevision", {"vision_aspect_ratio": "anyres"}, True),
    ],
)
def test_which_backbones_need_classes_of_their_own(tmp_path: Path, kind: str, settings: Any, own: bool) -> None:
    given = dict(settings)
    config = w.config(kind, tmp_path, given.pop("projector", None), **given)
    assert llava.needs_own(config) == own


def test_videos_are_refused_where_the_projector_has_no_map_for_them(exported: Any) -> None:
    ours, theirs, _ = exported("c_abstractor")
    ids = torch.full((1, 3), ours.spec.backbone.video_token)
    with pytest.raises(ValueError, match="give their frames as images"):
        theirs(input_ids=ids, pixel_values_videos=torch.zeros(1, 2, 3, 30, 30))


def test_check_24_transformers_projects_the_hidden_state_before_the_last_block(tmp_path: Path) -> None:
    theirs, seen = write_llava("next", tmp_path, seed=5), []
    theirs.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours = jaxmem.load(tmp_path)
    asked = w.ask(ours, ["square"])
    w.logits(theirs, asked)
    vision = ours.spec.backbone.vision
    patches = np.asarray(asked.batch.patches).reshape(-1, vision.tile_patches, vision.patch_dim)[: len(seen[0])]
    depth = vision.tower.depth
    states = jax.jit(vit.forward, static_argnums=(0, 3))(vision.tower, ours.base["visual"], patches, (depth - 1,))
    assert vision.feature_layers == (-2,) and seen[0].shape[1:] == (vision.tile_patches, vision.tower.width)
    np.testing.assert_allclose(np.asarray(states[0])[:, 1:], seen[0].numpy(), atol=1e-5, rtol=0)
