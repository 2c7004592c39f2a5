"""`jaxmem study`: several ways to train, several seeds of each, one set of tests for all, and what comes out.

Every arm and seed leaves its trained weights and its results in the study's folder, under fingerprints of settings, so
that the same command goes on after a kill and neither trains nor measures anything twice. Small models leave most of a
machine idle: several workers, each a process with cores of its own, share the runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxmem.analysis import study_runs
from jaxmem.analysis.study_progress import Progress
from jaxmem.analysis.study_results import ArmResult, Choice, Results
from jaxmem.analysis.study_runs import TOOLS, Found, Tools, Unit
from jaxmem.analysis.study_settings import Study, open_study
from jaxmem.errors import JaxmemError
from jaxmem.training.seeds import share_programs

COMPILED, SECONDS, SETTINGS = "compiled", "seconds.json", "study_config.json"
_START = "import sys; from jaxmem.analysis import study; sys.exit(study.worker(*sys.argv[1:]))"


def main(config: Any) -> int:
    """The command `jaxmem study`: runs it, prints tables and sentences, writes the report; returns the exit code."""
    from jaxmem.analysis import compression, study_report

    if config.get("name") == "compression":
        return compression.main(config)
    study, began = open_study(config), time.perf_counter()
    folder = Path(study.config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with _timed(folder / SECONDS):
        total, kept = len(study_runs.units(study)), len(_gather(study, {}, {}))
        print(f"{total} runs, {kept} of them done already; results go to {folder}", flush=True)
        if study.config.workers > 1 and kept < total:
            _share(folder, config, study.config.workers)
        else:
            share_programs(folder / COMPILED)
        results = run_study(study, TOOLS)
    seconds = json.loads((folder / SECONDS).read_text())
    study_report.publish(study, results, folder, seconds, time.perf_counter() - began)
    return 0


def run_study(study: Study, tools: Tools, parent: int | None = None) -> Results:
    """Trains and measures what is missing, together with whoever else works in this folder; all results.

    Args:
      study: what there is to do.
      tools: how it is done.
      parent: process without which this one shall not go on; None is none.
    """
    progress = Progress(study, tools.say)
    choices: dict[str, Choice] = {}
    found: dict[Unit, Found] = {}
    progress.there_already(_gather(study, found, choices))
    while len(found) < progress.total:
        if parent is not None and os.getppid() != parent:
            raise JaxmemError("the command that started this worker has ended")
        made = _next(study, tools, found, choices)
        progress.made(_gather(study, found, choices), made)
        if made is None and len(found) < progress.total:
            time.sleep(1)  # others are at work on what comes next
    return _collected(study, found, choices)


def worker(settings: str, cores: str, parent: str) -> int:
    """One of several processes that share a study: its configuration's file, its cores, and who started it."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    study = open_study(_tuples(json.loads(Path(settings).read_text(encoding="utf-8"))))
    share_programs(Path(study.config.output) / COMPILED)
    try:
        run_study(study, TOOLS, int(parent))
    except (JaxmemError, KeyboardInterrupt) as error:
        print(f"jaxmem study, a worker: {error}", file=sys.stderr)
        return 2
    return 0


def _gather(study: Study, found: dict[Unit, Found], choices: dict[str, Choice]) -> list[Unit]:
    """Takes in what is done, whoever did it, and chooses variants; the units that are new in `found`."""
    new = []
    for unit in study_runs.units(study):
        _decide(study, choices)
        if unit not in found and study_runs.ready(study, unit, choices):
            if (one := study_runs.finished(study, unit, choices)) is not None:
                found[unit] = one
                new.append(unit)
    return new


def _next(
    study: Study, tools: Tools, found: Mapping[Unit, Found], choices: Mapping[str, Choice]
) -> tuple[Unit, Found] | None:
    """Does the first unit that may start and that nobody else is at; None when there is none."""
    for unit in study_runs.units(study):
        if unit not in found and study_runs.ready(study, unit, choices):
            with study_runs.claimed(study, unit) as mine:
                if mine and study_runs.finished(study, unit, choices) is None:
                    return unit, study_runs.perform(study, tools, unit, choices)
    return None


def _decide(study: Study, choices: dict[str, Choice]) -> None:
    """Chooses among the variants of arms that have all been tried."""
    for name, arm in study.arms.items():
        if arm.variants and name not in choices and (chosen := study_runs.choose(study, name, choices)):
            choices[name] = chosen


def _share(folder: Path, config: Any, count: int) -> None:
    """Runs workers until all is done; JaxmemError when one fails."""
    settings = folder / SETTINGS
    settings.write_text(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else dict(config)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    count = max(1, min(count, len(cores)))
    started, before = [], signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the workers too
    try:
        for place in range(count):
            own = ",".join(map(str, cores[place::count]))
            words = [sys.executable, "-c", _START, str(settings), own, str(os.getpid())]
            started.append(subprocess.Popen(words))
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()
        signal.signal(signal.SIGTERM, before)
    if any(codes):
        raise JaxmemError(f"a worker of the study failed (see above); the same command goes on ({folder})")


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _timed(path: Path) -> Iterator[None]:
    """Adds the seconds that pass to those of earlier starts, however this one ends."""
    began, before = time.perf_counter(), json.loads(path.read_text()) if path.is_file() else 0.0
    try:
        yield
    finally:
        path.write_text(json.dumps(before + time.perf_counter() - began))


def _collected(study: Study, found: dict[Unit, Found], choices: dict[str, Choice]) -> Results:
    """All units' results by arm."""
    arms = {}
    for name, arm in study.arms.items():
        own = {unit.seed: one for unit, one in found.items() if unit.arm == name and not unit.variant}
        own = {seed: own[seed] for seed in study.seeds(name)}
        tests = {
            key: {seed: one.readings[key] for seed, one in own.items() if key in one.readings} for key in study.tests
        }
        trained = {seed: one.trained for seed, one in own.items() if one.trained is not None}
        arms[name] = ArmResult(arm.title, tuple(own), {key: rows for key, rows in tests.items() if rows}, trained)
    return Results(arms, choices)
