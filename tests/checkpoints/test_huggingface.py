"""Qwen3-VL folders made by transformers, to our tree and back, bit for bit; and everything that can be wrong."""

import contextlib
import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxmem.backbones import qwen3_vl
from jaxmem.checkpoints import huggingface, qwen3_vl_names, table, weights
from jaxmem.checkpoints.huggingface import load_backbone, read_config, save_backbone
from jaxmem.checkpoints.table import expected, flatten
from jaxmem.checkpoints.weights import INDEX, SINGLE, open_weights
from jaxmem.errors import CheckpointError, ConfigError
from tests.tiny import write_qwen3_vl

ODD = {"layers": 5, "hidden_size": 80, "vision_depth": 4, "vision_deepstack_visual_indexes": [1, 2, 3]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A single-file folder, its torch model and its config."""
    folder = tmp_path_factory.mktemp("single")
    model = write_qwen3_vl(folder)
    return folder, model, config_of(folder)


@pytest.fixture
def folder(source, tmp_path):
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(source[0], tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    """A sharded folder that a test may spoil."""
    write_qwen3_vl(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def config_of(folder):
    return qwen3_vl.config_from_hf(read_config(folder))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def assert_same_tensors(folder, model, extra=()):
    """A folder holds exactly the parameters of a torch model, bit for bit."""
    state = dict(model.named_parameters())  # a tied head appears once
    tensors = open_weights(folder)
    assert set(tensors) == set(state) | set(extra)
    for name, parameter in state.items():
        array = tensors[name].read()
        assert array.shape == tuple(parameter.shape)
        assert str(array.dtype) == str(parameter.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.ascontiguousarray(array).reshape(-1).view(np.uint8), bits(parameter))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", [None, "100KB"], ids=["single", "sharded"])
def test_round_trip_is_bit_exact(tmp_path, dtype, tied, shard):
    more = ODD if shard else {}
    model = write_qwen3_vl(tmp_path / "in", tied=tied, dtype=dtype, max_shard_size=shard, **more)
    config, hf = config_of(tmp_path / "in"), read_config(tmp_path / "in")
    base = load_backbone(tmp_path / "in", config)
    assert ("head" in base) is not tied
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(base)} == {dtype}
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == sum(p.numel() for p in model.parameters())
    save_backbone(tmp_path / "out", base, config, hf_config=hf, max_shard_size=100_000 if shard else 10**9)
    assert_same_tensors(tmp_path / "out", model)
    assert read_config(tmp_path / "out") == hf
    assert (tmp_path / "out" / SINGLE).exists() is (shard is None)
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_leaves_lie_as_our_tree_says(source):
    folder, model, config = source
    base, state = load_backbone(folder, config), model.state_dict()
    key = state["model.language_model.layers.1.self_attn.k_proj.weight"].numpy()
    np.testing.assert_array_equal(base["layers"]["attention"]["k"]["kernel"][1], key.T)
    patch = state["model.visual.patch_embed.proj.weight"].numpy()
    np.testing.assert_array_equal(base["visual"]["patch_embed"]["kernel"], patch.reshape(32, -1).T)
    bias = state["model.visual.deepstack_merger_list.1.linear_fc2.bias"].numpy()
    np.testing.assert_array_equal(base["visual"]["deepstack"]["fc2"]["bias"][1], bias)
    assert flatten(base).keys() == flatten(qwen3_vl.shapes(config)).keys()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16])
def test_cast_equals_torch(tmp_path, stored, dtype):
    model = write_qwen3_vl(tmp_path, dtype=stored)
    base = load_backbone(tmp_path, config_of(tmp_path), dtype=dtype)
    target = getattr(torch, jnp.dtype(dtype).name)
    want = model.lm_head.weight.detach().to(target).float().numpy()
    assert base["head"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(base["head"], np.float32), want)


@pytest.mark.parametrize("kind", ["one", "tree"])
def test_sharded_target_on_eight_devices(source, kind):
    folder, _, config = source
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    plain, shapes = load_backbone(folder, config, dtype="bfloat16"), qwen3_vl.shapes(config)

    def place(leaf):
        split = leaf.ndim > 1 and leaf.shape[-1] % 8 == 0 and leaf.shape[-2] % 4 == 0
        return jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 2), "fsdp", "tensor") if split else jax.P())

    sharding = jax.NamedSharding(mesh, jax.P()) if kind == "one" else jax.tree.map(place, shapes)
    placed = load_backbone(folder, config, shapes, dtype="bfloat16", sharding=sharding)
    if kind == "tree":
        kernel = placed["layers"]["ffn"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 16, 48)
        assert kernel.sharding == sharding["layers"]["ffn"]["up"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, plain, placed)


def test_sharded_tree_saves_like_a_whole_one(source, tmp_path):
    folder, model, config = source
    mesh = jax.make_mesh((8,), ("fsdp",))
    shapes = qwen3_vl.shapes(config)
    places = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), *(["fsdp"] if x.shape[-1] % 8 == 0 else []))),
        shapes,
    )
    save_backbone(tmp_path / "out", load_backbone(folder, config, sharding=places), config, max_shard_size=150_000)
    assert_same_tensors(tmp_path / "out", model)


def test_each_device_reads_its_part_only(source, monkeypatch):
    folder, _, config = source
    taken = {}

    def counting(path):
        def wrap(name, tensor):
            def box(index):
                block = tensor.box(index)
                taken[name] = taken.get(name, 0) + block.size
                return block

            return dataclasses.replace(tensor, box=box)

        return {name: wrap(name, tensor) for name, tensor in open_weights(path).items()}

    monkeypatch.setattr(huggingface, "open_weights", counting)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    load_backbone(folder, config, sharding=jax.NamedSharding(mesh, jax.P()))
    wanted = {name: int(np.prod(shape)) for name, shape in tensor_shapes(config).items()}
    assert taken == wanted  # replicas share one read
    taken.clear()
    shapes = qwen3_vl.shapes(config)
    split = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), shapes)
    split["layers"]["ffn"]["down"]["kernel"] = jax.NamedSharding(mesh, jax.P(None, "tensor", "fsdp"))
    load_backbone(folder, config, sharding=split)
    assert taken == wanted  # eight parts, together the tensor once


def tensor_shapes(config):
    return expected(qwen3_vl_names.table(config), qwen3_vl.shapes(config))


@pytest.mark.parametrize("size", [1, 40_000, 10**9])
def test_shards_are_what_the_index_says(source, tmp_path, size):
    folder, model, config = source
    save_backbone(tmp_path, load_backbone(folder, config), config, max_shard_size=size)
    assert_same_tensors(tmp_path, model)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]
            assert sum(sizes) <= size or len(sizes) == 1
    if size == 10**9:
        assert files == [SINGLE]
        return
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert set(index["weight_map"].values()) == set(files)


def test_one_tensor_on_the_host_while_saving(source, tmp_path, monkeypatch):
    folder, _, config = source
    base = load_backbone(folder, config)
    fetched = []
    original = jax.lax.dynamic_slice
    monkeypatch.setattr(jax.lax, "dynamic_slice", lambda x, at, sizes: fetched.append(sizes) or original(x, at, sizes))
    save_backbone(tmp_path, base, config)
    assert max(int(np.prod(sizes)) for sizes in fetched) == max(int(np.prod(s)) for s in tensor_shapes(config).values())


@pytest.mark.parametrize("split", ["one", "eight copies", "eight pieces"])
def test_host_holds_one_piece_of_a_leaf_while_loading(source, tmp_path, monkeypatch, split):
    vision = dataclasses.replace(source[2].vision, out_width=128)
    sizes = {"layers": 12, "width": 128, "mlp_width": 512, "heads": 4, "kv_heads": 4, "head_dim": 128, "vocab": 64}
    text = dataclasses.replace(source[2].text, tied=True, **sizes)  # seven equal kernels per layer
    config = dataclasses.replace(source[2], text=text, vision=vision)
    shapes, tensor = qwen3_vl.shapes(config), 128 * 512 * 4
    save_backbone(tmp_path, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), config)
    mesh, pieces = jax.make_mesh((8,), ("fsdp",)), 8 if split == "eight pieces" else 1
    cut = lambda x: jax.P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 2 and x.shape[-1] % 8 == 0 else jax.P()  # noqa: E731
    places = jax.tree.map(lambda x: jax.NamedSharding(mesh, cut(x) if pieces == 8 else jax.P()), shapes)

    # When the runtime frees what it has copied is its own affair: here devices take everything and keep nothing.
    monkeypatch.setattr(jax, "device_put", lambda host, device=None: None)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda *_: None)
    tracemalloc.start()
    load_backbone(tmp_path, config, shapes, sharding=None if split == "one" else places)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    assert peak < 12 * tensor / pieces + 3 * tensor + 500_000 < total / 4


# What can be wrong. --------------------------------------------------------------------------------------------------


def spoil(folder, change):
    """Rewrites model.safetensors with changed tensors."""
    with safe_open(folder / SINGLE, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def refused(folder, config, error=CheckpointError, **settings) -> str:
    with pytest.raises(error) as caught:
        load_backbone(folder, config, **settings)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_folder_without_weights(source, tmp_path):
    config = source[2]
    assert "no such folder" in refused(tmp_path / "nowhere", config)
    assert f"{tmp_path}: no weights; expected model.safetensors" in refused(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    message = refused(tmp_path, config)
    assert "pickled" in message and "pytorch_model.bin" in message and "convert them to safetensors" in message
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    assert "but no model.safetensors.index.json" in refused(tmp_path, config)


@pytest.mark.parametrize("harm", ["truncated", "empty", "garbage", "header"])
def test_corrupt_shard_is_named(sharded, harm):
    config = config_of(sharded)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(
        {"truncated": content[:-100], "empty": b"", "garbage": b"\x07" * 500, "header": b"\xff" * 8 + content[8:]}[harm]
    )
    message = refused(sharded, config)
    assert str(shard) in message and "truncated, corrupt" in message


def test_shard_missing_on_disk(sharded):
    config, shards = config_of(sharded), sorted(sharded.glob("*.safetensors"))
    shards[0].unlink(), shards[2].unlink()
    message = refused(sharded, config)
    assert f"missing shards that {INDEX} names (2): {shards[0].name}, {shards[2].name}" in message


def test_tensor_missing_in_its_shard(sharded):
    config, index = config_of(sharded), json.loads((sharded / INDEX).read_text())
    name, other = "model.language_model.norm.weight", "model-00001-of-"
    index["weight_map"][name] = next(file for file in index["weight_map"].values() if file.startswith(other))
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"in the wrong shard (1): {name} (in {other}" in refused(sharded, config)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../../etc/passwd"}}', "{}"])
def test_damaged_index(sharded, content):
    config = config_of(sharded)
    (sharded / INDEX).write_text(content)
    assert str(sharded) in refused(sharded, config)


def test_all_misfits_in_one_message(folder, source):
    def change(tensors):
        for name in [name for name in tensors if ".mlp.linear_fc" in name]:
            del tensors[name]
        tensors["model.visual.extra"] = np.zeros(3, np.float32)
        tensors["model.language_model.norm.weight"] = np.zeros((65,), np.float32)

    spoil(folder, change)
    message = refused(folder, source[2])
    assert "missing tensors (12):" in message and "(4 more)" in message
    assert "unexpected tensors (1): model.visual.extra" in message
    assert "wrongly shaped tensors (1): model.language_model.norm.weight (65,) (expected (64,))" in message


def test_config_of_another_size(folder, source):
    config = source[2]
    deeper = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=3))
    assert "missing tensors (11): model.language_model.layers.2." in refused(folder, deeper)


def test_unsupported_number_format(folder, source):
    spoil(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].astype(np.int8)}))
    assert "lm_head.weight (I8)" in refused(folder, source[2])


def test_tied_head_stored_twice(tmp_path):
    write_qwen3_vl(tmp_path, tied=True)
    config = config_of(tmp_path)
    plain = load_backbone(tmp_path, config)
    embed = "model.language_model.embed_tokens.weight"
    spoil(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embed].copy()}))
    jax.tree.map(np.testing.assert_array_equal, plain, load_backbone(tmp_path, config))
    spoil(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embed] + 1}))
    assert "set tie_word_embeddings to false" in refused(tmp_path, config)


def test_tensors_of_a_memory_can_be_ignored(folder, source):
    extra = "model.language_model.layers.1.pvm_block.gate_alpha"
    spoil(folder, lambda tensors: tensors.update({extra: np.zeros(1, np.float32)}))
    assert f"unexpected tensors (1): {extra}" in refused(folder, source[2])
    load_backbone(folder, source[2], ignore=r"\.pvm_block\.")


def test_unsupported_model_type(folder, source):
    content = read_config(folder) | {"model_type": "blip"}
    (folder / "config.json").write_text(json.dumps(content))
    kinds = "llama, llava_next, llava_onevision, mistral, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_vl"
    with pytest.raises(ConfigError, match=f"config.json: model_type 'blip' is not supported; supported: {kinds}"):
        read_config(folder)
    other = dataclasses.replace(source[2], model_type="blip")
    assert f"supported: {kinds}" in refused(folder, other, ConfigError)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        read_config(folder)


def test_saving_refuses_to_replace_and_then_replaces_all(source, tmp_path):
    folder, model, config = source
    base = load_backbone(folder, config)
    save_backbone(tmp_path, base, config, max_shard_size=50_000)
    with pytest.raises(CheckpointError, match="holds weights already"):
        save_backbone(tmp_path, base, config)
    (tmp_path / ".writing-killed").mkdir()
    save_backbone(tmp_path, base, config, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert_same_tensors(tmp_path, model)


def test_failed_save_leaves_nothing(source, tmp_path):
    folder, _, config = source
    base = load_backbone(folder, config)
    save_backbone(tmp_path / "old", base, config)
    before = (tmp_path / "old" / SINGLE).read_bytes()
    calls = []

    class Broken:
        """A leaf whose device fails at the first read."""

        shape, dtype = base["visual"]["position_table"].shape, jnp.dtype("float32")

        def __getitem__(self, index):
            raise OSError("device lost")

        def __array__(self, *args, **kwargs):
            calls.append(1)
            raise OSError("device lost")

    base["visual"]["position_table"] = Broken()
    for target in ("old", "new"):
        with pytest.raises(Exception):  # noqa: B017, PT011
            save_backbone(tmp_path / target, base, config, max_shard_size=50_000, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", SINGLE]
    assert (tmp_path / "old" / SINGLE).read_bytes() == before


def test_saving_another_tree_is_refused(source, tmp_path):
    folder, _, config = source
    base = load_backbone(folder, config)
    with pytest.raises(ValueError, match="differ at head"):
        save_backbone(tmp_path / "x", {k: v for k, v in base.items() if k != "head"}, config)
    assert not (tmp_path / "x").exists()


def test_large_files_show_how_far_they_are(tmp_path, monkeypatch):
    told: list[int] = []

    @contextlib.contextmanager
    def bar(what: str, total: int):
        told.append(-total)
        yield told.append

    monkeypatch.setattr(weights, "progress", bar)
    tensors = [(f"part{i}", table.view(np.ones((4, 2 + i), np.float32))) for i in range(3)]
    weights.write_weights(tmp_path, tensors, 60)
    assert told == [-144, 32, 48, 64] and len(list(tmp_path.glob("model-*.safetensors"))) == 3
