"""`jaxmem invocations RUN`: where a trained VisMem called for memory in the run's last evaluation."""

from __future__ import annotations

import json as json_lib
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.analysis.invocations import TYPES, Invocations, chart, measure
from jaxmem.errors import DataError
from jaxmem.sampling.slots import Slot
from jaxmem.training.grpo_run import INVOCATIONS

CHART = "invocations.svg"


def main(*, run: str, json: bool) -> int:
    """Prints shares, counts and places by type, and draws the paper's Figure 5 to `RUN/invocations.svg`.

    Args:
      run: folder of a run of VisMem that was evaluated.
      json: one JSON object and nothing else.

    Raises:
      DataError: the folder holds no record of invocations.
    """
    found = read(run)
    if json:
        print(json_lib.dumps(as_json(found)))
        return 0
    print(as_text(found))
    path = Path(run) / CHART
    path.write_text(chart(found), encoding="utf-8")
    print(f"chart: {path}")
    return 0


def read(run: str | Path) -> Invocations:
    """The invocations of a run's last evaluation; DataError when there is no such record."""
    path = Path(run) / INVOCATIONS
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run with a section grpo.vismem and an evaluation writes it")
    try:
        with np.load(path) as kept:
            kinds, types, lengths = kept["kinds"], kept["types"], kept["lengths"]
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{path}: not a record of invocations ({error}); train again") from error
    return measure(kinds, types, lengths, text=(Slot.TEXT,), invoke=(Slot.FORCED, Slot.INVOKE))


def as_json(found: Invocations) -> dict[str, Any]:
    """Everything by type, NaN as null."""
    number = lambda value: None if np.isnan(value) else float(value)  # noqa: E731
    by_type = {
        name: {
            "invoking": number(found.invoking[kind]),
            "per_sample": number(found.per_sample[kind]),
            "mean_place": number(found.mean_place[kind]),
            "ratio_by_place": [number(value) for value in found.ratios[kind]],
        }
        for kind, name in enumerate(TYPES)
    }
    return {"samples": found.samples, "invoking": found.either / max(found.samples, 1), **by_type}


def as_text(found: Invocations) -> str:
    """A table of one line per type."""
    lines = [f"{found.samples} answers, {found.either / max(found.samples, 1):.3f} of them with a memory"]
    lines.append(f"{'type':8s}{'share':>10s}{'per answer':>14s}{'mean place':>14s}")
    for kind, name in enumerate(TYPES):
        place = "–" if np.isnan(found.mean_place[kind]) else f"{found.mean_place[kind]:.1f} %"
        lines.append(f"{name:8s}{found.invoking[kind]:10.3f}{found.per_sample[kind]:14.3f}{place:>14s}")
    return "\n".join(lines)
