"""One page over several seeds of a GRPO run: mean and spread of start and end, all curves together, links."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmem.analysis import grpo_curves as curves
from jaxmem.analysis import report as html
from jaxmem.analysis.grpo_curves import History
from jaxmem.analysis.grpo_report import REPORT, Links, Page, facts, read_about, read_history
from jaxmem.analysis.report import Charts, Table
from jaxmem.analysis.svg import Line

Runs = Mapping[str, History]
_CURVES = (
    ("eval/reward", "Held-out reward", "reward"),
    ("reward", "Reward in training", "reward"),
    ("frac_reward_zero_std", "Groups without signal", "share"),
    ("completions/mean_length", "Mean length", "tokens"),
    ("completions/clipped_ratio", "Cut off by the limit", "share"),
    ("entropy", "Entropy", "nats per token"),
)
_LINKED = {"eval/reward": "Held-out reward", "reward": "Reward in training"}


def write(folder: str | Path, seeds: Sequence[int]) -> Path:
    """Writes `folder/report.html` over the runs in `folder/seed_N`, whose own reports it links to; its path."""
    folder = Path(folder)
    runs = {f"seed_{seed}": read_history(folder / f"seed_{seed}") for seed in seeds}
    about = read_about(folder / next(iter(runs)))
    config = dict(about.get("config") or {})
    if config:
        config |= {"output": str(folder), "seed": ", ".join(map(str, seeds))}
    return Page(
        title=f"GRPO over {len(runs)} seeds: {folder}",
        subtitle=time.strftime("%d %B %Y, %H:%M"),
        summary=(summary(runs),),
        table=results(runs),
        charts=charts(runs),
        facts=facts((), config),
        details=(("Settings", html.flat(config)), ("Versions", html.flat(about.get("versions") or {}))),
        links=links(runs),
    ).write(folder / REPORT)


def summary(runs: Runs) -> str:
    """How the first of the linked metrics changed, and in how many runs it rose."""
    for name, called in _LINKED.items():
        pairs = [curves.ends(history, name) for history in runs.values()]
        found = np.array([pair for pair in pairs if pair is not None])
        if len(found):
            rose = int((found[:, 1] > found[:, 0]).sum())
            return (
                f"{called} went from {spread(found[:, 0])} to {spread(found[:, 1])}; it rose in {rose} of {len(found)}"
                " runs. ± is the sample standard deviation over the seeds."
            )
    return "The runs wrote down no reward."


def results(runs: Runs) -> Table:
    """Mean and spread of start, end and change, for every metric that all runs have."""
    shared = [name for name in curves.tabled(next(iter(runs.values()))) if all(map(_has(name), runs.values()))]
    rows = []
    for name in shared:
        start, end = np.array([curves.ends(history, name) for history in runs.values()]).T
        rows.append((name, spread(start), spread(end), spread(end - start, "+")))
    note = (
        "Mean ± sample standard deviation over the seeds. Start and end are means over the first and the last steps of"
        " a run; eval/ is its first and its last evaluation. The change is taken within each run."
    )
    return Table(("metric", "start", "end", "change"), tuple(rows), strong=(2,), notes=(note,))


def charts(runs: Runs) -> tuple[Charts, ...]:
    """The curves of all runs, one plot per metric."""

    def lines(name: str) -> list[Line]:
        smooth = 1 if name.startswith("eval/") else 2 * max(map(curves.window, runs.values()))
        return [curves.curve(history, name, run, i, smooth) for i, (run, history) in enumerate(runs.items())]

    found = tuple(plot for name, title, label in _CURVES for plot in curves.chart(title, lines(name), label))
    return (Charts("All seeds", found, "Running means, except of evaluations."),) if found else ()


def links(runs: Runs) -> Links:
    """Each run's report, with its start and end."""
    shown = [name for name in _LINKED if any(map(_has(name), runs.values()))]
    rows = []
    for run, history in runs.items():
        pairs = [curves.ends(history, name) for name in shown]
        cells = tuple("–" if pair is None else f"{pair[0]:.3f} → {pair[1]:.3f}" for pair in pairs)
        rows.append((f"{run}/{REPORT}", run, cells))
    return Links(("run", *shown), tuple(rows))


def spread(values: np.ndarray, sign: str = "") -> str:
    """Mean ± sample standard deviation (0 exactly where all are equal); the mean alone of a single value."""
    mean = format(values.mean(), f"{sign}.4g")
    if len(values) < 2:
        return mean
    return f"{mean} ± {values.std(ddof=1) if np.ptp(values) else 0:.2g}"


def _has(name: str) -> Callable[[History], bool]:
    return lambda history: curves.ends(history, name) is not None
