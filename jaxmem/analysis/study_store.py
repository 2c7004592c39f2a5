"""What a study keeps of every arm and seed, so that the same command goes on and does nothing twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmem.evaluation.conditions import BoardTest
from jaxmem.evaluation.reading import Reading
from jaxmem.training.settings import TrainConfig

TRAINED, MEASURED = "trained.json", "measured"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run: fingerprint of its settings, steps, parameters that trained, and seconds."""

    fingerprint: str
    steps: int
    parameters: int
    seconds: float


def fingerprint(config: TrainConfig, parent: str = "") -> str:
    """Tells trained weights apart: a run's settings but for its folders and display, and those of where it starts."""
    settings = dataclasses.asdict(config)
    for name in ("output", "memory_folder", "experiment", "seeds"):
        settings.pop(name)
    for name in ("progress", "tensorboard", "keep", "checkpoint_every", "log_every", "resume"):
        settings["loop"].pop(name)
    return _digest([settings, parent])


def trained(folder: Path, mark: str) -> Trained | None:
    """The finished run of these settings, if it is there."""
    kept = _read(folder / TRAINED)
    return Trained(**kept) if kept is not None and kept["fingerprint"] == mark else None


def keep_trained(folder: Path, found: Trained) -> None:
    """Notes that a run is finished."""
    _write(folder / TRAINED, dataclasses.asdict(found))


def measured(folder: Path, name: str, mark: str, test: BoardTest, attention: bool) -> tuple[Reading, ...] | None:
    """The kept result of a test of these weights with these settings."""
    kept = _read(folder / MEASURED / f"{name}.json")
    if kept is None or kept["fingerprint"] != exam_mark(mark, test, attention):
        return None
    return tuple(reading(row) for row in kept["readings"])


def keep_measured(
    folder: Path, name: str, mark: str, test: BoardTest, attention: bool, rows: tuple[Reading, ...]
) -> None:
    """Keeps the result of a test."""
    found = {"fingerprint": exam_mark(mark, test, attention), "readings": [dataclasses.asdict(row) for row in rows]}
    _write(folder / MEASURED / f"{name}.json", found)


def exam_mark(mark: str, test: BoardTest, attention: bool) -> str:
    """Tells measurements apart; how many boards run together does not matter."""
    settings = dataclasses.asdict(test)
    settings.pop("batch_size")
    return _digest([mark, settings, attention])


def reading(row: Mapping[str, Any]) -> Reading:
    """A Reading from its JSON form."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Reading(**fields)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
