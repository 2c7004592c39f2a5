"""One command, several runs: each stage goes on from the memory, the LoRA factors and the backbone that the one before
it left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmem import config as configs
from jaxmem.adapters import lora
from jaxmem.training.settings import TrainConfig

MEMORY, ADAPTER, BACKBONE = "memory", "adapter", "backbone"
"""Folders that a run leaves in its output."""


def each(config: TrainConfig, train: Callable[[TrainConfig], Any]) -> list[Any]:
    """Trains every stage of `config.stages` in `output/<stage>`, by name; what `train` returned of each.

    A stage is the whole configuration with some values replaced. Stages that are done are not done again: they resume
    at their end. So a stage with an `output` and a `seed` of its own is made once for all seeds.

    Raises:
      ConfigError: a stage replaces a key that does not exist, or values that do not fit; the message names it.
    """
    return [train(one) for one in plan(config)]


def plan(config: TrainConfig) -> list[TrainConfig]:
    """The runs of `each`."""
    runs: list[TrainConfig] = []
    whole = {**dataclasses.asdict(config), "stages": None}
    for name, changes in sorted((config.stages or {}).items()):
        values = _replaced(whole, changes)
        values["output"] = changes.get("output", str(Path(config.output) / name))
        if runs:
            values |= {key: value for key, value in _left(runs[-1]).items() if key not in changes}
        runs.append(configs.build(TrainConfig, values, f"stages.{name}"))
    return runs


def _left(run: TrainConfig) -> dict[str, Any]:
    """Where the next stage finds what a run leaves."""
    left: dict[str, Any] = {}
    if run.memory is not None or run.memory_folder is not None:
        left |= {"memory_folder": str(Path(run.output) / MEMORY)}
    if _trains_backbone(run):
        left |= {"backbone": str(Path(run.output) / BACKBONE)}
    if run.lora is not None or run.adapter_folder is not None:
        left |= {"adapter_folder": str(Path(run.output) / ADAPTER), "lora": None}
    return left


def _trains_backbone(run: TrainConfig) -> bool:
    """Do weights of the backbone itself train, and not its LoRA factors alone?"""
    patterns = (run.trainable,) if isinstance(run.trainable, str) else run.trainable
    return any(one.startswith(("base", "**")) and not one.endswith(lora.LEAVES) for one in patterns)


def _replaced(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with nested changes; what is no mapping on both sides is replaced as a whole."""
    found = dict(values)
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), Mapping)
        found[key] = _replaced(values[key], change) if both else change
    return found
