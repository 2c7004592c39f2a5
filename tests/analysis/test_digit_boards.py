"""The experiment around a run: its proof, its memory of what it measured, its table and its report."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest

import jaxmem
from jaxmem.analysis import digit_boards
from jaxmem.analysis.board_report import results_table, training_charts
from jaxmem.analysis.digit_boards import gate_zero, open_experiment
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.evaluation.boards import Reading

SECTION = {
    "name": "digit_boards",
    "test": {"k": (0, 10), "blind_k": (0,), "boards": 3, "batch_size": 3},
    "shown": 3,
    "proof": 2,
}


@pytest.fixture(scope="module")
def fresh():
    return jaxmem.load(dtype="float32").attach("pvm", layers=(1, 2), latent=32, initialiser="fan_in")


@pytest.fixture(scope="module")
def trained(fresh):
    return dataclasses.replace(fresh, memory={"pvm": {**fresh.memory["pvm"], "gate_alpha": jnp.array([0.5, 0.5])}})


def history(steps):
    return [
        {"step": s, "loss": 1.0 / s, "seconds": 0.1, "gate/pvm/layer_1": 0.01 * s, "gate/pvm/layer_2": -0.01 * s}
        for s in range(1, steps + 1)
    ]


def test_gates_at_zero_are_the_backbone_bit_for_bit(fresh, trained):
    boards = open_experiment(SECTION).test.dataset(10)
    found = gate_zero(fresh, boards)
    assert found["equal"] and found["largest"] == 0 and found["boards"] == 3
    other = gate_zero(trained, boards)
    assert not other["equal"] and other["largest"] > 0


def test_an_open_gate_stops_the_run_before_it_trains(trained, tmp_path):
    with pytest.raises(ConfigError, match="gates are zero"):
        open_experiment(SECTION).before(trained, tmp_path)


def test_whole_experiment(fresh, trained, tmp_path, monkeypatch, capsys):
    experiment = open_experiment(SECTION)
    experiment.before(fresh, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history(30)))
    experiment.after(trained, tmp_path, {"seed": 5, "loop": {"steps": 30}})
    printed = capsys.readouterr().out
    assert "image hidden*" in printed and "bit for bit" in printed and "NOT" not in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("Digits read", "Final answers exact", "Memory off", "Memory on", "Gates", "Loss"):
        assert f'aria-label="{title}"' in page
    assert page.count('aria-label="digit board"') == 3 and "loop.steps" in page
    first = json.loads((tmp_path / "experiment" / "off.json").read_text())

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(digit_boards, "evaluate", refuse)
    experiment.before(fresh, tmp_path)
    experiment.after(trained, tmp_path, {})
    assert json.loads((tmp_path / "experiment" / "off.json").read_text()) == first
    with pytest.raises(AssertionError, match="measured again"):  # other weights are another measurement
        experiment.after(fresh, tmp_path, {})


def test_after_without_before_says_what_is_missing(trained, tmp_path):
    with pytest.raises(CheckpointError, match="before training is missing"):
        open_experiment(SECTION).after(trained, tmp_path, {})


def test_table_has_a_row_per_condition():
    row = Reading(0, False, 4, 0.5, 0.01, 0.25, 0.02, (0.5, 0.125), ("",) * 4, 1.0)
    rows = [row, dataclasses.replace(row, k=128), dataclasses.replace(row, blind=True)]
    better = [dataclasses.replace(r, read=1.0, exact=0.75) for r in rows]
    table = results_table(rows, better, ("note",))
    assert table.rows[1] == ("128", "0.500 ± 0.010", "1.000 ± 0.010", "0.250 ± 0.020", "0.750 ± 0.020", "0.500 / 0.125")
    assert table.rows[2][0] == "0, image hidden*" and table.rules == (2,)
    assert "note" in table.notes


def test_training_charts_show_every_gate_and_bear_a_skipped_step():
    lines = history(20)
    lines[3]["loss"] = None
    gates, loss = training_charts(lines).charts
    assert "pvm/layer 1" in gates and "pvm/layer 2" in gates
    assert loss.count("<polyline") == 2
    assert training_charts([]).charts


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="config.experiment.test.boads.*boards"):
        open_experiment({"name": "digit_boards", "test": {"boads": 3}})
