"""Several seeds of one run: mean and spread instead of one lucky number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.training import metrics
from jaxmem.training.settings import TrainConfig
from jaxmem.training.vismem_settings import CONTROLS

FILE, COMPILED = "seeds.json", "compiled"
WATCHED = (
    "eval/reward",
    *(f"eval/{control}/reward" for control in CONTROLS),
    "eval/loss",
    "eval/accuracy",
    "reward",
    "loss",
    "accuracy",
)
"""What the table may show; of the evaluated ones those that a run has, else of the training steps."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """One metric over several seeds.

    Attributes:
      name: of the metric.
      seeds: the seeds.
      first: its first value in each run.
      last: its last value in each run.
    """

    name: str
    seeds: tuple[int, ...]
    first: tuple[float, ...]
    last: tuple[float, ...]

    def __str__(self) -> str:
        each = ", ".join(f"{a:.3f} -> {b:.3f}" for a, b in zip(self.first, self.last, strict=True))
        return (
            f"{self.name}: {_plus_minus(self.first)} -> {_plus_minus(self.last)} over {len(self.seeds)} seeds ({each})"
        )


def share_programs(folder: Path) -> None:
    """Keeps compiled programs in a folder, unless the user has one already: runs that differ in seeds share them."""
    if jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def each(config: TrainConfig, train: Callable[[TrainConfig], Any]) -> list[Any]:
    """Trains every seed of `config.seeds` in `output/seed_N`, one after the other; what `train` returned of each.

    Their programs are the same: unless jax keeps compiled programs already, `output/compiled` does, for a first run and
    for all that come later.
    """
    folder = Path(config.output)
    share_programs(folder / COMPILED)
    return [
        train(dataclasses.replace(config, seed=seed, seeds=(), output=str(folder / f"seed_{seed}")))
        for seed in config.seeds
    ]


def spreads(folder: str | Path, seeds: Sequence[int], stage: str = "") -> list[Spread]:
    """The watched metrics of finished runs in `folder/seed_N`, or of their stage in `folder/seed_N/<stage>`; also
    written to `folder/seeds.json`, or `folder/seeds_<stage>.json`."""
    runs = [metrics.read(Path(folder) / f"seed_{seed}" / stage) for seed in seeds]
    found = []
    for name in WATCHED:
        values = [[line[name] for line in run if line.get(name) is not None] for run in runs]
        evaluated = any(one.name.startswith("eval/") for one in found)
        if all(values) and (name.startswith("eval/") or not evaluated):
            found.append(Spread(name, tuple(seeds), tuple(v[0] for v in values), tuple(v[-1] for v in values)))
    text = json.dumps([dataclasses.asdict(one) for one in found], indent=2)
    file = f"seeds_{stage}.json" if stage else FILE
    (Path(folder) / file).write_text(text + "\n", encoding="utf-8")
    return found


def _plus_minus(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} +- {spread:.3f}"
