"""What the metrics of GRPO runs show: first and last values, and curves over the steps.

`history` is the lines of a run's `metrics.jsonl`; values that are null or absent are no points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmem.analysis.report import Charts
from jaxmem.analysis.svg import Axis, Line, line_chart, smoothed

History = Sequence[Mapping[str, Any]]

GAP = "sampling/sampling_logp_difference"
WATCHED = (
    "eval/reward",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "loss",
    "grad_norm",
    f"{GAP}/mean",
    f"{GAP}/p99",
)
"""Metrics that a table always shows where a run has them."""
_IF_NOT_ZERO = ("kl", "clip_ratio/region_mean", "groups_resampled", "no_signal", "skipped")
_WINDOW = 10


def values(history: History, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, finite numbers only."""
    points = [(line["step"], line.get(name)) for line in history]
    points = [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def ends(history: History, name: str) -> tuple[float, float] | None:
    """Start and end of one metric: means of the first and the last steps; of evaluations the first and the last one."""
    found = values(history, name)[1]
    if not found:
        return None
    width = 1 if name.startswith("eval/") else window(history)
    return sum(found[:width]) / len(found[:width]), sum(found[-width:]) / len(found[-width:])


def window(history: History) -> int:
    """Steps that are averaged at either end: ten, or a quarter of a short run's."""
    return max(1, min(_WINDOW, len(values(history, "reward")[0]) // 4))


def names(history: History, prefix: str = "", suffix: str = "") -> list[str]:
    """Metrics with that beginning and end, in their first line's order."""
    found = dict.fromkeys(name for line in history for name in line)
    return [name for name in found if name.startswith(prefix) and name.endswith(suffix)]


def tabled(history: History) -> list[str]:
    """Metrics for a table of one run's start and end."""
    rewards = names(history, "rewards/", "/mean")
    failures = names(history, "rewards/", "error_rate") + names(history, "rewards/", "timeout_rate")
    maybe = [name for name in (*_IF_NOT_ZERO, *failures, *names(history, "hacks/")) if any(values(history, name)[1])]
    return [name for name in (*WATCHED, *rewards, *maybe) if values(history, name)[1]]


def all_charts(history: History) -> tuple[Charts, ...]:
    """Every section of curves of one run; one without points is left out."""
    sections = (_rewards(history), _completions(history), _policy(history), _gates(history), _time(history))
    return tuple(section for section in sections if section.charts)


def curve(history: History, name: str, label: str, colour: int = 0, smooth: int = 1) -> Line:
    """One metric as a line; evaluations are few and get dots."""
    steps, found = values(history, name)
    marks = name.startswith("eval/")
    return Line(label, steps, smoothed(found, smooth), colour=colour, marks=marks, dashed=marks)


def chart(title: str, lines: Sequence[Line], label: str, *, low: float | None = None, log: bool = False) -> list[str]:
    """[the chart], as wide as its legend needs; [] where no line has a point."""
    lines = [line for line in lines if line.x]
    if not lines:
        return []
    log = log and any(value > 0 for line in lines for value in line.y)
    width = max(440, 80 + sum(40 + 7 * len(line.name) for line in lines if line.name))
    return [line_chart(lines, title=title, x=Axis("step", 0), y=Axis(label, low, log=log), width=int(width))]


def _rewards(history: History) -> Charts:
    smooth = window(history)
    steps, found = values(history, "reward")
    lines = [
        Line("", steps, found, colour=7, faint=True),
        curve(history, "reward", f"training, mean of {smooth}", 0, smooth),
        curve(history, "eval/reward", "held out", 1),
    ]
    functions = names(history, "rewards/", "/mean")
    each = [curve(history, name, name.split("/")[1], i, smooth) for i, name in enumerate(functions)]
    signal = [
        curve(history, "reward_std", "reward_std", 2, smooth),
        curve(history, "frac_reward_zero_std", "frac_reward_zero_std", 3, smooth),
    ]
    charts = [*chart("Reward", lines, "reward"), *chart("Signal", signal, "", low=0)]
    charts += chart("Reward by function", each, "mean") if len(each) > 1 else []
    text = "A group whose completions all have the same reward teaches nothing: frac_reward_zero_std is their share."
    return Charts("Reward", tuple(charts), text)


def _completions(history: History) -> Charts:
    length = [
        curve(history, "completions/mean_length", "all", 0),
        curve(history, "completions/mean_terminated_length", "ended by themselves", 2),
        curve(history, "eval/completions/mean_length", "held out", 1),
    ]
    cut = [
        curve(history, "completions/clipped_ratio", "training", 0),
        curve(history, "eval/completions/clipped_ratio", "held out", 1),
    ]
    charts = chart("Mean length", length, "tokens") + chart("Cut off by the limit", cut, "share", low=0)
    return Charts("Completions", tuple(charts))


def _policy(history: History) -> Charts:
    gap = [curve(history, f"{GAP}/mean", "mean", 0), curve(history, f"{GAP}/p99", "99th percentile", 1)]
    kl = [curve(history, "kl", "kl", 3)] if any(values(history, "kl")[1]) else []
    charts = [
        *chart("Entropy", [curve(history, "entropy", "", 2)], "nats per token"),
        *chart("Divergence from the reference", kl, "nats per token"),
        *chart("Sampler against trainer", gap, "difference of log-probabilities", log=True),
        *chart("Gradient norm", [curve(history, "grad_norm", "", 4)], "before clipping", low=0),
    ]
    text = (
        "The sampler and the training forward compute the same log-probabilities in two ways. Their difference is"
        " rounding; a difference that grows means that the update learns from another policy than the one that sampled."
    )
    return Charts("Policy", tuple(charts), text)


def _gates(history: History) -> Charts:
    lines = [
        curve(history, name, name.removeprefix("gate/").replace("_", " "), i)
        for i, name in enumerate(names(history, "gate/"))
    ]
    return Charts("Memory", tuple(chart("Gates", lines, "gate")))


def _time(history: History) -> Charts:
    smooth = window(history)
    shares = [
        curve(history, name, name.removeprefix("time/"), i, smooth) for i, name in enumerate(names(history, "time/"))
    ]
    charts = chart("Shares of a step's time", shares, "share", low=0)
    return Charts("Time", tuple(charts + chart("Step", [curve(history, "step_time", "", 7)], "seconds", log=True)))
