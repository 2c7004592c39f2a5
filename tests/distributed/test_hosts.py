"""Two hosts meet, differ, fail, stay away and die: all of them end, with a message that says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from jaxmem.distributed import hosts
from jaxmem.errors import ConfigError


def two(case: str) -> list[tuple[int, str]]:
    """(exit code, what it printed as its result) of both hosts."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", hosts.COUNT: "2"}
    base[hosts.COORDINATOR] = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.distributed.meeting", case]
    running = [
        subprocess.Popen(command, env={**base, hosts.INDEX: str(i)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for i in range(2)
    ]
    found = []
    for process in running:
        out, _ = process.communicate(timeout=120)
        lines = [line for line in out.decode().splitlines() if line.startswith("RESULT ")]
        found.append((process.returncode, lines[-1].removeprefix("RESULT ") if lines else ""))
    return found


@pytest.mark.parametrize("case", ["agree", "fetch"])
def test_hosts_that_agree_go_on(case):
    assert two(case) == [(0, "done")] * 2


def test_hosts_that_differ_end_with_what_differs():
    text = "HostError: the hosts do not run the same configuration: seed: host 0 has 0, host 1 has 1"
    assert two("differ") == [(2, text)] * 2


def test_an_error_of_one_host_ends_all():
    assert two("fail") == [
        (2, "HostError: host 1 failed: ValueError: row 7 is broken"),
        (2, "ValueError: row 7 is broken"),
    ]


def test_an_error_of_what_the_first_host_does_for_all_ends_all():
    first, second = two("judge")
    assert first == (2, "ZeroDivisionError: division by zero")
    assert second == (2, "HostError: host 0 failed: ZeroDivisionError: division by zero")


def test_hosts_at_different_places_are_told_where():
    where = "the hosts are at different places (host 0 at 'step 0', host 1 at 'step 1')"
    assert [(code, text.partition(";")[0]) for code, text in two("astray")] == [(2, f"HostError: {where}")] * 2


def test_a_host_that_comes_too_late_is_named():
    (code, text), _ = two("late")
    assert code == 2 and "host 0 waited at 'numbers', and host 1 did not come within 2 s (hosts.timeout_s)" in text
    assert "the same command on all hosts goes on from the last checkpoint" in text


def test_a_dead_host_ends_the_others():
    (code, text), (died, nothing) = two("dead")
    assert (died, nothing) == (9, "")
    assert code == 2 and "host 0 waited at 'numbers', and host 1 did not come" in text and "is gone" in text


def test_a_process_on_its_own_meets_itself():
    assert hosts.share("x", 3, sum) == 3 and hosts.once("y", lambda: "z") == "z" and hosts.first()
    hosts.agree("anything", {"a": 1})
    with pytest.raises(KeyError), hosts.together():
        raise KeyError("as it is")


def test_an_environment_that_is_not_whole_is_refused(monkeypatch):
    monkeypatch.setenv(hosts.COORDINATOR, "127.0.0.1:1")
    monkeypatch.setenv(hosts.COUNT, "2")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS is set but not JAX_PROCESS_ID"):
        hosts.start(hosts.HostsConfig())
    monkeypatch.setenv(hosts.INDEX, "one")
    with pytest.raises(ConfigError, match="must be whole numbers"):
        hosts.start(hosts.HostsConfig())
    with pytest.raises(ConfigError, match="must be positive"):
        hosts.HostsConfig(timeout_s=0)
