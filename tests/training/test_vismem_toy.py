"""VisMem on the digit boards, as shipped: what its stages teach where the image is hidden from the backbone's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmem import cli
from jaxmem.analysis import digit_vismem
from jaxmem.analysis.digit_vismem import CALLED, HIDDEN, SEEN
from jaxmem.training import metrics

CONFIG = Path(__file__).parents[2] / "configs" / "digits_vismem.py"


def reads_and_calls(folder):
    """Check 43 on a finished run: a memory reads what is hidden, and is called for there, with the type that is of
    use."""
    (last,) = [line for line in metrics.read(folder / "2_memory") if "eval/reward" in line][-1:]
    assert last["eval/reward"] > max(last["eval/off/reward"], last["eval/shuffle/reward"]) + 0.1
    found = digit_vismem.read(folder / "3_invocation")
    before, after = found["before"], found["after"]
    hidden = {name.partition("/")[2]: one["read"] for name, one in after.items() if name.startswith(HIDDEN)}
    assert hidden["memory"] > max(hidden[name] for name in ("off", "zero", "noise", "shuffle")) + 0.2
    assert hidden[CALLED] > before[f"{HIDDEN}/{CALLED}"]["read"] + 0.2
    calls = {name: one["short"] + one["long"] for name, one in after.items()}
    assert calls[f"{HIDDEN}/{CALLED}"] > calls[f"{SEEN}/{CALLED}"] + 0.3
    assert after[f"{SEEN}/{CALLED}"]["read"] > 0.9


@pytest.mark.slow  # a quarter of an hour
def test_check_43_stage_one_reads_and_stage_two_calls(tmp_path):
    overrides = [f"--config.output={tmp_path}", "--config.seeds=()", "--config.loop.tensorboard=False"]
    assert cli.main(["train", f"--config={CONFIG}", *overrides]) == 0
    reads_and_calls(tmp_path)
