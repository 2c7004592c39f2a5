"""`jaxmem synthesise`: training data for CoMEM from a model's own right answers."""

from __future__ import annotations

import json as json_lib
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxmem import config as configs
from jaxmem.training.synthesis.run import synthesise
from jaxmem.training.synthesis.settings import SynthesisConfig
from jaxmem.training.synthesis.writing import TRAIN


def main(*, config: ConfigDict, json: bool = False) -> int:
    """Runs a synthesis and prints what every step did.

    Args:
      config: of SynthesisConfig.
      json: print the manifest as one JSON object and nothing else.

    Raises:
      ConfigError, DataError: see `run.synthesise`.
    """
    settings = configs.build(SynthesisConfig, config, "config")
    found = synthesise(settings, report=_report)
    print(json_lib.dumps(found, ensure_ascii=False) if json else as_text(settings, found))
    return 0


def _report(step: str, done: int, total: int) -> None:
    """Progress, on standard error."""
    print(f"{done} of {total} {step}", file=sys.stderr, flush=True)


def as_text(config: SynthesisConfig, found: Mapping[str, Any]) -> str:
    """A line per count and a column per source."""
    mixture, counts = found["mixture"], found["counts"]
    names = list(counts)
    lines = [" " * 28 + "".join(f"{name:>16s}" for name in names)]
    lines += [_line(key, [mixture[name][key] for name in names]) for key in ("asked", "available", "reached")]
    lines += [_line(key.replace("_", " "), [counts[name][key] for name in names]) for key in counts[names[0]]]
    return "\n".join([*lines, f"{config.output}/{TRAIN}"])


def _line(label: str, values: list[int]) -> str:
    return f"{label:28s}" + "".join(f"{value:16,d}" for value in values)
