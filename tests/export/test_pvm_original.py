"""PVM in the layout of its paper's own code, and the pickled files that weights of others may come in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.checkpoints import pvm_names
from jaxmem.checkpoints.huggingface import load_backbone
from jaxmem.checkpoints.table import flatten, write_tree
from jaxmem.checkpoints.weights import read_json
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import original_pvm
from jaxmem.export.pickles import open_pickle
from jaxmem.memory import mlp_branch, pvm
from tests.helpers import write_tokenizer
from tests.memory import world as w

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from tests.memory.test_pvm_official import BLOCK, official_state_dict  # noqa: E402
from tests.tiny import write_qwen3_vl  # noqa: E402

ONE = "cross_attn.k_proj.weight"


def assert_equal_trees(found: Any, wanted: Any) -> None:
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> jaxmem.Model:
    """A Qwen3-VL in bfloat16 with a random PVM as published, causal."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    write_qwen3_vl(folder, seed=5, layers=3, dtype="bfloat16")
    fresh = jaxmem.load(folder).attach("pvm", layers=(0, 2), latent=32)
    params = w.random_like(fresh.memory["pvm"], 1) | {"gate_alpha": jnp.asarray([0.5, -0.7])}
    return dataclasses.replace(fresh, memory={"pvm": params})


def test_check_06_state_dicts_in_the_original_layout_are_read_to_the_bit(tmp_path):
    state = official_state_dict()
    save_file(state, tmp_path / "some.safetensors")
    config, params = original_pvm.read(tmp_path / "some.safetensors", w.BACKBONE)
    assert config == w.ALL  # layers and sizes from names and shapes; the paper's code sees all images
    written = {name: view.read() for name, view in write_tree(pvm_names.table(config), params)}
    assert written.keys() == state.keys() and len(written) == 45
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), err_msg=name)

    wrapped = {name.replace("model.language_model.", "module.model."): t for name, t in state.items()}
    torch.save(wrapped | {"module.lm_head.weight": torch.zeros(2, 2)}, tmp_path / "some.pt")
    again = original_pvm.read(tmp_path / "some.pt", w.BACKBONE, allow_pickle=True)
    assert again[0] == config
    assert_equal_trees(again[1], params)


@pytest.mark.parametrize("dtype", [None, jnp.dtype("bfloat16")])
def test_check_06_folders_in_the_original_layout_come_back_to_the_bit(model, dtype, tmp_path):
    original_pvm.write(model, tmp_path, dtype=dtype, max_shard_size=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    config, params = original_pvm.read(tmp_path, model.spec.backbone)
    assert config == model.spec.memories[0]
    kept = jax.tree.map(lambda leaf: leaf if dtype is None else leaf.astype(dtype).astype(leaf.dtype), model.memory)
    assert_equal_trees(params, kept["pvm"])
    base = load_backbone(tmp_path, model.spec.backbone, ignore=original_pvm.TENSORS)
    assert_equal_trees(base, model.base)

    said = read_json(tmp_path / "config.json")
    for section in (said, said["text_config"]):
        assert (section["pvm_layers"], section["pvm_hidden_size"]) == ([0, 2], 32)
    assert said["dtype"] == "bfloat16" and (tmp_path / "tokenizer.json").is_file()
    assert original_pvm.read(tmp_path, model.spec.backbone, visibility="all")[0].visibility == "all"
    (tmp_path / "config.json").unlink()
    assert original_pvm.read(tmp_path, model.spec.backbone)[0].visibility == "all"


def test_check_06_the_backbone_of_such_a_folder_loads_in_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    original_pvm.write(model, tmp_path)
    load = transformers.Qwen3VLForConditionalGeneration.from_pretrained
    _, found = load(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    own = {BLOCK.format(layer) + "gate_alpha" for layer in (0, 2)}
    assert own < set(found["unexpected_keys"]) and len(found["unexpected_keys"]) == 30


def with_memories(model: jaxmem.Model, *memories: Any) -> jaxmem.Model:
    """What is refused is refused for its settings: there are no parameters."""
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, memories=memories))


def changed(**changes: Any) -> dict[str, Any]:
    """The official tensors with some left out (None) or put in."""
    state = official_state_dict() | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (changed(**{BLOCK.format(3) + ONE: None}), ["missing tensors (1)", BLOCK.format(3) + ONE]),
        (changed(**{BLOCK.format(1) + "bias": torch.ones(1)}), ["unexpected tensors (1)", BLOCK.format(1) + "bias"]),
        (changed(**{"model.pvm_extra": torch.ones(1)}), ["unexpected tensors (1)", "model.pvm_extra"]),
        (changed(**{BLOCK.format(4) + ONE: torch.ones(3, 3)}), ["wrongly shaped tensors (1)", "(3, 3)"]),
        (
            changed(**{"model.layers.1.pvm_block.gate_alpha": torch.ones(1)}),
            ["in front of layers", "model., model.lan"],
        ),
        (changed(**{BLOCK.format(9) + "gate_alpha": torch.ones(1)}), ["a decoder of 5 lacks (1): 9"]),
        ({BLOCK.format(1) + "gate_alpha": torch.ones(1)}, ["in all layers", "cross_attn.q_norm.weight"]),
        ({"model.norm.weight": torch.ones(1)}, ["holds no PVM", "pvm_block.gate_alpha"]),
    ],
)
def test_state_dicts_that_are_no_pvm_are_refused(state, says, tmp_path):
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError) as error:
        original_pvm.read(tmp_path / "odd.safetensors", w.BACKBONE)
    assert all(part in str(error.value) for part in [*says, "odd.safetensors"]), error.value


def test_a_pvm_of_another_backbone_is_refused(tmp_path):
    save_file(official_state_dict(), tmp_path / "some.safetensors")
    narrow = dataclasses.replace(w.BACKBONE, text=dataclasses.replace(w.BACKBONE.text, width=24))
    with pytest.raises(CheckpointError, match=r"wrongly shaped tensors \(9\)"):
        original_pvm.read(tmp_path / "some.safetensors", narrow)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"query": "normed"}, "query is 'normed', not 'residual'"),
        ({"source": "hidden"}, "source is 'hidden', not 'visual'"),
        ({"silence": False, "output_norm": False}, "silence is False, not True; output_norm is False, not True"),
        ({"mlp_width": 40}, "mlp_width is 40, not 48"),
    ],
)
def test_settings_that_the_papers_code_lacks_are_not_written(model, settings, says, tmp_path):
    odd = pvm.create(model.spec.backbone, latent=32, layers=(1,), **settings)
    with pytest.raises(ConfigError, match=says):
        original_pvm.write(with_memories(model, odd), tmp_path)
    assert not any(tmp_path.iterdir())


def test_models_that_the_papers_code_lacks_are_not_written(model, tmp_path):
    (ours,) = model.spec.memories
    control = mlp_branch.create(model.spec.backbone, latent=32, layers=(1,))
    for memories, says in (((), "no memory"), ((ours, control), "pvm and mlp"), ((control,), "mlp")):
        with pytest.raises(ConfigError, match=f"the model has {says}"):
            original_pvm.write(with_memories(model, *memories), tmp_path / "out")
    other = dataclasses.replace(model.spec.backbone, model_type="qwen2_5_vl")
    another = dataclasses.replace(model, spec=dataclasses.replace(model.spec, backbone=other))
    with pytest.raises(ConfigError, match="knows Qwen3-VL, not qwen2_5_vl"):
        original_pvm.write(another, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Trap:
    """Makes a folder when a pickle of it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_pickles_are_refused_unless_allowed_and_never_run(tmp_path):
    file, sprung = tmp_path / "pytorch_model.bin", tmp_path / "sprung"
    torch.save(official_state_dict() | {"trap": Trap(sprung)}, file)
    for source in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is pickled.*--allow_pickle"):
            original_pvm.read(source, w.BACKBONE)
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            original_pvm.read(source, w.BACKBONE, allow_pickle=True)
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists()  # the trap would have worked


@pytest.mark.parametrize("modern", [True, False])
def test_pickled_tensors_are_read_in_their_own_formats(tmp_path, modern):
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = {
        "wide": whole,
        "narrow": whole.bfloat16(),
        "half": whole.half(),
        "turned": whole.T,
        "one": torch.tensor(2.5),
    }
    state["trained"] = torch.nn.Parameter(whole[:2])
    torch.save(state, tmp_path / "some.pth", _use_new_zipfile_serialization=modern)
    views = open_pickle(tmp_path / "some.pth", True)
    assert list(views) == list(state)
    for name, view in views.items():
        assert view.read().dtype == view.dtype == jnp.dtype(str(state[name].dtype).removeprefix("torch."))
        assert view.shape == view.read().shape
        np.testing.assert_array_equal(view.read().astype(np.float32), state[name].detach().float().numpy())
    np.testing.assert_array_equal(views["narrow"].read((slice(1, 3), slice(2, 5))), views["narrow"].read()[1:3, 2:5])


def test_nested_pickles_are_flattened_where_told(tmp_path):
    content = {"state": {"m": torch.ones(2), "deep": {"n": torch.zeros(1)}}, "config": {"lr": 1e-4}, "step": 3}
    torch.save(content, tmp_path / "main.pt")
    assert list(open_pickle(tmp_path / "main.pt", True, nested=True)) == ["state.m", "state.deep.n"]
    with pytest.raises(CheckpointError, match=r"no tensors \(3\): state \(dict\), config \(dict\), step \(int\)"):
        open_pickle(tmp_path / "main.pt", True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], "holds a list, expected a dict"),
        ({"n": torch.ones(1, dtype=torch.int64)}, r"unsupported type \(1\): n \(torch.int64\)"),
        (b"PK no pickle at all", "damaged|corrupt"),
        (b"", "truncated"),
        (None, "no such file"),
    ],
)
def test_pickles_that_cannot_be_used_are_refused(content, says, tmp_path):
    file = tmp_path / "odd.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"odd.pt: .*(\n.*)?({says})"):
        open_pickle(file, True)
