"""The benches run and print what they promise. Their figures are for people: no test asserts a time."""

from __future__ import annotations

import json
import re

import pytest

from jaxmem import cli
from jaxmem.backbones import qwen3_vl
from jaxmem.bench import compiling, decoding, invocations, knowledge, loading, models, remember, rollouts, run
from jaxmem.memory.q_former import QFormerConfig
from jaxmem.sampling.invoking import InvokeConfig


@pytest.fixture(scope="module")
def config() -> object:
    return models.backbone(layers=4, width=64, mlp_width=96, heads=2, kv_heads=1, vocab=256)


def test_the_written_config_is_read_back(config: object) -> None:
    assert qwen3_vl.config_from_hf(models.hf_config(config)) == config


def test_decode_compares_the_same_tokens(config: object) -> None:
    against, price = decoding.run(config, rows=2, new=6, runs=1, peer_runs=1)
    assert "same tokens: 100.0%" in against.name
    assert against.ratio == pytest.approx(against.ours / against.peer)
    assert price.ratio == pytest.approx(price.peer / price.ours - 1)


def test_loading_measures_what_a_host_holds(config: object) -> None:
    (comparison,) = loading.run(config, hosts=2)
    assert 0.03 < comparison.ours < comparison.peer and comparison.ratio == comparison.ours / comparison.peer


@pytest.mark.slow  # compiles a state machine and the pieces of the loop over rows
def test_vismem_compares_the_same_tokens_and_memories(config: object) -> None:
    model = invocations.random_model(config, rows=2)
    forced = InvokeConfig(mode="random", anywhere=True, probability=0.2)
    rows = invocations.against_rows(model, forced, new=48, runs=1)
    least, most = map(int, re.findall(r"\d+", rows.name)[1:3])
    assert 0 < least <= most and "same tokens: 100.0%" in rows.name
    assert rows.ratio == pytest.approx(rows.ours / rows.peer)


@pytest.mark.slow  # compiles two state machines and the pieces of the loop over rows
def test_vismem_measures_all_four(
    config: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"rows": 2, "new": 48, "runs": 1, "peer_runs": 1, "probability": 0.2, "grids": ((4, 8),), "at_once": (2,)}
    measure = invocations.run
    monkeypatch.setattr(invocations, "run", lambda: measure(config, **small))
    assert cli.main(["bench", "vismem", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "ours", "peer", "ratio", "goal", "runs", "machine"} <= set(found) and found["name"] == "vismem"
    rows, idle, later, together = found["comparisons"]
    assert found["ratio"] == rows["ratio"]
    assert "same tokens: 100.0%" in rows["name"] and "same tokens: 100.0%" in idle["name"]
    assert idle["ratio"] == pytest.approx(idle["peer"] / idle["ours"] - 1)
    assert "10 visual states" in later["name"] and float(later["name"].split()[-1].rstrip(")")) < 1e-4
    assert later["ratio"] == pytest.approx(later["peer"] / later["ours"]) and "rows_at_once 2" in together["name"]


def test_comem_compares_equal_q_formers_and_the_same_questions(config: object) -> None:
    """`hoisting` itself asserts that both sides say the same."""
    hoisted = knowledge.hoisting(QFormerConfig(16, 16, heads=2, head_dim=8), runs=1, items=2, length=5)
    assert hoisted.ratio == hoisted.ours / hoisted.peer > 0
    few, more = knowledge.questions(config, (1, 3), new=2, runs=1)
    # the question has 4 + 2 + 64 + 44 tokens; an item 194 of them in the prompt (the first 4 of the question), or 8
    assert few.name == "1 items, 122 against 308 tokens" and more.name == "3 items, 138 against 696 tokens"
    assert {len(rates) for rates in few.runs.values()} == {1}


@pytest.mark.slow  # compiles four gradient steps
def test_compile_measures_both_depths_from_an_empty_cache() -> None:
    (comparison,) = compiling.run(deep=5, width=64, runs=1)
    assert len(comparison.runs["ours"]) == len(comparison.runs["peer"]) == 1
    assert min(comparison.runs["ours"] + comparison.runs["peer"]) > 0.05  # seconds: really compiled, every time


@pytest.mark.slow  # compiles four steps and starts TRL
def test_grpo_measures_both_sides_and_their_phases() -> None:
    config = models.backbone(layers=4, width=64, mlp_width=96, heads=2, kv_heads=1, vocab=600)  # 557 tokens and room
    found = rollouts.run(config, prompts=1, new=3, runs=1, peer_runs=1, pixels=(64, 64), shared_pixels=(64, 64))
    parts = [(found[at], found[at + 1 : at + 4]) for at in range(0, len(found), 4)]
    assert len(parts) == 3
    for whole, phases in parts:
        assert [phase.name.strip() for phase in phases] == ["rollout", "rewards", "update"]
        assert whole.ratio == pytest.approx(whole.ours / whole.peer)
        spent = sum(phase.runs["peer"][0] for phase in phases)
        assert whole.runs["peer"] == [pytest.approx(rollouts.GROUP / spent)]
    assert all("4 visual tokens" in whole.name for whole, _ in parts[1:])


def test_json_holds_what_tools_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = run.Comparison("n", "s", 2.0, 1.0, 2.0, "ratio <= 3", {"ours": [2.0], "peer": [1.0]})
    monkeypatch.setattr(compiling, "run", lambda: [fake])
    assert cli.main(["bench", "compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "ours", "peer", "ratio", "goal", "runs", "machine"} <= set(found)
    assert found["name"] == "compile"
    assert cli.main(["bench", "decoed"]) == 2
    assert "decode" in capsys.readouterr().err


def test_check_29_operations_of_vision_remember_stay_within_their_shares() -> None:
    direct, absorbed, both = remember.operations()
    assert direct.peer == pytest.approx(2.11, abs=0.01)  # the decoder: five tiles of 144 tokens and 64 words, in TFLOP
    assert direct.ours == pytest.approx(0.122, abs=0.001) and direct.ratio <= 0.06
    assert absorbed.ours == pytest.approx(0.042, abs=0.001) and absorbed.ratio <= 0.021
    assert both.ours == pytest.approx(0.034, abs=0.001) and both.ratio <= 0.02


def test_vr_measures_reading_and_writing() -> None:
    small = remember.small(layers=2, width=96, mlp=192, heads=6, vocab=256)
    found = remember.seconds(small, rows=1, new=4, runs=1)
    assert [one.unit for one in found] == ["prompts/s"] * 4 + ["tokens/s"]
    assert all(one.ours > 0 and one.peer > 0 for one in found)
    assert found[0].ratio == pytest.approx(found[0].peer / found[0].ours - 1)
