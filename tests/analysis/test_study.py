"""A study: how arms follow from each other, what is kept and chosen, and sentences that can come out either way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmem import cli
from jaxmem import config as configs
from jaxmem.analysis import study, study_report, study_runs, study_store
from jaxmem.analysis.study_claims import claims, compare
from jaxmem.analysis.study_runs import Tools, Unit
from jaxmem.analysis.study_settings import open_study, resolve
from jaxmem.analysis.study_tables import html, markdown
from jaxmem.errors import ConfigError
from jaxmem.evaluation.pooling import Pooled
from jaxmem.evaluation.reading import Reading

CONFIG = Path(__file__).parents[2] / "configs" / "digits_benchmark.py"
ARMS = {
    "off": {"title": "memory off", "trains": False, "attention": True},
    "pvm": {"title": "PVM", "train": {"loop": {"p_block": 0.5}}},
    "mlp": {"title": "MLP", "train": {"memory": {"name": "mlp", "layers": (1,)}}},
    "lora": {
        "title": "LoRA",
        "train": {"memory": None, "trainable": ("base/**/lora_a",)},
        "variants": {"a": {"lora": {"rank": 4}}, "b": {"lora": {"rank": 8}}},
    },
    "lora_long": {"title": "LoRA, long", "like": "lora", "train": {"loop": {"steps": 7}}, "seeds": (0,)},
    "grpo_all": {"title": "PVM and GRPO", "start_from": "pvm", "train": {"memory": None}},
}


def section(output, **changes):
    base = {
        "memory": {"name": "pvm", "layers": (0, 2), "latent": 32},
        "data": {"source": "boards", "boards": {"split": "train", "seed": 5, "k": (0,), "n": (4,)}},
        "loop": {"steps": 20, "batch_size": 4},
    }
    tests = {
        "near": {"test": {"k": (0, 128), "boards": 10, "batch_size": 4}},
        "far": {"test": {"k": (512,), "boards": 10}, "arms": ("off", "pvm", "mlp", "grpo_all"), "seeds": 1},
        "controls": {"test": {"k": (), "stretched": (512,), "packed": ((512, 64),)}, "arms": ("off",)},
        "long": {"test": {"k": (0,), "cells": 12, "boards": 10}, "arms": ("off", "pvm"), "seeds": 1},
    }
    found = {"output": str(output), "base": base, "order": tuple(ARMS), "arms": ARMS, "tests": tests, "seeds": (0, 1)}
    return {**found, **changes}


def reading(condition, test, read, exact=None, mass=()):
    exact = read if exact is None else exact
    places = (read,) * test.cells
    return Reading(
        condition.k, condition.blind, test.boards, read, 0.01, exact, 0.01, mass, ("A1=1 #1",) * test.boards, 1.0,
        span=condition.span, read_by_place=places, named_read=read, named_read_by_place=places,
    )  # fmt: skip


class Stub:
    """Trains nothing, but leaves what a run leaves; measures `skill(kind, k)` and counts its work."""

    def __init__(self, skill=None):
        self.trained, self.measured, self.said = [], [], []
        self.skill = skill or (lambda kind, k: {"off": 0.9 - k / 600, "mlp": 0.9 - k / 600}.get(kind, 0.95))
        self.tools = Tools(self.train, lambda config: "off", self.measure, self.said.append)

    def train(self, config):
        self.trained.append(config)
        folder = Path(config.output)
        (folder / "memory").mkdir(parents=True, exist_ok=True)
        if config.memory_folder:
            assert Path(config.memory_folder).is_dir()
            return "grpo", 9
        return (f"lora{config.lora['rank']}" if config.lora else config.memory["name"]), 5

    def measure(self, model, test, attention):
        self.measured.append((model, test))
        mass = lambda c: (1 / (1 + c.k), 0.5 / (1 + c.k)) if attention else ()  # noqa: E731
        return tuple(reading(c, test, self.skill(model, c.k + (c.span or 0)), mass=mass(c)) for c in test.conditions)


def done(tmp_path, skill=None, **changes):
    built, stub = open_study(section(tmp_path, **changes)), Stub(skill)
    return built, stub, study.run_study(built, stub.tools)


def test_arms_follow_from_the_base_and_from_each_other(tmp_path):
    built = open_study(section(tmp_path, steps=15))
    mlp = resolve(built, "mlp", 1, "out", {})
    assert mlp.memory == {"name": "mlp", "layers": (1,)} and mlp.loop.batch_size == 4 and mlp.loop.steps == 15
    assert mlp.seed == 1 and mlp.data.boards.seed == 6 and mlp.output == "out" and not mlp.loop.progress
    long = resolve(built, "lora_long", 0, "out", {"lora": "b"})
    assert long.lora == {"rank": 8} and long.memory is None and long.loop.steps == 7
    assert built.seeds("lora_long") == (0,) and built.seeds("pvm") == (0, 1)
    assert {key: test.seed for key, test in built.exams("pvm", 1).items()} == {"near": 1}
    limited = open_study(section(tmp_path, boards=3)).exams("pvm", 0)["near"]
    assert (limited.boards, limited.batch_size) == (3, 3)


def test_seeds_have_boards_of_their_own_and_validation_has_others(tmp_path):
    _, stub, _ = done(tmp_path)
    assert {test.seed for model, test in stub.measured if model == "pvm"} == {0, 1}
    validation = [test for _, test in stub.measured if test.split == "train"]
    assert len(validation) == 2 and all(test.seed == 1000 and test.k == (128,) for test in validation)
    assert all(config.data.boards.seed in (5, 6) for config in stub.trained)


def test_the_better_variant_is_chosen_and_its_trial_is_its_first_seed(tmp_path):
    skill = lambda kind, k: {"lora4": 0.5, "lora8": 0.7}.get(kind, 0.9)  # noqa: E731
    _, stub, results = done(tmp_path, skill)
    assert results.choices["lora"].variant == "b" and results.choices["lora"].scores == {"a": 0.5, "b": 0.7}
    ranks = [(c.lora["rank"], c.seed, c.loop.steps) for c in stub.trained if c.lora]
    assert sorted(set(ranks)) == [(4, 0, 20), (8, 0, 7), (8, 0, 20), (8, 1, 20)]
    assert len({c.output for c in stub.trained if c.lora}) == 4
    assert results.arms["lora"].readings(reading_condition(128), 4)[0].read == 0.7


def test_short_trials_are_runs_of_their_own(tmp_path):
    _, stub, _ = done(tmp_path, selection={"steps": 3})
    assert sorted(c.loop.steps for c in stub.trained if c.lora) == [3, 3, 7, 20, 20]


def test_the_second_stage_starts_from_the_memory_of_its_seed(tmp_path):
    _, stub, _ = done(tmp_path)
    starts = {c.seed: c.memory_folder for c in stub.trained if c.memory_folder}
    assert starts == {seed: str(tmp_path / "arms" / "pvm" / f"seed_{seed}" / "memory") for seed in (0, 1)}


def test_the_same_command_does_nothing_twice(tmp_path):
    built, _, first = done(tmp_path)
    stub = Stub()
    again = study.run_study(built, stub.tools)
    assert not stub.trained and not stub.measured and not stub.said
    assert again == first and len(study._gather(built, {}, {})) == len(study_runs.units(built))


def test_a_killed_study_goes_on(tmp_path):
    class Killed(Exception):
        pass

    built, stub = open_study(section(tmp_path)), Stub()

    def measure(model, test, attention):
        if len(stub.measured) == 7:
            raise Killed
        return stub.measure(model, test, attention)

    with pytest.raises(Killed):
        study.run_study(built, dataclasses.replace(stub.tools, measure=measure))
    rest = Stub()
    results = study.run_study(built, rest.tools)
    whole = Stub()
    other = open_study(section(tmp_path / "other"))
    assert len(stub.measured) + len(rest.measured) == len(study_whole(other, whole).measured)
    assert [(r.title, r.tests) for r in results.arms.values()] == [
        (r.title, r.tests) for r in study.run_study(other, Stub().tools).arms.values()
    ]


def test_other_settings_are_measured_again(tmp_path):
    done(tmp_path)
    before = {path: path.read_text() for path in tmp_path.rglob(study_store.TRAINED)}
    _, stub, _ = done(tmp_path, boards=5)  # the runs are restored, not made again
    assert stub.measured and before == {path: path.read_text() for path in tmp_path.rglob(study_store.TRAINED)}
    mark = study_store.fingerprint(resolve(open_study(section(tmp_path)), "pvm", 0, "x", {}))
    assert mark == study_store.fingerprint(resolve(open_study(section(tmp_path)), "pvm", 0, "y", {}))
    assert mark != study_store.fingerprint(resolve(open_study(section(tmp_path, steps=9)), "pvm", 0, "x", {}))
    assert mark != study_store.fingerprint(resolve(open_study(section(tmp_path)), "pvm", 0, "x", {}), "parent")


def test_a_unit_belongs_to_one_process(tmp_path):
    built, unit = open_study(section(tmp_path)), Unit("pvm", 0)
    with study_runs.claimed(built, unit) as mine, study_runs.claimed(built, unit) as also:
        assert mine and not also
    with study_runs.claimed(built, unit) as mine:
        assert mine


def test_a_line_per_run_tells_the_time(tmp_path):
    built, stub, _ = done(tmp_path)
    assert len(stub.said) == len(study_runs.units(built)) == 13
    assert stub.said[0].startswith("[1/13] off, seed 0; read 0.90@0") and "left" in stub.said[0]
    assert "trial of a" in " ".join(stub.said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": ("off", "pmv")}, "unknown arm in config.order 'pmv'; did you mean 'pvm'"),
        ({"order": ("grpo_all", "pvm")}, "config.arms.grpo_all.start_from: 'pvm' is no arm before it"),
        ({"selection": {"test": {"k": (128,), "split": "train", "seed": 6}}}, "arm pvm trains on these very boards"),
        ({"selection": {"test": {"k": (128,), "split": "test"}}}, "split='train'"),
        ({"tests": {"far": {"test": {}, "arms": ("of",)}}}, "off"),
        ({"arms": {**ARMS, "off": {"titel": "x"}}}, "config.arms.off.titel"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        open_study(section(tmp_path, **change))


def said(tmp_path, skill):
    built, _, results = done(tmp_path, skill)
    found = claims(results, built.config)
    return {one.claim.partition(" (")[0].partition(":")[0]: one for one in found}


def test_sentences_when_pvm_wins(tmp_path):
    found = said(tmp_path, lambda kind, k: {"off": max(0.1, 0.9 - k / 500), "pvm": 0.95, "mlp": 0.3}.get(kind, 0.99))
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts["Attention to the image dilutes as text grows"] == "yes"
    assert verdicts["PVM resists the decline with length"] == "yes"
    assert verdicts["The gain comes from looking again, not from parameters"] == "yes"
    assert verdicts["PVM does no harm at short range"] == "yes"
    assert verdicts["Visual-key blocking in training is needed here"] == "untested"
    sentence = str(found["PVM resists the decline with length"])
    assert "k=512 (trained to 128): yes, 0.950 (one seed) against 0.100 (one seed) (memory off)." in sentence
    assert found["The second stage (GRPO on PVM and language model) adds exact answers at k=128".partition(" (")[0]]


def test_sentences_when_pvm_loses(tmp_path):
    found = said(tmp_path, lambda kind, k: {"off": 0.9, "pvm": 0.5, "mlp": 0.5, "grpo": 0.4}.get(kind, 0.9))
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts["PVM resists the decline with length"] == "no"
    assert verdicts["The gain comes from looking again, not from parameters"] == "no"
    assert verdicts["PVM does no harm at short range"] == "no"
    assert verdicts["The second stage"] == "no" and verdicts["What the second stage repairs is reading"] == "no"
    assert verdicts["What costs the backbone its sight is many keys"] == "no"


def test_a_difference_must_exceed_the_seeds():
    one, other = Pooled(3, 30, 0.6, 0.1, 0.5, 0.7), Pooled(3, 30, 0.5, 0.1, 0.4, 0.6)
    assert compare(one, other, 0.02) == "unclear"
    assert compare(one, dataclasses.replace(other, high=0.45), 0.02) == "yes"
    assert compare(one, dataclasses.replace(other, mean=0.59), 0.02) == compare(other, one, 0.02) == "no"


def test_what_readers_get(tmp_path, capsys):
    built, _, results = done(tmp_path)
    study_report.publish(built, results, tmp_path, 120.0, 60.0)
    printed = capsys.readouterr().out
    assert "Digits read" in printed and "PVM resists" in printed and "2.0 minutes (in several starts" in printed
    text = (tmp_path / "study.md").read_text()
    assert "| arm | seeds | n | k=0 | k=128 | k=512 |" in text and "| memory off | 2 | 10–20 | 0.900 ± 0.000 |" in text
    assert "| PVM | 10 |" in text and "named read, places 10–12" in text and "512 words over 64 positions" in text
    assert "workers" in text and "cores" in text and "- Attention to the image dilutes" in text
    page = (tmp_path / "report.html").read_text()
    for title in ("Digits read", "Final answers exact", "digit board", "memory off"):
        assert f'aria-label="{title}"' in page
    assert "Long text of one&#39;s own" in page or "Long text of one's own" in page
    numbers = json.loads((tmp_path / "study.json").read_text())
    first = numbers["arms"]["pvm"]["results"][0]
    assert first["k"] == 0 and first["read"]["boards"] == 20 and first["by_seed"]["read"] == [0.95, 0.95]
    assert len(numbers["claims"]) == len(claims(results, built.config)) and numbers["choices"]["lora"]["variant"] == "a"


def test_tables_escape():
    table = study_report.Table(("a", "b|c"), (("<x>", "1|2"),), notes=("n & m",))
    assert markdown(table) == "| a | b/c |\n|---|---|\n| <x> | 1/2 |\n\nn & m"
    assert "&lt;x&gt;" in html(table) and "n &amp; m" in html(table)


@pytest.mark.parametrize("size", ["", ":long"])
def test_the_benchmark_is_a_valid_study(size):
    built = open_study(configs.load(f"{CONFIG}{size}"))
    variants = {"lora": "rank8_rate0_001"}
    for name in built.arms:
        for seed in built.seeds(name):
            assert resolve(built, name, seed, "out", variants).loop.steps <= built.config.steps
    main = {name for name, exam in built.tests.items() if "pvm" in exam.arms and not exam.seeds and exam.test.k}
    assert all(3 * built.tests[name].test.boards >= 1000 for name in ("near", "far")) and {"near", "far"} <= main
    assert len(built.arms["lora"].variants) == 6 and built.seeds("lora_long") == (0,)
    assert {c.k for name in main for c in built.tests[name].test.conditions} == {0, 128, 256, 512} | (
        set() if size else {1024}
    )


@pytest.mark.slow
def test_a_tiny_study_from_begin_to_end(tmp_path, capfd):
    words = {
        "output": tmp_path / "study",
        "order": "('off','pvm','grpo_memory')",
        "seeds": "(0,)",
        "boards": 4,
        "steps": 2,
        "tests.far_others.test.k": "(3,)",
        "tests.far.test.k": "(3,)",
        "tests.farthest.test.k": "(2,)",
    }
    overrides = [f"--config.{key}={value}" for key, value in words.items()]
    assert cli.main(["study", f"--config={CONFIG}", *overrides]) == 0
    assert cli.main(["study", f"--config={CONFIG}", *overrides]) == 0
    printed = capfd.readouterr().out
    assert "3 runs, 0 of them done already" in printed and "3 runs, 3 of them done already" in printed
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert found["arms"]["grpo_memory"]["trained"]["0"]["parameters"] > 0
    masses = [row["mass"] for row in found["arms"]["off"]["results"]]
    assert all(len(mass) == 3 and np.all(np.isfinite(mass)) for mass in masses)


def reading_condition(k):
    from jaxmem.evaluation.conditions import Condition

    return Condition(k)


def study_whole(built, stub):
    study.run_study(built, stub.tools)
    return stub
