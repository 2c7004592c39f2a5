"""What one of two hosts does in tests/distributed/test_hosts.py: `python -m tests.distributed.meeting CASE`."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from jaxmem.distributed import hosts
from jaxmem.errors import JaxmemError


def main(case: str) -> None:
    """Starts, meets, and does what the case says; prints `RESULT ...` or the error."""
    hosts.start(hosts.HostsConfig(timeout_s=60, heartbeat_s=10))
    mine = hosts.index()
    with hosts.together():
        assert hosts.share("numbers", mine, sorted) == [0, 1]
        assert hosts.once("a word", lambda: f"from {mine}") == "from 0"
        if case == "agree":
            hosts.agree("configuration", {"seed": 1, "steps": 7})
        if case == "differ":
            hosts.agree("configuration", {"seed": mine, "steps": 7})
        if case == "fail" and mine == 1:
            raise ValueError("row 7 is broken")
        if case == "judge":
            hosts.once("the rewards", lambda: 1 / 0)
        if case == "astray":
            hosts.share(f"step {mine}", mine, sum)
        if case == "late":
            hosts.share("numbers", mine, sum)
            hosts._config = hosts.HostsConfig(timeout_s=2)
            time.sleep(6 * mine)
        if case == "dead" and mine == 1:
            os._exit(9)
        if case == "fetch":
            import jax

            mesh = jax.make_mesh((2,), ("hosts",))
            spread = jax.NamedSharding(mesh, jax.P("hosts"))
            array = jax.make_array_from_callback((4, 3), spread, lambda at: np.arange(12.0).reshape(4, 3)[at])
            np.testing.assert_array_equal(hosts.fetch({"a": array})["a"], np.arange(12.0).reshape(4, 3))
        hosts.share("numbers", mine, sum)
    print("RESULT done", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (JaxmemError, ValueError, ArithmeticError) as error:
        print(f"RESULT {type(error).__name__}: {error}", flush=True)
        if getattr(error, "gone", False):
            os._exit(2)  # as the command does
        sys.exit(2)
