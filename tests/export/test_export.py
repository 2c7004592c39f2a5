"""`jaxmem export`: all or nothing, with a proof that can fail, in formats that come back as they went."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem import cli as command
from jaxmem.adapters import lora
from jaxmem.checkpoints import weights
from jaxmem.checkpoints.huggingface import load_backbone
from jaxmem.checkpoints.table import view
from jaxmem.distributed.mesh import make_mesh
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import adapters, cli, hf, prove
from tests.llava_folder import write_decoder

pytest.importorskip("torch")
PVM = {"layers": (0, 2), "latent": 32, "initialiser": "fan_in", "gate": 0.5}


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxmem.load(dtype="float32").attach("pvm", **PVM)


def with_factors(model: Any) -> Any:
    """The model with LoRA factors that change what it says."""
    model = model.attach_lora(rank=4, layers=(0, 2))
    found = lora.factors(model.base)
    opened = {
        p: one | {"lora_b": 0.1 * jax.random.normal(jax.random.key(3), one["lora_b"].shape)} for p, one in found.items()
    }
    return dataclasses.replace(model, base=lora.place(opened, lora.strip(model.base)))


def same(one: Any, two: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, two))


def test_a_folder_is_proven_and_comes_back_bit_for_bit(model: Any, tmp_path: Path) -> None:
    proof = model.export(tmp_path / "out", max_shard_size=1_000_000)
    assert not proof.faults and proof.keys == {"missing": [], "unexpected": [], "mismatched": []}
    assert proof.tokens == (160, 160) and 0 < proof.difference <= 1e-4
    assert {name.split("/")[1] for name in proof.prompts} == {"on", "off"}
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"at most {proof.difference:.1e}" in card and "160 of 160" in card and str(tmp_path) not in card
    back = jaxmem.load(tmp_path / "out")
    assert back.spec == model.spec and same(back.base, model.base) and same(back.memory, model.memory)


def test_a_folder_of_bfloat16_is_compared_with_the_rounded_model(model: Any, tmp_path: Path) -> None:
    cli.export(model, tmp_path / "out", dtype="bfloat16")
    back = jaxmem.load(tmp_path / "out")
    assert same(back.base, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.base))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merged_factors_are_a_plain_folder(model: Any, tmp_path: Path) -> None:
    adapted = with_factors(model.without_memory())
    proof = cli.export(adapted, tmp_path / "out", "merged")
    assert not proof.faults and proof.tokens == (80, 80)
    written = load_backbone(tmp_path / "out", adapted.spec.backbone)
    wanted = lora.merge(adapted.base)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), written, wanted)
    assert max(jax.tree.leaves(difference)) <= 1e-6
    moved = jnp.abs(written["layers"]["attention"]["q"]["kernel"] - adapted.base["layers"]["attention"]["q"]["kernel"])
    assert np.asarray(moved.max((1, 2)) > 1e-3).tolist() == [True, False, True]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_vl"


def test_a_decoder_alone_is_merged_too(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder", "llama")
    proof = cli.export(with_factors(jaxmem.load(tmp_path / "decoder")), tmp_path / "out", "merged")
    assert not proof.faults and proof.tokens == (40, 40)


def test_the_command_line_writes_what_the_library_writes(model: Any, tmp_path: Path, capsys: Any) -> None:
    model.save(tmp_path / "memory")
    words = [
        "export",
        f"--memory={tmp_path / 'memory'}",
        f"--output={tmp_path / 'out'}",
        "--unproven",
        "--dtype=float32",
    ]
    assert command.main(words) == 0
    assert "not proven" in capsys.readouterr().out
    assert "**None.**" in (tmp_path / "out" / "README.md").read_text()
    assert same(jaxmem.load(tmp_path / "out").memory, model.memory)


def test_a_folder_is_proven_later(model: Any, tmp_path: Path, capsys: Any) -> None:
    folder, card = tmp_path / "out", tmp_path / "out" / "README.md"
    model.export(folder, proven=False)
    head, _, _ = card.read_text().partition("## Proof")
    card.write_text(card.read_text() + "\n## Mine\n\nkept\n")
    words = ["prove", f"--model={folder}"]
    assert command.main(words) == 2
    assert "configuration_jaxmem.py, modeling_jaxmem.py" in (error := capsys.readouterr().err)
    assert "read it, then --trust_remote_code" in error
    words.append("--trust_remote_code")
    assert command.main([*words, "--card"]) == 0
    out = capsys.readouterr().out
    assert "0 missing, 0 unexpected, 0 mismatched" in out and "160 of 160 greedy tokens agree" in out
    written = card.read_text()
    assert written.startswith(head + "## Proof\n\nThe folder was loaded in torch") and "**None.**" not in written
    assert "compared with what jaxmem reads from it" in written
    assert "160 of 160 greedily generated tokens" in written and written.endswith("\n\n## Mine\n\nkept\n")
    reader = folder / "modeling_jaxmem.py"
    gate = "out = (self.gate_alpha.float() * out)"
    reader.write_text(reader.read_text().replace(gate, gate.replace("self", "-self")))
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert f"{folder}: torch does not say what jaxmem says" in error and "wide/on: logits differ by" in error
    card.unlink()
    assert command.main([*words, "--card"]) == 2
    assert "no model card with a section '## Proof'" in capsys.readouterr().err


def test_a_mesh_writes_the_same_bytes(model: Any, tmp_path: Path) -> None:
    sharded = jaxmem.load(dtype="float32", mesh=make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]))
    sharded = with_factors(sharded).attach(model.spec.memories[0])
    plain = with_factors(model.without_memory()).attach(model.spec.memories[0])
    for name, some in {"sharded": sharded, "plain": plain}.items():
        some.export(tmp_path / name, proven=False, max_shard_size=1_000_000)
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes(), name


def test_a_wrong_export_fails_its_proof_and_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(exported: Any, folder: Path, **options: Any) -> None:
        memory = jax.tree.map(lambda leaf: leaf, exported.memory)
        memory["pvm"]["gate_alpha"] = memory["pvm"]["gate_alpha"].at[1].multiply(-1)
        hf.write(dataclasses.replace(exported, memory=memory), folder, **options)

    monkeypatch.setitem(cli.TARGETS, "hf", cli.Target(wrong, prove.prove, "finetune"))
    with pytest.raises(CheckpointError, match=r"wide/on: logits differ by") as error:
        cli.export(model, tmp_path / "out")
    assert "/off" not in str(error.value) and "text/on" not in str(error.value)  # what the memory does not reach agrees
    assert list(tmp_path.iterdir()) == []


def test_missing_and_unexpected_tensors_fail_the_proof(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(exported: Any, folder: Path, **options: Any) -> None:
        hf.write(exported, folder, **options)
        tensors = weights.open_file(folder / weights.SINGLE)
        renamed = [(name.replace("gate_alpha", "gate"), tensor) for name, tensor in tensors.items()]
        weights.write_file(folder / weights.SINGLE, [(name, view(np.array(tensor.read()))) for name, tensor in renamed])

    monkeypatch.setitem(cli.TARGETS, "hf", cli.Target(wrong, prove.prove, "finetune"))
    with pytest.raises(CheckpointError, match=r"2 missing tensors .*gate_alpha.*\n.*2 unexpected tensors"):
        cli.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_weights", full)
    with pytest.raises(OSError, match="No space left"):
        cli.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    bare, out = model.without_memory(), tmp_path / "out"
    refused = {
        "--to=pickle: there are": (model, {"to": "pickle"}),
        "--dtype=int4: there are float32": (model, {"dtype": "int4"}),
        "no memory to export; use --to=merged": (bare, {}),
        "a folder holds one memory; this model has 2": (model.attach("mlp", latent=32), {}),
        "fastv has no torch module": (bare.attach("fastv"), {}),
        "a plain folder has no place for pvm": (model, {"to": "merged"}),
        "reads with the backbone alone": (with_factors(bare).attach("vismem"), {}),
    }
    for message, (some, options) in refused.items():
        with pytest.raises(ConfigError, match=message):
            cli.export(some, out, **options, proven=False)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        cli.export(model, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_the_original_layout_comes_back_by_import(model: Any, tmp_path: Path, capsys: Any) -> None:
    published = model.without_memory().attach("pvm", layers=(0, 2), latent=64, visibility="all")
    proof = published.export(tmp_path / "original", "original")
    assert not proof.faults and proof.keys["changed"] == [] and proof.prompts == {}
    flags = ["--memory=pvm", f"--source={tmp_path / 'original'}", f"--output={tmp_path / 'memory'}"]
    assert command.main(["import", *flags]) == 0
    assert "pvm with" in capsys.readouterr().out
    assert same(jaxmem.load(memory=tmp_path / "memory").memory, published.memory)
    assert command.main(["import", *flags]) == 2 and "not empty" in capsys.readouterr().err


def test_adapters_of_the_model_are_proven_by_peft(model: Any, tmp_path: Path) -> None:
    proof = cli.export(with_factors(model), tmp_path / "out", "peft")
    assert (
        not proof.faults
        and proof.tokens == (80, 80)
        and set(proof.prompts) == {f"{name}/adapter" for name in ("text", "wide", "several", "long")}
    )
    assert proof.keys["changed"] == []
    back, used = jaxmem.load(dtype="float32").restore_lora(tmp_path / "out"), np.array([0, 2])
    written, wanted = (
        jax.tree.map(lambda leaf: leaf[used], lora.factors(some.base)) for some in (back, with_factors(model))
    )
    assert same(written, wanted)


MEMORIES = {
    "vismem": {"queries": 4, "short": 2, "long": 3, "rank": 4},
    "comem": {"latents": 2, "heads": 4, "head_dim": 32, "depth": 2, "rank": 4},
    "vision_remember": {"layers": (0, 1), "inner": 64, "heads": 4, "preset": "vr_v2"},
}


@pytest.mark.parametrize(
    ("name", "to", "tokens"),
    [
        ("vismem", "hf", 200),  # 80 off, 80 on, and what is said while memories are called for
        ("vismem", "peft", 160),
        ("vismem", "original", 0),
        ("comem", "hf", 160),
        ("comem", "peft", 80),
        ("comem", "original", 0),
        ("vision_remember", "hf", 160),
    ],
)
def test_every_memory_is_proven_in_every_format(name: str, to: str, tokens: int, tmp_path: Path) -> None:
    model, number = jaxmem.load(dtype="float32").attach(name, **MEMORIES[name]), iter(range(1, 1000))
    noisy = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(next(number)), leaf.shape)  # noqa: E731
    model = dataclasses.replace(model, memory=jax.tree.map(noisy, model.memory))
    proof = model.export(tmp_path / "out", to)
    equal, of = proof.tokens
    assert not proof.faults and equal == of >= tokens
    assert (to == "original") == (of == 0)
    if to == "hf":
        back = jaxmem.load(tmp_path / "out")
        assert back.spec == model.spec and same(back.base, model.base) and same(back.memory, model.memory)


def test_a_memory_beside_no_adapter_is_read_again(model: Any, tmp_path: Path) -> None:
    proof = model.export(tmp_path / "out", "peft")
    assert proof.prompts == {} and proof.keys["changed"] == []
    flipped = jax.tree.map(lambda leaf: -leaf, model.memory)
    wrong = adapters.prove(dataclasses.replace(model, memory=flipped), tmp_path / "out")
    assert len(wrong.keys["changed"]) == 30 and "30 changed tensors" in wrong.faults[0]
