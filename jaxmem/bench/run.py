"""The table of benches, and how a measurement is made, printed and written as JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxmem import config as configs

BENCHES: Mapping[str, str] = {
    "bank": "jaxmem.bench.bank",
    "checkpoint": "jaxmem.bench.checkpoints",
    "comem": "jaxmem.bench.knowledge",
    "compile": "jaxmem.bench.compiling",
    "decode": "jaxmem.bench.decoding",
    "grpo": "jaxmem.bench.rollouts",
    "loading": "jaxmem.bench.loading",
    "vismem": "jaxmem.bench.invocations",
    "vr": "jaxmem.bench.remember",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sides measured in turns.

    Attributes:
      name: what was compared.
      unit: of `ours` and `peer`.
      ours, peer: medians.
      ratio: the figure that the goal is about.
      goal: in words.
      runs: every measurement of both sides.
    """

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    goal: str
    runs: dict[str, list[float]]


def main(*, name: str, json: bool) -> int:
    """Runs one bench and prints a table, or one JSON object per comparison in a list under "comparisons"."""
    module = importlib.import_module(configs.choose(BENCHES, name, "bench"))
    comparisons = module.run()
    print(as_json(name, comparisons) if json else as_text(name, comparisons))
    return 0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import jax

    device = jax.devices()[0]
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def alternate(sides: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of every side in turns, after one round that is thrown away (compilation, first touch)."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(runs + 1):
        for side, work in sides.items():
            start = time.perf_counter()
            work()
            if round_:
                seconds[side].append(time.perf_counter() - start)
    return seconds


median = statistics.median


def as_json(name: str, comparisons: list[Comparison]) -> str:
    """One JSON object; its own `ours`, `peer`, `ratio`, `goal` and `runs` are those of the first comparison."""
    records = [dataclasses.asdict(comparison) for comparison in comparisons]
    return json.dumps({**records[0], "name": name, "machine": machine(), "comparisons": records})


def as_text(name: str, comparisons: list[Comparison]) -> str:
    """A table for people."""
    lines = [f"bench {name} on {machine()}", f"{'':44}{'ours':>12}{'peer':>12}{'ratio':>9}   goal"]
    for c in comparisons:
        lines.append(f"{c.name + ' [' + c.unit + ']':44}{c.ours:12.2f}{c.peer:12.2f}{c.ratio:9.3f}   {c.goal}")
    lines.append(f"medians of {len(next(iter(comparisons[0].runs.values())))} runs, sides in turns")
    return "\n".join(lines)
