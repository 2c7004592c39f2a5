"""The report of a GRPO run, from what the run left in its folder: curves, facts, completions with their images, events.

Completions are a model's text and may say anything: they are escaped like every other text of the page. Files that are
missing, empty or cut short leave their part of the page empty.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmem.analysis import grpo_curves as curves
from jaxmem.analysis import invocations, invocations_cli
from jaxmem.analysis import report as html
from jaxmem.analysis.grpo_curves import History
from jaxmem.analysis.report import Charts, Table
from jaxmem.training import loop, metrics, record
from jaxmem.training.grpo_run import INVOCATIONS

REPORT = "report.html"
_LONGEST, _PROMPT = 4000, 500
_NONE = "–"
Rows = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt with its completions.

    Attributes:
      step, name, prompt: of the sample.
      picture: data URI of its image, or None; then `missing` says why there is none.
      columns: headings after the completion's.
      rows: (text, whether the limit cut it off, one cell per column).
    """

    step: int
    name: str
    prompt: str
    picture: str | None
    missing: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Links:
    """A table whose first column leads to other pages: rows of (address, name, cells)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """All that the template shows; None leaves a part out."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    table: Table
    charts: tuple[Charts, ...]
    facts: Rows
    details: tuple[tuple[str, Rows], ...] = ()
    links: Links | None = None
    samples_text: str = ""
    samples: tuple[Group, ...] | None = None
    events: tuple[tuple[str, ...], ...] | None = None

    def write(self, path: Path) -> Path:
        """Writes the page; the path."""
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return html.save(html.fill("grpo_report.html", shown), path)


def write(folder: str | Path) -> Path:
    """Writes `report.html` of the run in `folder`; its path."""
    folder = Path(folder)
    about, history = read_about(folder), read_history(folder)
    config = about.get("config") or {}
    return Page(
        title=f"GRPO: {config.get('output') or folder.name}",
        subtitle=time.strftime("%d %B %Y, %H:%M"),
        summary=summary(history),
        table=results(history),
        charts=(*curves.all_charts(history), *_invocations(folder)),
        facts=facts(history, config),
        details=(("Settings", html.flat(config)), ("Versions", html.flat(about.get("versions") or {}))),
        samples_text="Whole groups, as they were sampled in the first and the last steps that were written down. The"
        " advantage says how strongly, and in which direction, a completion pulls; it is relative to its group.",
        samples=groups(folder),
        events=events(folder),
    ).write(folder / REPORT)


def _invocations(folder: Path) -> tuple[Charts, ...]:
    """Where memories came in the last evaluation, of a run of VisMem."""
    if not (folder / INVOCATIONS).is_file():
        return ()
    found = invocations_cli.read(folder)
    text = "Share of the answers that call for a memory, over the place in the answer (last evaluation)."
    return (Charts("Invocations", (invocations.chart(found),), text),)


def read_about(folder: Path) -> dict[str, Any]:
    """The run's `run.json`; {} when it is missing or damaged."""
    try:
        about = json.loads((folder / record.FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics."""
    return [line for line in metrics.read(folder) if isinstance(line.get("step"), int)]


def summary(history: History) -> tuple[str, ...]:
    """What happened, in a sentence or two."""
    told = []
    if held_out := curves.ends(history, "eval/reward"):
        told.append(f"Held-out reward went from {held_out[0]:.3f} to {held_out[1]:.3f}.")
    if training := curves.ends(history, "reward"):
        steps, width = curves.values(history, "reward")[0], curves.window(history)
        told.append(
            f"Reward in training went from {training[0]:.3f} to {training[1]:.3f} in {len(steps)} steps"
            f" (means of the first and the last {width})."
        )
    return (" ".join(told) or "The run wrote down no reward.",)


def results(history: History) -> Table:
    """Start and end of the metrics that matter."""
    rows = []
    for name in curves.tabled(history):
        first, last = curves.ends(history, name) or (0.0, 0.0)
        rows.append((name, f"{first:.4g}", f"{last:.4g}"))
    notes = (f"Means over {curves.window(history)} steps at either end; eval/ is the first and the last evaluation.",)
    return Table(("metric", "start", "end"), tuple(rows), strong=(2,), notes=notes)


def facts(history: History, config: Mapping[str, Any]) -> Rows:
    """What ran, and how long it took."""
    method, loop_ = config.get("grpo") or {}, config.get("loop") or {}
    loss, judges = method.get("loss") or {}, (method.get("rewards") or {}).get("functions") or ()
    named = [judge.get("name", "?") if isinstance(judge, Mapping) else str(judge) for judge in judges]
    played = f"{loop_.get('batch_size')} prompts x {method.get('group')} completions of at most "
    found = {
        "backbone": config.get("backbone") or "the tiny backbone that jaxmem brings along",
        "memory": config.get("memory_folder") or (config.get("memory") or {}).get("name") or "none",
        "trained": _joined(config.get("trainable")),
        "a step": f"{played}{method.get('max_new_tokens')} tokens, temperature {method.get('temperature')}",
        "loss": f"{loss.get('kind')}, KL weight {loss.get('kl_weight')}",
        "rewards": ", ".join(named),
        "seed": str(config.get("seed")),
    }
    return (*(found.items() if config else ()), *timing(history, loop_, method))


def timing(history: History, loop_: Mapping[str, Any], method: Mapping[str, Any]) -> Rows:
    """Steps, their time and their speed; () where none is known."""
    seconds = curves.values(history, "step_time")[1]
    if not seconds:
        return ()
    usual = statistics.median(seconds)
    text = f"{len(seconds)}, {sum(seconds):.0f} s in all without evaluations, {usual:.3g} s each (median)"
    count = (loop_.get("batch_size") or 0) * (method.get("group") or 0)
    speed = (("speed", f"{count / usual:.3g} completions/s (median step)"),) if count and usual else ()
    return (("steps", text), *speed)


def groups(folder: Path) -> tuple[Group, ...]:
    """The samples of the first and of the last step that has some."""
    lines = [line for line in metrics.read(folder, loop.SAMPLES) if isinstance(line.get("step"), int)]
    ends = {line["step"] for line in (*lines[:1], *lines[-1:])}
    return tuple(_group(folder, line) for line in lines if line["step"] in ends)


def _group(folder: Path, line: Mapping[str, Any]) -> Group:
    completions = line.get("completions") or []
    labels = list(dict.fromkeys(label for one in completions for label in one.get("rewards") or {}))
    rows = []
    for one in completions:
        parts = [_number((one.get("rewards") or {}).get(label)) for label in labels]
        cells = (str(one.get("tokens", _NONE)), _number(one.get("reward")), *parts, _number(one.get("advantage"), "+"))
        rows.append((_shown(one.get("text")), bool(one.get("truncated")), cells))
    picture = thumbnail(folder, line.get("image"))
    missing = "" if picture else "image not found" if line.get("image") else "no image"
    columns = ("tokens", "reward", *labels, "advantage")
    prompt, name = _shown(line.get("prompt"), _PROMPT), str(line.get("name", ""))
    return Group(line["step"], name, prompt, picture, missing, columns, tuple(rows))


def thumbnail(folder: Path, name: Any) -> str | None:
    """An image of the run's folder as a data URI, drawn anew; None where there is none or it is no image."""
    path = (folder / str(name)).resolve()
    if not name or not path.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as picture:
            return html.png(np.asarray(picture.convert("RGB")))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def events(folder: Path) -> tuple[tuple[str, ...], ...]:
    """(name, how often, steps, what the last one said) of each kind of event."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in metrics.read(folder, loop.EVENTS):
        found.setdefault(str(line.get("event")), []).append(line)
    rows = []
    for name, lines in found.items():
        said = {key: value for key, value in lines[-1].items() if key not in ("step", "event")}
        detail = str(said["detail"]) if set(said) == {"detail"} else _joined([f"{k} {v}" for k, v in said.items()])
        rows.append((name, str(len(lines)), f"{lines[0].get('step')}, {lines[-1].get('step')}", _shown(detail)))
    return tuple(rows)


def _shown(text: Any, longest: int = _LONGEST) -> str:
    """A text, without its middle when it is very long."""
    text = "" if text is None else str(text)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"


def _number(value: Any, sign: str = "") -> str:
    return format(value, f"{sign}.3g") if isinstance(value, int | float) else _NONE


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
