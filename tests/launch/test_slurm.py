"""launch/slurm.sbatch: what it asks for, what it starts, and when it queues itself again."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.launch.stubs import LAUNCH, Stubs

SCRIPT = LAUNCH / "slurm.sbatch"
OPTIONS = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path / "bin")
    stubs.environment["SLURM_JOB_ID"] = "4711"
    stubs.add("scontrol")
    return stubs


def start(stubs, *words):
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        env=stubs.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_it_asks_for_one_process_per_gpu_a_warning_and_a_second_life():
    assert OPTIONS["ntasks-per-node"] == OPTIONS["gpus-per-node"]
    assert "gpus-per-task" not in OPTIONS
    assert OPTIONS["signal"] == "B:USR1@120"
    assert {"requeue", "exclusive"} <= set(OPTIONS)
    assert OPTIONS["open-mode"] == "append"


def test_it_starts_the_command_on_all_processes(stubs):
    stubs.add("srun")
    process = start(stubs, "--config.seed=1", "--config.output=a b")
    process.communicate(timeout=60)
    (words,) = stubs.calls("srun")
    assert process.returncode == 0
    assert words[:5] == ["--kill-on-bad-exit=0", "--wait=60", "--label", "jaxmem", "train"]
    assert words[-2:] == ["--config.seed=1", "--config.output=a b"]
    assert stubs.calls("scontrol") == []


@pytest.mark.parametrize("code", [1, 137])
def test_an_error_ends_the_job_with_its_code(stubs, code):
    stubs.add("srun", f"sys.exit({code})\n")
    process = start(stubs)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert stubs.calls("scontrol") == []


SAVES = """
import signal, time
def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(100)
"""


def test_a_warning_reaches_the_step_and_the_job_queues_again_once_it_has_saved(stubs):
    stubs.add("srun", SAVES)
    process = start(stubs)
    assert process.stdout.readline() == "up\n"
    time.sleep(0.3)  # the script sets its trap after it starts the step
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert output == "saved\n"
    assert process.returncode == 0
    assert stubs.calls("scontrol") == [["requeue", "4711"]]


def test_a_cancelled_job_saves_once_and_does_not_queue_again(stubs):
    stubs.add("srun", SAVES)
    process = start(stubs)
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, signal.SIGTERM)  # as scancel: to the script and to the step
    output, _ = process.communicate(timeout=60)
    assert output == "saved\n"
    assert process.returncode == -signal.SIGTERM
    assert stubs.calls("scontrol") == []
