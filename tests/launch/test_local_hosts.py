"""launch/local_hosts.sh: variables, output, exit codes, and that no host outlives the others or its signals."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local_hosts.sh"
WAITING = """
import sys, time
try:
    print("up", flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(75)
"""
TOLD = """
import signal, sys, time
def saved(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
print("up", flush=True)
time.sleep(100)
"""


def command(hosts, *words):
    return ["bash", str(SCRIPT), str(hosts), "--", *words]


def launch(hosts, code, timeout=60, **variables):
    """A Python program on so many hosts, to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | variables
    return subprocess.run(
        command(hosts, sys.executable, "-c", code), env=environment, capture_output=True, text=True, timeout=timeout
    )


def started(hosts, code, **variables):
    """A running launch whose hosts are all up."""
    process = subprocess.Popen(
        command(hosts, sys.executable, "-c", code),
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sorted(process.stdout.readline() for _ in range(hosts)) == [f"[host {i}] up\n" for i in range(hosts)]
    return process


def host_pids(text):
    return [int(pid) for pid in re.findall(r"host \d+ is process (\d+)", text)]


def alive(pid):
    """Does it still run? The dead that nobody has asked about yet do not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_every_host_gets_its_variables_and_the_same_free_port():
    code = (
        "import os; names = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JAX_PLATFORMS';"
        "print(*(os.environ[name] for name in names))"
    )
    ended = launch(3, code)
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"^\[host (\d)\] 127\.0\.0\.1:(\d+) 3 (\d) cpu$", ended.stdout, re.MULTILINE)
    assert sorted((host, index) for host, _, index in found) == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({port for _, port, _ in found}) == 1
    assert len(host_pids(ended.stderr)) == 3


def test_port_and_platform_can_be_chosen():
    code = "import os; print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_PLATFORMS'])"
    assert launch(1, code, PORT="4321", JAX_PLATFORMS="tpu").stdout == "[host 0] 127.0.0.1:4321 tpu\n"


def test_hosts_find_one_another_and_see_the_devices_of_all():
    code = (
        "import jax; from jaxmem.distributed import hosts; hosts.start(hosts.HostsConfig());"
        "print(jax.device_count(), jax.local_device_count(), hosts.share('the sum', hosts.index(), sum))"
    )
    ended = launch(2, code, JAX_NUM_CPU_DEVICES="2")
    assert ended.returncode == 0, ended.stdout
    assert "[host 0] 4 2 1\n" in ended.stdout and "[host 1] 4 2 1\n" in ended.stdout


def test_output_keeps_every_line_of_both_streams_in_order():
    code = (
        "import sys\n"
        "for i in range(300): print('out', i)\n"
        "sys.stdout.flush(); print('a mistake: 100% \\\\n', file=sys.stderr, end='')"
    )
    lines = launch(2, code).stdout.splitlines()
    for host in ("[host 0] ", "[host 1] "):
        mine = [line.removeprefix(host) for line in lines if line.startswith(host)]
        assert mine == [f"out {i}" for i in range(300)] + ["a mistake: 100% \\n"]
    assert len(lines) == 602


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_the_exit_code_is_the_first_that_is_not_zero(code):
    ended = launch(2, f"import os, sys; sys.exit({code} if os.environ['JAX_PROCESS_ID'] == '1' else 0)")
    assert ended.returncode == code
    assert (f"host 1 ended with exit code {code}" in ended.stderr) == (code != 0)


def test_a_failing_host_ends_the_others_soon():
    code = "import os, sys, time; sys.exit(7) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(100)"
    ended = launch(3, code, PATIENCE_S="1", timeout=50)
    assert ended.returncode == 7
    assert "host 0 ended with exit code 143" in ended.stderr and "host 2 ended with exit code 143" in ended.stderr


def test_a_host_deaf_to_sigterm_is_killed_with_what_it_started():
    code = (
        "import os, signal, subprocess, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('worker', subprocess.Popen(['sleep', '100']).pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    ended = launch(2, code, PATIENCE_S="1", GRACE_S="1", timeout=50)
    assert ended.returncode == 7
    assert "host 0 ended with exit code 137" in ended.stderr
    worker = int(re.search(r"worker (\d+)", ended.stdout).group(1))
    assert not alive(worker) and not any(alive(pid) for pid in host_pids(ended.stderr))


def test_a_host_killed_from_outside_counts_as_failed():
    process = started(2, WAITING, PATIENCE_S="0")
    pids = host_pids(process.stderr.readline() + process.stderr.readline())
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=50)
    assert process.returncode == 137
    assert not alive(pids[0])


@pytest.mark.parametrize(
    ("code", "told", "says"),
    [(TOLD, signal.SIGTERM, "saved"), (WAITING, signal.SIGINT, "interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
def test_signals_reach_every_host(code, told, says):
    process = started(3, code)
    process.send_signal(told)
    output, _ = process.communicate(timeout=50)
    assert sorted(output.splitlines()) == [f"[host {i}] {says}" for i in range(3)]
    assert process.returncode == 75


def test_a_host_that_saved_and_ended_leaves_the_others_their_time():
    code = "import os, sys, time; time.sleep(2.5 * int(os.environ['JAX_PROCESS_ID'])); print('saved'); sys.exit(75)"
    ended = launch(2, code, PATIENCE_S="0", GRACE_S="0")
    assert ended.returncode == 75
    assert sorted(ended.stdout.splitlines()) == ["[host 0] saved", "[host 1] saved"]


def test_control_c_in_a_terminal_interrupts_every_host():
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    inside = [sys.executable, "-c", terminal, *command(2, sys.executable, "-c", WAITING)]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        seen = b""
        while seen.count(b"] up") < 2:
            seen += process.stdout.readline()
        output, _ = process.communicate(b"\x03", timeout=50)
    assert output.count(b"interrupted") == 2
    assert process.returncode == 75


@pytest.mark.parametrize("words", [[], ["0", "--", "true"], ["two", "--", "true"], ["2"], ["2", "--"]])
def test_wrong_arguments_print_the_usage(words):
    ended = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: bash launch/local_hosts.sh N -- COMMAND...")


def test_an_unknown_command_is_named():
    ended = subprocess.run(command(1, "no-such-command"), capture_output=True, text=True, timeout=50)
    assert ended.returncode == 127
    assert "no-such-command" in ended.stdout


def test_nothing_is_left_behind(tmp_path):
    ended = launch(2, "print('x')", TMPDIR=str(tmp_path))
    assert ended.returncode == 0 and list(tmp_path.iterdir()) == []
