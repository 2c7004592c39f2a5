"""Configurations: files, overrides and dataclasses are strict, and their errors say what would be right."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from jaxmem import config
from jaxmem.errors import ConfigError

FILE = """
from ml_collections import ConfigDict

from jaxmem.config import choose

WIDTHS = {"2b": 2048, "8b": 4096}


def get_config(size="2b"):
    return ConfigDict({
        "width": choose(WIDTHS, size, "size"), "steps": 100, "rate": 1e-4, "remat": True, "note": None, "name": "run",
        "layers": (8, 16), "optimizer": {"b1": 0.9, "warmup": 10}, "extra": {},
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(FILE)
    return str(path)


def test_reads_a_file_with_and_without_argument(file):
    assert config.load(file).width == 2048
    assert config.load(f"{file}:8b").width == 4096


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.steps=5", "steps", 5),
        ("--config.rate=1", "rate", 1.0),
        ("--config.remat=false", "remat", False),
        ("--noconfig.remat", "remat", False),
        ("--config.remat", "remat", True),
        ("--config.name=a=b,c:d", "name", "a=b,c:d"),
        ("--config.layers=(1,2,3)", "layers", (1, 2, 3)),
        ("--config.layers=4", "layers", (4,)),
        ("--config.note=3", "note", 3),
        ("--config.note=two words", "note", "two words"),
        ("--config.note=none", "note", None),
        ("--config.optimizer.b1=0.5", "optimizer.b1", 0.5),
        ("--config.extra={'a': 1}", "extra.a", 1),
    ],
)
def test_override(file, word, key, value):
    found = config.load(file, [word])
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_and_the_file_is_untouched(file):
    assert config.load(file, ["--config.steps=1", "--config.steps=2"]).steps == 2
    assert config.load(file).steps == 100


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.step=5", r"recipe.py: unknown key 'config.step'; did you mean 'config.steps'\?"),
        ("--config.warmup=5", r"unknown key 'config.warmup'; did you mean 'config.optimizer.warmup'\?"),
        ("--config.optimizer.warm_up=5", r"did you mean 'config.optimizer.warmup'\?"),
        ("--config.optimiser.b1=5", r"did you mean 'config.optimizer.b1'\?"),
        ("--config.zzz=5", r"unknown key 'config.zzz'; valid: config.extra, config.layers, .*config.width"),
        ("--config.steps=many", r"--config.steps=many: 'config.steps' takes int \(it is 100\)"),
        ("--config.steps=1.5", r"'config.steps' takes int"),
        ("--config.rate=fast", r"'config.rate' takes float"),
        ("--config.remat=maybe", r"'config.remat' takes bool"),
        ("--config.steps", r"'config.steps' takes int"),
        ("--config.optimizer=adam", r"'config.optimizer' is a section; set one of its keys: b1, warmup"),
        ("--config.steps.x=1", r"unknown key 'config.steps.x'"),
        ("steps=4", r"'steps=4' is no override; write --config.key=value"),
        ("--config.=4", r"is no override"),
    ],
)
def test_bad_override(file, word, message):
    with pytest.raises(ConfigError, match=message):
        config.load(file, [word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"no function get_config\(\)"),
        ("def get_config(:", r"SyntaxError"),
        ("def get_config(): return 3", r"get_config\(\) returned int, not an ml_collections.ConfigDict"),
        ("def get_config(): return 1 / 0", r"ZeroDivisionError"),
        ("def get_config(size): return size", r"get_config\(size\) needs an argument: .*bad.py:NAME"),
        ("import no_such_module_of_anyone", r"ModuleNotFoundError"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(str(path))
    assert "bad.py" in str(caught.value)


def test_missing_file_names_the_nearest(file):
    with pytest.raises(ConfigError, match=r"no configuration file .*recipes.py.*did you mean .*recipe.py"):
        config.load(file.replace("recipe", "recipes"))


def test_unknown_size_is_the_files_own_message(file):
    with pytest.raises(ConfigError, match="unknown size '9b'; valid: 2b, 8b"):
        config.load(f"{file}:9b")


def test_argument_that_the_file_does_not_take(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("def get_config(): pass")
    with pytest.raises(ConfigError, match="plain.py: get_config.* takes no argument"):
        config.load(f"{path}:8b")


def test_loaded_config_is_locked(file):
    with pytest.raises((AttributeError, KeyError)):
        config.load(file).stepz = 3


@dataclasses.dataclass(frozen=True)
class Optimizer:
    rate: float
    b1: float = 0.9
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    optimizer: Optimizer
    layers: tuple[int, ...] = ()
    pair: tuple[float, str] = (0.0, "")
    remat: bool = False
    clip: float | None = None
    note: str | int = ""
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, must be positive")


def section(**values):
    return ConfigDict({"steps": 3, "optimizer": {"rate": 1e-3}} | values)


def test_build_converts_sections_lists_and_whole_numbers():
    run = config.build(Run, section(layers=[1, 2], pair=(1, "a"), clip=1, note=7, memory={"name": "pvm"}), "config")
    assert run == Run(3, Optimizer(1e-3), (1, 2), (1.0, "a"), False, 1.0, 7, {"name": "pvm"})
    assert type(run.clip) is float and type(run.pair[0]) is float and type(run.note) is int
    assert type(run.memory) is dict
    assert config.build(Optimizer, {"rate": 1}, "config.optimizer") == Optimizer(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, r"unknown key 'config.step'; did you mean 'config.steps'\?"),
        (
            {"optimizer": {"rate": 1.0, "b2": 1.0}},
            r"unknown key 'config.optimizer.b2'; valid: config.optimizer.b1, ",
        ),
        ({"optimizer": {}}, r"missing key 'config.optimizer.rate': Optimizer needs a float"),
        ({"optimizer": 3}, r"config.optimizer: 3 is not a section of keys for Optimizer"),
        ({"steps": 1.5}, r"'config.steps' is 1.5 \(float\), needs int"),
        ({"steps": True}, r"'config.steps' is True \(bool\), needs int"),
        ({"remat": 1}, r"'config.remat' is 1 \(int\), needs bool"),
        ({"clip": "1"}, r"'config.clip' is '1' \(str\), needs float"),
        ({"note": 1.5}, r"'config.note' is 1.5 \(float\), needs str | int"),
        ({"layers": 3}, r"'config.layers' is 3 \(int\), needs tuple\[int, ...\]"),
        ({"layers": (1, "b")}, r"'config.layers\[1\]' is 'b' \(str\), needs int"),
        ({"pair": (1.0,)}, r"'config.pair' has 1 elements, needs 2"),
        ({"optimizer": {"rate": 1.0, "kind": "adam"}}, r"'config.optimizer.kind' is 'adam'; valid: 'adamw', 'sgd'"),
        ({"steps": 0}, r"config: steps is 0, must be positive"),
    ],
)
def test_build_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        config.build(Run, section(**values) if "optimizer" not in values else {"steps": 3} | values, "config")


def test_missing_key_at_the_top():
    with pytest.raises(ConfigError, match="missing key 'config.steps': Run needs a int"):
        config.build(Run, {"optimizer": {"rate": 1.0}}, "config")


def test_keys_below_a_section_that_starts_with_a_digit(tmp_path):
    """Stages are named by their order."""
    file = tmp_path / "staged.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "STAGE = {'loop': {'steps': 4}, 'on': True, 'k': (1, 2)}\n"
        "def get_config(): return ConfigDict({'stages': {'1_first': STAGE}})\n"
    )
    words = ["--config.stages.1_first.loop.steps=7", "--noconfig.stages.1_first.on", "--config.stages.1_first.k=(3,)"]
    stage = config.load(str(file), words).stages["1_first"]
    assert (stage.loop.steps, stage.on, stage.k) == (7, False, (3,))
    with pytest.raises(ConfigError, match="'config.stages.1_first.loop.steps' takes int"):
        config.load(str(file), ["--config.stages.1_first.loop.steps=many"])
