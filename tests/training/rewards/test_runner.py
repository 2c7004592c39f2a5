"""The runner: everything a function can do wrong is counted, and the next completion is judged."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmem import cli
from jaxmem import config as configs
from jaxmem.errors import ConfigError, DataError
from jaxmem.training.rewards import functions, mathematics
from jaxmem.training.rewards.answers import Exact
from jaxmem.training.rewards.functions import Case, RewardError
from jaxmem.training.rewards.runner import RewardRunner
from jaxmem.training.rewards.settings import FUNCTIONS, RewardConfig

HERE = "tests.training.rewards.users"
COLUMNS = {"answer": "4", "cells": [2], "digits": [7], "sums": [7], "solution": "4"}


def config(*sections, **limits):
    sections = [
        f"{HERE}{section}" if isinstance(section, str) and section[0] == ":" else section for section in sections
    ]
    return configs.build(RewardConfig, {"functions": sections, "workers": 1} | limits, "rewards")


def score(runner, completions, **changes):
    count = len(completions)
    columns = {name: [value] * count for name, value in COLUMNS.items()}
    arguments = {"prompts": [[]] * count, "completion_ids": [[1]] * count, "columns": columns}
    return runner(completions=completions, **(arguments | changes))


def test_every_builtin_passes_its_self_test_and_scores():
    sections = [{"name": name, "ask": f"{HERE}:judge"} if name == "llm_judge" else name for name in FUNCTIONS]
    with RewardRunner(config(*sections), COLUMNS) as runner:
        scored = score(runner, ["<think>2+2</think><answer>4</answer>", "C7=7 #7"])
    values = dict(zip(scored.labels, scored.values.T, strict=True))
    assert {label: tuple(v) for label, v in values.items() if label not in ("choice", "yesno")} == {
        "anls": (1.0, 0.0),
        "board": (0.0, 1.0),
        "exact": (1.0, 0.0),
        "exact_text": (0.0, 0.0),
        "llm_judge": (1.0, 0.0),
        "math": (1.0, 0.0),
        "numeric": (1.0, 0.0),
        "pvm": (1.0, 0.0),
        "substr": (1.0, 0.0),
        "think_format": (1.0, 0.0),
    }
    assert np.isnan(values["choice"]).all()  # the reference "4" is no letter
    assert np.isnan(values["yesno"]).all()  # nor a yes or no
    assert scored.values.dtype == np.float64 and scored.messages == ()


def test_everything_that_goes_wrong_is_counted_and_work_goes_on():
    todo = ["0.5", "hang", "raise", "sleep", "nan", "none", "die", "inf", "exit", "word", "true", "1"]
    with RewardRunner(config(":obey", "exact", workers=2, timeout_s=0.6), COLUMNS) as runner:
        scored = score(runner, todo)
        again = score(runner, ["0.25", "0.75"])
    expected = [0.5, *[math.nan] * 9, 1.0, 1.0]
    np.testing.assert_array_equal(scored.values[:, 0], expected)
    np.testing.assert_array_equal(scored.values[:, 1], 0.0)
    np.testing.assert_array_equal(again.values[:, 0], [0.25, 0.75])
    assert scored.timeouts == {"obey": 2, "exact": 0} and scored.errors == {"obey": 6, "exact": 0}
    metrics = scored.metrics()
    assert metrics["rewards/obey/error_rate"] == 6 / 12 and metrics["rewards/obey/timeout_rate"] == 2 / 12
    assert metrics["rewards/obey/none_rate"] == pytest.approx(1 / 12)
    assert metrics["rewards/obey/mean"] == pytest.approx(2.5 / 3)
    assert metrics["rewards/obey/std"] == pytest.approx(np.std([0.5, 1, 1], ddof=1))
    assert len(scored.messages) == 5
    assert scored.messages[0] == "obey, row 1: no answer within 0.6 seconds; its process was killed"
    assert scored.messages[1] == "obey, row 2: ZeroDivisionError: no\nreason"
    assert again.metrics()["rewards/obey/error_rate"] == 0 and again.messages == ()


def test_a_process_that_dies_is_named_and_replaced():
    with RewardRunner(config(":obey"), COLUMNS) as runner:
        scored = score(runner, ["die", "1"])
        assert scored.messages == ("obey, row 0: the process ended with exit code 7",)
        runner._pool._workers[0].process.kill()  # while idle
        runner._pool._workers[0].process.wait()
        assert score(runner, ["0.5"]).values.tolist() == [[0.5]]


def test_a_hanging_function_takes_its_children_with_it(tmp_path):
    with RewardRunner(config(":children", timeout_s=1.0), COLUMNS) as runner:
        scored = score(runner, [str(tmp_path / "pid")])
    child = int((tmp_path / "pid").read_text())
    assert scored.timeouts == {"children": 1}
    for _ in range(50):
        if not _alive(child):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} still runs")


def _alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, ProcessLookupError):
        return False


def test_arguments_reach_a_users_function():
    section = {"name": f"{HERE}:arguments", "bonus": 0.5}
    with RewardRunner(config(section, ":keywords", ":later", ":loaded"), {"answer": 4}) as runner:
        scored = runner(
            [[1], [1, 2]], ["ab", ""], [[3], [4]], {"answer": [1, 2]}, images=[0.25, None], diagnostics=[None, 0.125]
        )
    assert scored.values[:, 0].tolist() == [1 + 20 + 300 + 1000 + 0.25 + 0.5, 2 + 400 + 2000 + 0.125 + 0.5]
    assert scored.values[0, 1] == 7  # prompts, completion_ids and answer; images and diagnostics on request only
    assert scored.values[:, 2].tolist() == [0.25, 0.25]
    assert scored.values[:, 3].tolist() == [1.0, 1.0]  # neither jax nor numpy nor pytest in the process


def test_chunks():
    whole = {"name": f"{HERE}:batch", "chunk": 0, "label": "whole"}
    with RewardRunner(config(whole, ":batch", {"name": f"{HERE}:obey", "chunk": 2}), COLUMNS) as runner:
        scored = score(runner, ["1", "2", "raise", "1"])
    assert scored.values[:, 0].tolist() == [0.5, 0.75, 0.75, 0.5] and scored.values[:, 1].tolist() == [0.0] * 4
    np.testing.assert_array_equal(scored.values[:, 2], [1, 2, math.nan, math.nan])
    assert scored.errors["obey"] == 2


def test_an_empty_batch_and_empty_completions():
    with RewardRunner(config(":obey", "exact"), COLUMNS) as runner:
        assert score(runner, []).values.shape == (0, 2)
        assert score(runner, ["", ""]).values.tolist() == [[0.0, 0.0]] * 2


def test_all_rows_failing_stops_the_run_after_some_steps():
    with RewardRunner(config(":obey", max_failed_steps=2), COLUMNS) as runner:
        score(runner, ["raise", "raise"])
        score(runner, ["raise", "1"])  # one success starts the count again
        score(runner, ["raise"])
        with pytest.raises(RewardError, match="'obey' failed on every completion of 2 steps in a row.*returned nan"):
            score(runner, ["nan"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (":needy_", "users has no function 'needy_'"),
        (":not_callable", "no function 'not_callable'"),
        ("no.such.module:f", "ModuleNotFoundError: No module named 'no'"),
        (":scalar", "'scalar' fails its self-test.*returned 1.0 .float., not a list of 1 numbers"),
        (":two", "returned 2 values for 1 completions"),
        (":text", "returned '1' .str."),
        (":words", "returned 'good' .str., not a finite number"),
        (":raises", "KeyError: 'answer'"),
    ],
)
def test_a_users_function_is_tried_before_the_first_step(section, message):
    with pytest.raises(ConfigError, match=message):
        RewardRunner(config(section), COLUMNS)


def test_missing_columns_are_named_before_the_first_step():
    given = {"answer": 1, "solutoin": 2}
    message = r"'needy' needs the column 'solution'.*\(it has 'answer', 'solutoin'\); did you mean 'solutoin'\?"
    with pytest.raises(ConfigError, match=message):
        RewardRunner(config(":needy"), given)
    with pytest.raises(ConfigError, match="'math' needs the column 'gold'.*it has 'answer', 'solutoin'"):
        RewardRunner(config({"name": "math", "column": "gold"}), given)
    with pytest.raises(ConfigError, match="'board' needs the column 'cells'.*no columns"):
        RewardRunner(config("board"), {})


def test_a_call_with_wrong_columns():
    with RewardRunner(config("exact"), COLUMNS) as runner:
        with pytest.raises(ConfigError, match="needs the column 'answer'"):
            score(runner, ["a"], columns={})
        with pytest.raises(DataError, match="'answer' has 1 entries for 2 completions"):
            score(runner, ["a", "b"], columns={"answer": ["a"]})
        with pytest.raises(DataError, match="'prompts' has 1 entries"):
            score(runner, ["a", "b"], prompts=[[]])


def test_a_builtin_that_judges_wrongly_does_not_start(monkeypatch):
    monkeypatch.setattr(Exact, "cases", lambda self: (Case("a", {self.column: "a"}, 0.5),))
    with pytest.raises(ConfigError, match="'exact' fails its self-test on 'a' .*gives 1.0, expected 0.5"):
        RewardRunner(config("exact"), COLUMNS)


def test_math_verify_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    mathematics._package.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'jaxmem\[math\]'"):
        mathematics.Math().prepare()
    mathematics._package.cache_clear()


def test_a_hard_formula_is_cut_off():
    with RewardRunner(config("math", timeout_s=1.5), COLUMNS) as runner:
        scored = score(runner, ["$10000000!$", r"\boxed{4}"])
    assert scored.timeouts == {"math": 1} and scored.values[1, 0] == 1.0


def test_a_slow_start_is_an_error():
    with pytest.raises(ConfigError, match="startup_s = 0.001"):
        RewardRunner(config(":obey", startup_s=0.001), COLUMNS)


def test_a_closed_runner_says_so():
    runner = RewardRunner(config(":obey"), COLUMNS)
    runner.close()
    runner.close()
    with pytest.raises(RewardError, match="closed"):
        score(runner, ["1"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (["exakt"], "unknown reward function 'exakt'; did you mean 'exact'?"),
        ([{"name": "exact", "colunm": "a"}], r"unknown key 'functions\[0\].colunm'; did you mean"),
        ([{"name": "numeric", "relative": "big"}], r"'functions\[0\].relative' is 'big' \(str\), needs float"),
        ([{"name": "numeric", "relative": 2.0}], r"functions\[0\]: relative is 2.0"),
        ([{"name": "pvm", "grader": "sympy"}], "valid: 'math', 'text'"),
        ([{"name": "exact", "weight": "1"}], r"'functions\[0\].weight' is '1'"),
        ([{"weight": 1.0}], r"missing key 'functions\[0\].name'"),
        (["exact", "exact"], "'exact' occurs twice"),
        (["__main__:f"], "move it to a module"),
        ([], "at least one reward function"),
    ],
)
def test_wrong_configurations(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(*sections)


def test_configuration():
    made = config({"name": "exact", "weight": 2, "label": "mine"}, "pvm")
    assert made.labels == ("mine", "pvm") and made.weights == (2.0, 1.0)
    with pytest.raises(ConfigError, match="timeout_s is -1"):
        config("exact", timeout_s=-1.0)
    with pytest.raises(ConfigError, match="rewards.timout_s'; did you mean 'rewards.timeout_s'"):
        config("exact", timout_s=1.0)


def test_importing_the_package_stays_light():
    code = "import sys, jaxmem.training.rewards.worker as w, jaxmem.training.rewards.tags; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("'jax'", "'numpy'", "'ml_collections'", "'sympy'") if name in out]


def test_the_verb(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "2+2?", "completion": c, "answer": "4"} for c in ("<answer>4</answer>", "5")]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    words = ["reward", str(file), "--function=exact", '--function={"name": "pvm", "grader": "text"}']
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["exact", "pvm", "completion"],
        ["1.000", "0.900", "<answer>4</answer>"],
        ["0.000", "0.000", "5"],
        ["0.500", "0.450", "mean"],
    ]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"exact": 1.0, "pvm": 0.9}, {"exact": 0.0, "pvm": 0.0}]
    file.write_text(file.read_text() + '\n{"completion": "4"}')
    assert cli.main(words) == 2
    assert f"{file}:3: lacks answer, prompt, which the first line has" in capsys.readouterr().err
    assert cli.main(["reward", str(file)]) == 2 and "--function=NAME" in capsys.readouterr().err


def test_functions_may_be_handed_to_trl():
    """TRL calls functions by keyword with prompts, completions, completion_ids, columns and its own state."""
    given = {"prompts": [[]], "completions": ["4"], "completion_ids": [[1]], "answer": ["4"], "trainer_state": None}
    assert Exact()(**given) == [1.0]
    assert functions.Imported(f"{HERE}:obey")(**given) == [4.0]
