"""Runs in processes of their own that are interrupted and killed: they end where the undisturbed run ends."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.checkpoints.examine import examine
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.training import goodput, metrics
from jaxmem.training.signals import Interrupted
from tests.training import survivor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    state, _ = survivor.go(folder)
    return folder, jax.device_get(state.trainable)


def launch(folder, *settings, **environment):
    """The run as a process that can be interrupted already."""
    command = [sys.executable, "-m", "tests.training.survivor", str(folder), *settings]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n", process.stderr.read().decode()
    return process


def finish(process):
    """(exit code, what it said)."""
    said = process.communicate(timeout=120)[1].decode()
    return process.returncode, said


def lines_of(folder, key="lr"):
    return [line for line in metrics.read(folder) if key in line]


def reached(process, folder, lines):
    """Waits until the run has written so many lines of metrics, or is over."""
    while process.poll() is None and len(lines_of(folder)) < lines:
        time.sleep(0.002)


def interrupt(folder, draw):
    """SIGTERM at a random moment; returns the lines of metrics that were there."""
    process = launch(folder, "pause=0.03")
    reached(process, folder, len(lines_of(folder)) + draw.choice([0, 1, 3, 5]))
    time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code in (0, Interrupted.exit_code), said
    if code and "after step" in said:  # ended by the loop: the step that it names is in a checkpoint and in the lines
        step = int(said.split("after step ")[1].split()[0])
        assert latest(folder) == step == lines_of(folder)[-1]["step"]
    return len(lines_of(folder))


def kill(folder, draw):
    """SIGKILL while a checkpoint is half-written; returns (was it?, steps whose work is lost)."""
    process = launch(folder, "checkpoint_every=1", "pause=0.01")
    reached(process, folder, len(lines_of(folder)) + draw.choice([1, 2, 4]))
    began = time.monotonic()
    while process.poll() is None and not half_written(folder) and time.monotonic() - began < 20:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01))
    process.send_signal(signal.SIGKILL)
    finish(process)
    written = len(lines_of(folder))
    return half_written(folder), written - (latest(folder) or 0)


def half_written(folder):
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def latest(folder):
    steps = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps, default=None)


def ends_alike(undisturbed, folder):
    """Resumes to the end: the same bits, every line once and in order with the same numbers, the same records."""
    state, _ = survivor.go(folder)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.trainable), undisturbed[1])
    numbers = [
        [
            {name: value for name, value in line.items() if "second" not in name and not name.startswith("goodput/")}
            for line in metrics.read(where)
        ]
        for where in (undisturbed[0], folder)
    ]
    assert numbers[0] == numbers[1]
    assert [line["step"] for line in lines_of(folder)] == list(range(1, survivor.STEPS + 1))
    read = {line["step"]: line["rows"] for line in metrics.read(undisturbed[0], survivor.ORDER)}
    again = metrics.read(folder, survivor.ORDER)
    assert {line["step"] for line in again} == set(read)
    assert all(line["rows"] == read[line["step"]] for line in again)
    shares = [sum(line[f"goodput/{kind}"] for kind in goodput.KINDS) for line in lines_of(folder)]
    assert np.allclose(shares, 1)


def test_one_run_survives_whatever_ends_its_starts(undisturbed, tmp_path):
    draw = random.Random(0)
    lost = []
    for _ in range(3):
        interrupt(tmp_path, draw)
        lost.append(kill(tmp_path, draw)[1])
    ends_alike(undisturbed, tmp_path)
    assert all(steps <= 3 for steps in lost)  # one that is in the writing, one that waits, one that was read
    assert json.loads((tmp_path / goodput.FILE).read_text())["lost"] > 0 or not any(lost)
    assert examine(tmp_path)["problems"] == []


@pytest.mark.slow
def test_sigterm_at_random_moments_twenty_times(undisturbed, tmp_path):
    draw, reached = random.Random(1), []
    for trial in range(20):
        reached.append(interrupt(tmp_path / str(trial), draw))
        ends_alike(undisturbed, tmp_path / str(trial))
    print(f"\n20 SIGTERM: stopped after steps {sorted(reached)}, no step lost")


@pytest.mark.slow
def test_sigkill_while_saving_twenty_times(undisturbed, tmp_path):
    draw, found = random.Random(2), []
    for trial in range(20):
        found.append(kill(tmp_path / str(trial), draw))
        ends_alike(undisturbed, tmp_path / str(trial))
    hits, lost = sum(hit for hit, _ in found), [steps for _, steps in found]
    print(f"\n20 SIGKILL: {hits} while a checkpoint was half-written, steps done again {np.mean(lost):.2f} {lost}")
    assert hits >= 10


def test_a_second_signal_ends_at_once(tmp_path):
    process = launch(tmp_path, "pause=5")  # the first signal waits for the step under way
    while not (tmp_path / survivor.ORDER).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == -signal.SIGTERM


def test_a_signal_to_one_process_stops_both_after_the_same_step(undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def start(*settings):
        common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-m", "tests.training.survivor", str(tmp_path), *settings]
        return [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **common, "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for index in range(2)
        ]

    pair = start("wide=800", "pause=0.05")
    reached(pair[0], tmp_path, 4)
    pair[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in pair]
    assert [code for code, _ in ends] == [Interrupted.exit_code] * 2, ends
    stopped = [said.split("stopped by ")[1].splitlines()[0] for _, said in ends]
    assert stopped[0] == stopped[1] and stopped[0].startswith("SIGTERM on host 1 after step ")
    step = int(stopped[0].split("after step ")[1].split()[0])
    assert latest(tmp_path) == step == lines_of(tmp_path)[-1]["step"] and step < survivor.STEPS
    assert [finish(process)[0] for process in start("wide=800")] == [0, 0]
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, survivor.STEPS + 1))
    assert [line["step"] for line in lines_of(tmp_path, "eval/loss")] == [8, 16, 24]
    alone, _ = survivor.go(tmp_path / "alone", wide=800)
    with CheckpointStore(tmp_path / "checkpoints", {"run": 1}) as store:
        both = store.restore(alone).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both.trainable, alone.trainable)
