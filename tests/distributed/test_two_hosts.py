"""Two processes run the digit recipes through launch/local_hosts.sh, are killed, and end where one process ends."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem import config as configs
from jaxmem.training import metrics, record, run

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).with_name("recipes.py")
JUDGED = {"supervised": "eval/accuracy", "reinforced": "eval/reward"}


def start(config: str, output: Path) -> subprocess.Popen:
    """The recipe on two hosts with one device each."""
    command = ["bash", str(ROOT / "launch" / "local_hosts.sh"), "2", "--"]
    command += ["python", "-m", "jaxmem.cli", "train", f"--config={config}", f"--config.output={output}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command.append("--config.mesh.data=2")
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True, cwd=ROOT)


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def lines_of(output: Path) -> list[dict]:
    return [line for line in metrics.read(output) if "loss" in line]


def kill_after(process: subprocess.Popen, output: Path, lines: int) -> None:
    """SIGKILL to both hosts once so many steps have been written."""
    while process.poll() is None and len(lines_of(output)) < lines:
        time.sleep(0.02)
    assert process.poll() is None, log_of(output)[-3000:]
    subprocess.run(["pkill", "-KILL", "-f", f"config.output={output}"], check=True)
    process.wait(timeout=60)


@pytest.mark.slow  # four starts of two processes
@pytest.mark.parametrize("kind", ["supervised", "reinforced"])
def test_two_hosts_killed_and_resumed_end_where_one_process_ends(tmp_path, kind):
    config, output = f"{RECIPES}:{kind}", tmp_path / "both"
    kill_after(start(config, output), output, 5)
    again = start(config, output)
    assert again.wait(timeout=400) == 0, log_of(output)[-3000:]
    text = log_of(output)
    assert "[host 0] resuming after step" in text and "[host 1] resuming" not in text
    alone = run.train(configs.load(config, [f"--config.output={tmp_path / 'alone'}"]))
    ours, known = lines_of(output), lines_of(alone.output)
    assert [line["step"] for line in ours] == list(range(1, alone.steps + 1))
    for name in ("loss", "grad_norm", "reward"):
        if name in known[0]:
            wanted = [line[name] for line in known]
            np.testing.assert_allclose([line[name] for line in ours], wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    memories = [load_file(folder / "memory" / "memory.safetensors") for folder in (output, alone.output)]
    for name, known_leaf in memories[1].items():
        np.testing.assert_allclose(memories[0][name], known_leaf, rtol=0, atol=1e-4, err_msg=name)
    judged = [line[JUDGED[kind]] for line in metrics.read(output) if JUDGED[kind] in line]
    assert judged[-1] == pytest.approx(alone.metrics[JUDGED[kind]], abs=1e-6)
    assert (output / record.FILE).exists() and not (output / "rejected_host1.jsonl").exists()
