"""The runs of a study one by one: what each is, whether it may start yet, and training and measuring it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmem.adapters import lora
from jaxmem.analysis import study_store
from jaxmem.analysis.attention import image_mass
from jaxmem.analysis.study_results import Choice
from jaxmem.analysis.study_settings import Study, resolve
from jaxmem.evaluation.boards import evaluate
from jaxmem.evaluation.conditions import BoardTest
from jaxmem.evaluation.reading import Reading
from jaxmem.training import run, trees
from jaxmem.training.settings import TrainConfig

VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a study does with a model.

    Attributes:
      train: trains by a configuration, or goes on; -> (model, parameters that trained).
      load: the bare backbone of a configuration.
      measure: (model, test, with attention?) -> one Reading per condition.
      say: takes a line for the reader.
    """

    train: Callable[[TrainConfig], tuple[Any, int]]
    load: Callable[[TrainConfig], Any]
    measure: Callable[[Any, BoardTest, bool], tuple[Reading, ...]]
    say: Callable[[str], None] = print


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker does at a time: an arm with a seed, or, where `variant` is named, its trial with that seed."""

    arm: str
    seed: int
    variant: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """All of a unit: readings by test, and the run (None where nothing trains)."""

    readings: Mapping[str, tuple[Reading, ...]]
    trained: study_store.Trained | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder, its settings and their fingerprint."""

    folder: Path
    config: TrainConfig
    mark: str


def units(study: Study) -> list[Unit]:
    """All units in an order in which each may start when those before it are done."""
    found = []
    for name, arm in study.arms.items():
        found += [Unit(name, study.seeds(name)[0], variant) for variant in arm.variants]
        found += [Unit(name, seed) for seed in study.seeds(name)]
    return found


def finished(study: Study, unit: Unit, chosen: Mapping[str, Choice]) -> Found | None:
    """The unit's results, where all of them are there."""
    one = run_of(study, unit, chosen)
    if study.arms[unit.arm].trains and study_store.trained(one.folder, one.mark) is None:
        return None
    found = {key: _kept(study, unit, one, key, test) for key, test in exams(study, unit).items()}
    if any(rows is None for rows in found.values()):
        return None
    return Found({k: v for k, v in found.items() if v}, study_store.trained(one.folder, one.mark))


def ready(study: Study, unit: Unit, chosen: Mapping[str, Choice]) -> bool:
    """Are the variants chosen that the unit needs, and the weights trained where it starts?"""
    arm = study.arms[unit.arm]
    if any(study.arms[name].variants and name not in chosen for name in _ancestors(study, unit.arm)):
        return False
    if arm.variants and not unit.variant and unit.arm not in chosen:
        return False
    if not arm.start_from:
        return True
    parent = run_of(study, Unit(arm.start_from, unit.seed), chosen)
    return study_store.trained(parent.folder, parent.mark) is not None


def perform(study: Study, tools: Tools, unit: Unit, chosen: Mapping[str, Choice]) -> Found:
    """Trains and measures what is missing of a unit."""
    arm, one, model = study.arms[unit.arm], run_of(study, unit, chosen), None
    found: dict[str, tuple[Reading, ...]] = {}
    if arm.trains and study_store.trained(one.folder, one.mark) is None:
        model = _train(tools, one)
    for key, test in exams(study, unit).items():
        rows = _kept(study, unit, one, key, test)
        if rows is None:
            if model is None:
                model = tools.train(one.config)[0] if arm.trains else tools.load(one.config)
            rows = tools.measure(model, test, arm.attention)
            study_store.keep_measured(one.folder, key, one.mark, test, arm.attention, rows)
        found[key] = rows
    return Found(found, study_store.trained(one.folder, one.mark))


def choose(study: Study, name: str, chosen: Mapping[str, Choice]) -> Choice | None:
    """The choice among an arm's variants, where all have been tried: the first of the best."""
    selection, scores, boards = study.config.selection, {}, 0
    for variant in study.arms[name].variants:
        found = finished(study, Unit(name, study.seeds(name)[0], variant), chosen)
        if found is None:
            return None
        (row, *_) = found.readings[VALIDATION]
        scores[variant], boards = (getattr(row, selection.by), row.exact), row.boards
    best = max(scores, key=lambda variant: scores[variant])
    return Choice(best, {key: value[0] for key, value in scores.items()}, boards, selection.by)


def run_of(study: Study, unit: Unit, chosen: Mapping[str, Choice]) -> Run:
    """The run of a unit, with the weights that it starts from filled in."""
    variants = {name: choice.variant for name, choice in chosen.items()}
    if unit.variant:
        variants[unit.arm] = unit.variant
    steps = study.config.selection.steps if unit.variant else 0
    folder = Path(study.config.output) / "arms" / unit.arm / variants.get(unit.arm, "")
    folder = folder / ("trial" if steps else f"seed_{unit.seed}")
    config, parent = resolve(study, unit.arm, unit.seed, str(folder), variants, steps), ""
    if start := study.arms[unit.arm].start_from:
        source = run_of(study, Unit(start, unit.seed), chosen)
        config, parent = _started(config, source.folder), source.mark
    return Run(folder, config, study_store.fingerprint(config, parent))


def exams(study: Study, unit: Unit) -> dict[str, BoardTest]:
    """The tests of a unit."""
    if unit.variant:
        return {VALIDATION: study.limited(study.config.selection.test)}
    return study.exams(unit.arm, unit.seed)


@contextlib.contextmanager
def claimed(study: Study, unit: Unit) -> Iterator[bool]:
    """Is the unit this process's own while the context lasts? A claim ends with its process, however that ends."""
    folder = Path(study.config.output) / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{unit.arm}_{unit.variant}_{unit.seed}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _kept(study: Study, unit: Unit, one: Run, key: str, test: BoardTest) -> tuple[Reading, ...] | None:
    return study_store.measured(one.folder, key, one.mark, test, study.arms[unit.arm].attention)


def _train(tools: Tools, one: Run) -> Any:
    """Trains, and notes that this is done."""
    began = time.perf_counter()
    model, parameters = tools.train(one.config)
    seconds = time.perf_counter() - began
    study_store.keep_trained(one.folder, study_store.Trained(one.mark, one.config.loop.steps, parameters, seconds))
    return model


def _started(config: TrainConfig, folder: Path) -> TrainConfig:
    """The run with the memory and the backbone that another left in its folder."""
    memory, backbone = folder / run.MEMORY, folder / run.BACKBONE
    return dataclasses.replace(
        config,
        memory_folder=str(memory) if memory.is_dir() else None,
        backbone=str(backbone) if backbone.is_dir() else config.backbone,
    )


def _ancestors(study: Study, name: str) -> set[str]:
    """The arms that an arm is like or starts from, and theirs."""
    arm = study.arms[name]
    parents = {other for other in (arm.like, arm.start_from) if other}
    return parents.union(*(_ancestors(study, other) for other in parents))


def _trained_model(config: TrainConfig) -> tuple[Any, int]:
    """The model of a finished run, LoRA factors added into its kernels: one compiled test for all plain backbones."""
    model = run.train(config).model
    tree = {"base": model.base, "memory": model.memory}
    parameters = trees.count(trees.split(tree, config.trainable)[0])
    return (model.merge_lora() if lora.has_lora(model.base) else model), parameters


def _bare(config: TrainConfig) -> Any:
    return run.load_model(dataclasses.replace(config, memory=None, memory_folder=None, lora=None), None)


def _measure(model: Any, test: BoardTest, attention: bool) -> tuple[Reading, ...]:
    return evaluate(model, test, look=image_mass if attention else None)


TOOLS = Tools(_trained_model, _bare, _measure, lambda line: print(line, flush=True))
