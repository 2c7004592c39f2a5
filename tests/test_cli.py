"""The command line: dispatch, flags, one clear message per mistake, and the doctor's report."""

import importlib
import inspect
import json
import subprocess
import sys
import types

import pytest

from jaxmem import assets, cli, doctor, verbs
from jaxmem.errors import CheckpointError
from jaxmem.verbs import Flag


@pytest.fixture
def spy(monkeypatch, tmp_path):
    """A verb `spy` whose function records its keyword arguments; returns the records and a configuration file."""
    calls = []
    module = types.ModuleType("spy_verb")
    module.main = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "spy_verb", module)
    kinds = (Flag("size", "int", 3, "a number"), Flag("image", "texts", [], "a file"), verbs._JSON)
    verb = verbs.Verb("spy_verb:main", "records", kinds, config="optional", argument="NAME", example="jaxmem spy x")
    monkeypatch.setattr(cli, "VERBS", {**cli.VERBS, "spy": verb})
    path = tmp_path / "recipe.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'steps': 1, 'on': True})"
    )
    return types.SimpleNamespace(calls=calls, config=str(path), module=module)


def failure(capsys, *words):
    """The message of a command line that must end with exit code 2 and nothing on standard output."""
    assert cli.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_flags_become_arguments(spy):
    words = ["spy", "--size=4", "decode", "--image=a.png", "--image", "b.png", "--json"]
    assert cli.main(words) == 0
    assert spy.calls == [{"size": 4, "image": ["a.png", "b.png"], "json": True, "config": None, "name": "decode"}]


def test_overrides_reach_the_configuration(spy):
    assert cli.main(["spy", "x", f"--config={spy.config}", "--config.steps=7", "--noconfig.on"]) == 0
    assert cli.main(["spy", "x", "--config.steps", "8", "--config", spy.config]) == 0
    assert [call["config"].steps for call in spy.calls] == [7, 8]
    assert [call["config"].on for call in spy.calls] == [False, True]


def test_one_call_does_not_leak_into_the_next(spy):
    cli.main(["spy", "x", "--size=9", "--image=a.png"])
    cli.main(["spy", "x"])
    assert spy.calls[1]["size"] == 3 and spy.calls[1]["image"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["spy", "x", "--sise=4"], "spy: unknown flag --sise; did you mean '--size'?"),
        (["spy", "x", "--size=four"], "flag --size=four"),
        (["spy"], "spy needs NAME; for example: jaxmem spy x"),
        (["spy", "x", "y"], "spy: unexpected word 'y'"),
        (["spy", "x", "--config.steps=1"], "there is no --config=FILE.py"),
        (["spy", "x", "--config=nowhere.py"], "no configuration file 'nowhere.py'"),
        (["train"], "train needs --config=FILE.py; for example: jaxmem train --config="),
        (["doctor", "--config=a.py"], "doctor: unknown flag --config"),
        (["generate", "--promt=hello"], "did you mean '--prompt'?"),
    ],
)
def test_wrong_command_lines(spy, capsys, words, message):
    assert message in failure(capsys, *words)
    assert spy.calls == []


def test_unknown_configuration_key(spy, capsys):
    message = failure(capsys, "spy", "x", f"--config={spy.config}", "--config.stepz=3")
    assert message == f"jaxmem: {spy.config}: unknown key 'config.stepz'; did you mean 'config.steps'?\n"


def test_an_error_of_ours_is_one_line_unless_debug(spy, capsys):
    def fail(**_):
        raise CheckpointError("model.safetensors: truncated")

    spy.module.main = fail
    assert failure(capsys, "spy", "x") == "jaxmem: model.safetensors: truncated\n"
    with pytest.raises(CheckpointError):
        cli.main(["spy", "x", "--debug"])


def test_other_errors_keep_their_traceback(spy):
    def fail(**_):
        raise RuntimeError("a bug")

    spy.module.main = fail
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["spy", "x"])


def test_interrupt_and_exit_code(spy, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    spy.module.main = interrupt
    assert cli.main(["spy", "x"]) == 130
    spy.module.main = lambda **_: 5
    assert cli.main(["spy", "x"]) == 5


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.VERBS) and "--config.key=value" in text
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_of_a_verb(capsys, name):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    verb = cli.VERBS[name]
    assert verb.summary in text and verb.example in text
    assert all(f"--{flag.name} " in text for flag in verb.flags)
    assert ("--config.KEY" in text) == (verb.config != "none")


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_function_of_a_verb_takes_its_flags(name):
    verb = cli.VERBS[name]
    module, function = verb.target.split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    arguments = [flag.name for flag in verb.flags] + (["config"] if verb.config != "none" else [])
    signature.bind(**dict.fromkeys(arguments + ([verb.argument.lower()] if verb.argument else [])))


def test_as_a_process():
    run = [sys.executable, "-m", "jaxmem.cli"]
    wrong = subprocess.run([*run, "doctr"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "jaxmem: unknown verb 'doctr'; did you mean 'doctor'?\n"
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("jaxmem ")


def test_doctor_json(capsys):
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["problems"] else 0)
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["jax"] == importlib.import_module("jax").__version__
    assert found["jax"]["backend"] == "cpu" and len(found["jax"]["devices"]) == 8 and found["jax"]["error"] is None
    assert found["host"]["cores"] >= 1 and 0 < found["host"]["available"] <= found["host"]["memory"]
    assert found["extras"]["torch"] == {"missing": [], "for": doctor.EXTRAS["torch"][1]}
    whole = (assets.TINY / "config.json").is_file()
    assert (found["tiny_backbone"] == str(assets.TINY)) == whole


def test_doctor_text_shows_every_fact(capsys):
    cli.main(["doctor"])
    text = capsys.readouterr().out
    for word in ("Python", "packages", "devices (backend: cpu)", "host:", "compile cache:", "extras", "tiny backbone:"):
        assert word in text
    for name in (*doctor.PACKAGES, *doctor.EXTRAS):
        assert f"\n  {name} " in text


@pytest.mark.parametrize(
    ("jax_version", "flax_version", "broken"),
    [
        ("0.11.1", "0.12.8", True),
        ("0.12.0.1", "0.12.8", True),
        ("0.11.1", "0.12.9", False),
        ("0.11.0", "0.12.8", False),
    ],
)
def test_doctor_names_the_broken_pair(jax_version, flax_version, broken):
    packages = doctor.versions() | {"jax": jax_version, "flax": flax_version}
    found = doctor.problems({"packages": packages, "jax": {"error": None}, "tiny_backbone": "here"})
    assert any("flax>=0.12.9" in problem for problem in found) == broken


@pytest.mark.parametrize(("version", "wrong"), [("0.10.1", False), ("0.10.2", True), ("0.12.0.1", False)])
def test_doctor_names_the_jax_that_computes_wrongly(version, wrong):
    packages = doctor.versions() | {"jax": version, "flax": "0.12.9"}
    found = doctor.problems({"packages": packages, "jax": {"error": None}, "tiny_backbone": "here"})
    assert any("computes some batched products wrongly" in problem for problem in found) == wrong


def test_doctor_names_what_is_missing(monkeypatch):
    packages = doctor.versions() | {"grain": None}
    found = doctor.problems({"packages": packages, "jax": {"error": "RuntimeError: no TPU"}, "tiny_backbone": None})
    assert any(p.startswith("grain is not installed") and "pip install grain" in p for p in found)
    assert any("no TPU" in p for p in found) and any("tiny backbone" in p for p in found)
    monkeypatch.setitem(doctor.EXTRAS, "torch", (("no-such-distribution",), "x"))
    assert doctor.report()["extras"]["torch"]["missing"] == ["no-such-distribution"]


def test_doctor_survives_a_jax_that_does_not_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    found = doctor.report()
    assert "ImportError" in found["jax"]["error"] or "ModuleNotFoundError" in found["jax"]["error"]
    assert "jax does not start" in doctor.render(found)
