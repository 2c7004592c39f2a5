"""CoMEM in the layouts of its paper's own code, against PEFT and files built by name (acceptance checks 31, 32)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmem
from jaxmem.checkpoints.table import flatten
from jaxmem.data import knowledge
from jaxmem.data.batching import collate
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import comem_merged, original_comem
from jaxmem.memory import comem, item_encoder
from jaxmem.spec import Spec
from tests.export.test_comem import lively
from tests.memory import comem_world as w

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.backbones.prompts import torch_inputs  # noqa: E402

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@functools.cache
def world(family: str, folder: Path) -> tuple[jaxmem.Model, Any]:
    """A model of ours with a lively CoMEM, and the torch model that its backbone was read from."""
    words, write = w.WRITERS[family]
    words(folder)
    theirs = write(folder, seed=5)
    return lively(jaxmem.load(folder)), theirs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda family: tmp_path_factory.mktemp(family))


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, folders: Any) -> tuple[jaxmem.Model, Any]:
    return world(request.param, folders(request.param))


@pytest.fixture
def qwen(folders: Any) -> tuple[jaxmem.Model, Any]:
    return world("qwen2_5_vl", folders("qwen2_5_vl"))


def written(model: jaxmem.Model, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    original_comem.write(model, folder, **settings)
    return folder


def bits(folder: Path, name: str) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a file as its number format and its bytes."""
    return {name: (str(one.dtype), one.tobytes()) for name, one in load_file(folder / name).items()}


def with_comem(bare: jaxmem.Model, config: Any, params: Any) -> jaxmem.Model:
    return dataclasses.replace(bare, spec=Spec(bare.spec.backbone, (config,)), memory={"comem": params})


def params_of(model: jaxmem.Model) -> Any:
    return model.memory["comem"]


def read(folder: Path, model: jaxmem.Model, **settings: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return original_comem.read(folder, model.spec.backbone, model.base, **settings)


def assert_equal(one: Any, two: Any) -> None:
    assert flatten(one).keys() == flatten(two).keys()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_check_31_an_adapter_folder_comes_back_to_the_bit(pair: Any, dtype: Any, tmp_path: Path) -> None:
    model, _ = pair
    first = written(model, tmp_path / "one", dtype=dtype)
    names = {"adapter_config.json", "adapter_model.safetensors", "knowledge_processor.safetensors", "comem.json"}
    assert {path.name for path in first.iterdir()} == names
    config, params = read(first, model)
    assert config == model.spec.comem
    rounded = jax.tree.map(lambda x: x.astype(dtype or x.dtype).astype(jnp.float32), params_of(model))
    assert_equal(params, rounded)
    second = written(with_comem(model, config, params), tmp_path / "two", dtype=dtype)
    for name in ("adapter_model.safetensors", "knowledge_processor.safetensors"):
        assert bits(first, name) == bits(second, name)
        assert {kind for kind, _ in bits(first, name).values()} == {dtype or "float32"}
    for name in ("adapter_config.json", "comem.json"):
        assert (first / name).read_text() == (second / name).read_text()
    about = json.loads((first / "comem.json").read_text())
    assert about["dtype"] == (dtype or "float32") and about["settings"]["order"] == "rank"
    assert about["settings"]["decode_shift"] is None and about["settings"]["bf16_positions"] is False
    assert about["template"].startswith(
        "<|im_start|>user\n{images} Similar image and text knowledge for reference<|im_e"
    )


def torch_states(model: Any, row: Any) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs("row", row)).last_hidden_state[0].numpy()


def test_check_31_peft_loads_the_adapter_and_reads_items_alike(pair: Any, tmp_path: Path) -> None:
    model, theirs = pair
    folder = written(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder)
    found = adapted.load_adapter(folder, adapter_name="again")
    assert not found.missing_keys and not found.unexpected_keys
    layers = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    config = model.spec.comem
    assert len(layers) == item_encoder.modules(config.kernels)
    assert not any("patch_embed" in name or "lm_head" in name for name in layers)
    rows = [knowledge.encode_item(model.processor, config, item) for item in w.ITEMS[:2]]
    batch = collate(rows, w.BUCKETS.of_items, model.processor.pad_token)
    states = jax.jit(
        lambda params: item_encoder.read(
            model.spec.backbone, comem.weights(config, model.base, {"encoder": params}), batch
        )
    )(params_of(model)["encoder"])
    plain = torch_states(theirs.model, rows[0])
    for ours, row in zip(np.asarray(states), rows, strict=True):
        theirs_states = torch_states(adapted.base_model.model.model, row)
        np.testing.assert_allclose(ours[: len(row)], theirs_states, atol=1e-4, rtol=0)
    assert np.abs(torch_states(adapted.base_model.model.model, rows[0]) - plain).max() > 0.1


def merged_folder(model: jaxmem.Model, theirs: Any, folder: Path, dtype: Any, own: bool = True) -> Path:
    """What the released merging script leaves: PEFT's own sums, a second copy of the model, and the Q-Former."""
    adapter = written(model, folder.with_name(f"{folder.name}_adapter"))
    whole = peft.PeftModel.from_pretrained(copy.deepcopy(theirs).to(dtype), adapter).merge_and_unload()

    def released(model: Any, prefix: str = "") -> dict[str, Any]:
        plain = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")  # noqa: E731
        return {prefix + plain(name): tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}

    tensors = released(whole)
    if own:
        tensors |= released(theirs, "model_inf.")
        q_former = load_file(adapter / "knowledge_processor.safetensors")
        tensors |= {f"knowledge_processor.{name}": torch.tensor(one).to(dtype) for name, one in q_former.items()}
    from safetensors.torch import save_file as save_torch

    folder.mkdir()
    save_torch(tensors, folder / "model.safetensors")
    return folder


def torch_bits(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file as load_torch

    return {name: (one.dtype, one.view(torch.uint8).numpy().tobytes()) for name, one in load_torch(folder).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_31_a_merged_folder_comes_back_to_the_bit(qwen: Any, dtype: str, tmp_path: Path) -> None:
    model, theirs = qwen
    folder = merged_folder(model, theirs, tmp_path / "merged", getattr(torch, dtype))
    merged = original_comem.read_merged(folder, model.spec.backbone, heads=4, head_dim=16, depth=2)
    assert merged.config.rank == 0 and not merged.config.query and "encoder" not in merged.params
    bare = dataclasses.replace(model.without_memory(), base=merged.answers)
    reads = with_comem(dataclasses.replace(bare, base=merged.encoder), merged.config, merged.params)
    both = bare.with_encoder(reads)
    (tmp_path / "again").mkdir()
    original_comem.write_merged(both, tmp_path / "again", dtype=dtype)
    first, second = (torch_bits(where / "model.safetensors") for where in (folder, tmp_path / "again"))
    assert first == second and len(first) == 2 * len(theirs.state_dict()) + 18


def updates(config: Any, params: Any) -> dict[str, np.ndarray]:
    """What the factors add to each kernel."""
    leaves, scale = flatten(params["encoder"]), config.alpha / config.rank
    paths = [path.removesuffix("lora_a") for path in leaves if path.endswith("lora_a")]
    return {path: scale * np.asarray(leaves[f"{path}lora_a"] @ leaves[f"{path}lora_b"]) for path in paths}


def test_check_31_factors_are_found_in_a_merged_encoder(qwen: Any, tmp_path: Path) -> None:
    model, theirs = qwen
    known = {"rank": 2, "alpha": 2.0, "heads": 4, "head_dim": 16, "depth": 2}
    wanted = updates(model.spec.comem, params_of(model))
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 0.02)):
        folder = merged_folder(model, theirs, tmp_path / dtype, getattr(torch, dtype))
        stored = dataclasses.replace(model, base=jax.tree.map(lambda x: x.astype(dtype), model.base))  # noqa: B023
        config, params = read(folder, stored, **known)
        assert config == dataclasses.replace(model.spec.comem, dropout=0.05)
        found = updates(config, params)
        assert found.keys() == wanted.keys() and len(found) == len(config.kernels)
        most = max(float(np.abs(found[path] - wanted[path]).max()) for path in wanted)
        assert most < limit < max(float(np.abs(one).max()) for one in wanted.values()) / 10
    with pytest.raises(CheckpointError, match=r"update is not of rank 1 \(\d+\).*\n.*read_merged takes the encoder"):
        read(folder, stored, **known | {"rank": 1})
    other = jax.tree.map(lambda x: x * 1.25, stored.base)
    with pytest.raises(CheckpointError, match=r"without factors that are not the backbone's \(\d+\)"):
        read(folder, dataclasses.replace(stored, base=other), **known)


def test_check_31_what_was_found_writes_the_same_merged_encoder(qwen: Any, tmp_path: Path) -> None:
    """Within the last digit: sums are rounded, so factors found in them may differ from those that made them."""
    model, theirs = qwen
    folder = merged_folder(model, theirs, tmp_path / "merged", torch.float32)
    found = read(folder, model, rank=2, alpha=2.0, heads=4, head_dim=16, depth=2)
    (tmp_path / "again").mkdir()
    original_comem.write_merged(with_comem(model, *found), tmp_path / "again")
    first, second = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, one in first.items():
        np.testing.assert_allclose(second[name], one, atol=2e-6, rtol=0, err_msg=name)


def test_low_rank_is_the_nearest_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 70)) + 1e-3 * rng.normal(size=(40, 70))
    a, b = comem_merged.low_rank(matrix, 3)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(a @ b, u[:, :3] * s[:3] @ v[:3], atol=1e-9)
    a, b = comem_merged.low_rank(matrix[:2], 5)
    assert a.shape == (2, 5) and b.shape == (5, 70)
    np.testing.assert_allclose(a @ b, matrix[:2], atol=1e-12)


def checkpoint(model: jaxmem.Model, folder: Path, scattered: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """A training checkpoint as the released code saves it: FLAT names, the answering model's factors, suffix targets.

    Args:
      model: whose CoMEM it holds.
      folder: to be made.
      scattered: leave the Q-Former to `non_lora_state_dict.bin`, beside an untrained copy.
    """
    source = written(model, folder.with_name("source"))
    tensors = load_file(source / "adapter_model.safetensors")
    flat = lambda name: name.replace("model.model.language_model", "model.model").replace("model.model.v", "model.v")  # noqa: E731
    tensors = {flat(name): one for name, one in tensors.items()}
    inner = {name.replace("base_model.model.", "base_model.model.model_inf."): 2 * one for name, one in tensors.items()}
    own = load_file(source / "knowledge_processor.safetensors")
    folder.mkdir()
    if scattered:
        prefix = "base_model.model.knowledge_processor."
        state = {f"{prefix}original_module.{name}": torch.zeros(one.shape) for name, one in own.items()}
        state |= {f"{prefix}modules_to_save.default.{name}": torch.tensor(one) for name, one in own.items()}
        state["base_model.model.lm_head.weight"] = torch.zeros(4, 4)
        torch.save(state, folder / "non_lora_state_dict.bin")
    else:
        tensors |= {f"base_model.model.knowledge_processor.{name}": one for name, one in own.items()}
    save_file(tensors | inner, folder / "adapter_model.safetensors")
    settings = json.loads((source / "adapter_config.json").read_text())
    settings |= {"modules_to_save": ["knowledge_processor"], "target_modules": ["q_proj", "qkv", "attn.proj", "mlp.0"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, inner


def test_check_32_factors_of_the_model_that_answers_are_left_out_with_a_warning(qwen: Any, tmp_path: Path) -> None:
    model, _ = qwen
    folder, inner = checkpoint(model, tmp_path / "checkpoint-800")
    ups = [name for name in inner if name.endswith("lora_B.weight")]
    most = max(np.abs(inner[up] @ inner[up.replace("lora_B", "lora_A")]).max() for up in ups)
    said = rf"{len(inner)} tensors of factors in the model that answers \(model_inf\.\*\).*max \|dW\| = {most:.3g};?\."
    with pytest.warns(UserWarning, match=said):
        config, params = original_comem.read(folder, model.spec.backbone, model.base, heads=4, head_dim=16, depth=2)
    assert config == model.spec.comem
    assert_equal(params, params_of(model))
    with pytest.raises(ConfigError, match="keep_model_inf_delta: the model that answers cannot have factors"):
        read(folder, model, keep_model_inf_delta=True)


def test_check_32_changes_of_a_merged_model_that_answers_are_told(qwen: Any, tmp_path: Path) -> None:
    model, theirs = qwen
    folder = merged_folder(model, theirs, tmp_path / "merged", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model_inf.model.layers.1.mlp.up_proj.weight"][3, 4] += 0.375
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"changes of its weights in the model .* max \|dW\| = 0.375"):
        original_comem.read(folder, model.spec.backbone, model.base, rank=2, alpha=2.0, heads=4, head_dim=16, depth=2)


def test_check_32_a_folder_without_a_trained_q_former_is_refused(qwen: Any, tmp_path: Path) -> None:
    model, theirs = qwen
    lost = merged_folder(model, theirs, tmp_path / "merged", torch.float32, own=False)
    for reading in (original_comem.read, original_comem.read_merged):
        with pytest.raises(CheckpointError, match=r"holds no Q-Former \(knowledge_processor.*script .* loses it"):
            reading(lost, model.spec.backbone, model.base if reading is original_comem.read else None)
    source = written(model, tmp_path / "alone")
    (source / "knowledge_processor.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no Q-Former"):
        read(source, model)
    own = "base_model.model.knowledge_processor.original_module.latents"
    torch.save({own: torch.zeros(1, 3, 64)}, source / "non_lora_state_dict.bin")
    with pytest.raises(CheckpointError, match="the untrained copy of a Q-Former alone"):
        read(source, model, allow_pickle=True)


def test_the_trained_copy_is_taken_from_a_pickle_that_may_be_opened(qwen: Any, tmp_path: Path) -> None:
    model, _ = qwen
    folder, _ = checkpoint(model, tmp_path / "checkpoint-800", scattered=True)
    with pytest.raises(CheckpointError, match="non_lora_state_dict.bin: is pickled"):
        read(folder, model)
    with pytest.warns(UserWarning, match="model_inf"):
        _, params = original_comem.read(
            folder, model.spec.backbone, model.base, allow_pickle=True, heads=4, head_dim=16, depth=2
        )
    assert_equal(params, params_of(model))
    assert np.abs(params["q_former"]["latents"]).max() > 0


def test_folders_that_do_not_fit_are_refused(qwen: Any, folders: Any, tmp_path: Path) -> None:
    model, _ = qwen
    other, _ = world("qwen3_vl", folders("qwen3_vl"))
    source = written(model, tmp_path / "one")
    with pytest.raises(CheckpointError, match="made for another backbone.*\n?.*model_type: stored qwen2_5_vl"):
        read(source, other)
    with pytest.raises(CheckpointError, match="no such folder"):
        read(tmp_path / "nothing", model)
    settings = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="not plain LoRA .*use_dora = True"):
        read(source, model)
    (source / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="holds a Q-Former, and of the encoder neither factors"):
        read(source, model)
    config, params = read(source, model, rank=0)
    assert config.rank == 0 and params.keys() == {"q_former"}
    with pytest.raises(ConfigError, match="the model has no CoMEM"):
        original_comem.write(model.without_memory(), tmp_path)


def test_other_shapes_of_the_q_former_and_of_the_encoder_come_back(qwen: Any, tmp_path: Path) -> None:
    model, _ = qwen
    for number, settings in enumerate(
        ({"shared": False, "parts": ("visual/blocks",)}, {"rank": 0, "order": "reverse"})
    ):
        other = lively(model.without_memory(), **settings)
        folder = written(other, tmp_path / str(number))
        assert (folder / "adapter_config.json").exists() == bool(other.spec.comem.rank)
        config, params = read(folder, model)
        assert config == other.spec.comem
        assert_equal(params, params_of(other))


def test_an_encoder_beside_the_model_is_written_for_its_own_backbone(qwen: Any, tmp_path: Path) -> None:
    model, _ = qwen
    both = model.without_memory().with_encoder(model)
    folder = written(both, tmp_path / "both")
    alone = written(model, tmp_path / "alone")
    for name in ("adapter_model.safetensors", "knowledge_processor.safetensors"):
        assert bits(folder, name) == bits(alone, name)
    assert_equal(read(folder, model)[1], params_of(model))
