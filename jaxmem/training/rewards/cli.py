"""`jaxmem reward FILE.jsonl --function=NAME`: what reward functions give for written completions."""

from __future__ import annotations

import json as json_lib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem import config as configs
from jaxmem.errors import ConfigError, DataError
from jaxmem.training.rewards.runner import RewardRunner
from jaxmem.training.rewards.scored import Scored
from jaxmem.training.rewards.settings import RewardConfig

_NOT_COLUMNS = ("prompt", "messages", "completion", "completion_ids")


def main(*, file: str, function: Sequence[str], timeout: float, json: bool) -> int:
    """Tests the functions, scores every line and prints a table or one JSON object.

    Args:
      file: JSON lines, each {"completion": text, "prompt" or "messages": the question, columns...}.
      function: names, import paths, or JSON objects such as {"name": "exact", "column": "solution"}.
      timeout: seconds per completion.
      json: print {"rows": [...], "metrics": {...}, "messages": [...]}; NaN is null.

    Returns:
      1 when a function failed on some completion, else 0.
    """
    if not function:
        raise ConfigError("reward needs --function=NAME, once or more; for example --function=math")
    sections = tuple(_section(word) for word in function)
    config = configs.build(RewardConfig, {"functions": sections, "timeout_s": timeout}, "reward")
    rows = read(file)
    names = [name for name in rows[0] if name not in _NOT_COLUMNS]
    prompts = [row.get("prompt", row.get("messages")) for row in rows]
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p or [] for p in prompts]
    with RewardRunner(config, {name: rows[0][name] for name in names}, prompts[0]) as rewards:
        columns = {name: [row[name] for row in rows] for name in names}
        ids = [row.get("completion_ids", []) for row in rows]
        scored = rewards(prompts, [row["completion"] for row in rows], ids, columns)
    print(as_json(scored) if json else as_text(scored, rows))
    return 1 if scored.messages else 0


def _section(word: str) -> Mapping[str, Any] | str:
    """A name as it is; a JSON object as a mapping."""
    if not word.startswith("{"):
        return word
    try:
        return json_lib.loads(word)
    except ValueError as error:
        raise ConfigError(f"--function={word}: not JSON: {error}") from error


def read(file: str) -> list[dict[str, Any]]:
    """The lines of a file; DataError naming the line that is no record or whose columns differ from the first's."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_record(line, f"{file}:{number}"))
            missing = rows[0].keys() - rows[-1].keys()
            if missing:
                raise DataError(f"{file}:{number}: lacks {', '.join(sorted(missing))}, which the first line has")
    if not rows:
        raise DataError(f'{file} is empty; it should have one {{"completion": ..., columns}} per line')
    return rows


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json_lib.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("completion"), str):
        raise DataError(f'{where}: a record is {{"completion": "text", ...}}')
    return record


def as_json(scored: Scored) -> str:
    """One JSON object."""
    rows = [
        {label: None if np.isnan(v) else float(v) for label, v in zip(scored.labels, row, strict=True)}
        for row in scored.values
    ]
    return json_lib.dumps({"rows": rows, "metrics": scored.metrics(), "messages": scored.messages})


def as_text(scored: Scored, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per completion, then the means and the failures."""
    widths = [max(8, len(label)) for label in scored.labels]

    def line(cells: Sequence[str], text: str) -> str:
        return "  ".join([*(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), text])

    metrics = scored.metrics()
    means = [metrics.get(f"rewards/{label}/mean", float("nan")) for label in scored.labels]
    table = [line(scored.labels, "completion")]
    for values, row in zip(scored.values, rows, strict=True):
        words = " ".join(row["completion"].split())
        table.append(line([_cell(v) for v in values], words if len(words) <= 60 else f"{words[:28]} ... {words[-27:]}"))
    return "\n".join([*table, line([_cell(v) for v in means], "mean"), *scored.messages])


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
