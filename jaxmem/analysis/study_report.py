"""What a study leaves for readers: tables on the terminal, `study.json`, `study.md` and `report.html`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from jaxmem.analysis import report as html
from jaxmem.analysis import study_tables as tables
from jaxmem.analysis.report import Charts, Report, Sample, Table
from jaxmem.analysis.study_charts import charts
from jaxmem.analysis.study_claims import Claim, claims
from jaxmem.analysis.study_results import Results
from jaxmem.analysis.study_settings import Study
from jaxmem.evaluation.conditions import Condition

JSON, MARKDOWN, REPORT = "study.json", "study.md", "report.html"
_MEANING = (
    "± is the standard deviation between seeds; n is the number of boards of all seeds together; chance is 0.10. Read:"
    " the digit is the most likely token where it stands in the true answer. Exact: the final sum of a freely written"
    " answer. k: words between image and question."
)
_PLACES = (
    "Reads by their place in the answer: with the true text in front (read), and in the model's own writing, where an"
    " entry counts as read when its digit is right for the cell that it names (named read). Exact wants the whole"
    " answer's last sum; a tiny backbone that learnt short answers rarely writes a long one to its end."
)


@dataclasses.dataclass(frozen=True)
class Page:
    """All that readers get: (title, table) in order, the sentences, and facts about the run."""

    tables: tuple[tuple[str, Table], ...]
    claims: tuple[Claim, ...]
    facts: tuple[tuple[str, str], ...]


def publish(study: Study, results: Results, folder: Path, seconds: float, last: float) -> None:
    """Prints the tables and sentences, and writes the files.

    Args:
      study: what was asked.
      results: what came out.
      folder: of the files.
      seconds: of all starts of the command together.
      last: of this start.
    """
    page = Page(_tables(results), claims(results, study.config), _facts(study, results, seconds, last))
    for title, table in page.tables:
        html.show(table, title, width=160)
    for one in page.claims:
        print(f"- {one}")
    (folder / JSON).write_text(json.dumps(as_json(study, results, page), indent=1) + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(as_markdown(page), encoding="utf-8")
    html.write(as_report(study, results, page), folder / REPORT)
    for name, value in page.facts:
        print(f"{name}: {value}")
    print(f"results: {folder / MARKDOWN}, {folder / JSON}, {folder / REPORT}")


def as_markdown(page: Page) -> str:
    """The tables and sentences for a README."""
    parts = [f"**{title}**\n\n{tables.markdown(table)}" for title, table in page.tables]
    sentences = "\n".join(
        f"- {one.claim}: **{one.verdict}**{', ' if one.numbers else ''}{one.numbers}." for one in page.claims
    )
    facts = "\n".join(f"- {name}: {value}" for name, value in page.facts)
    return "\n\n".join([*parts, "**Claims**\n\n" + sentences, "**How**\n\n" + facts]) + "\n"


def as_json(study: Study, results: Results, page: Page) -> dict[str, Any]:
    """Everything as numbers."""
    arms = {}
    for name, result in results.arms.items():
        cells = sorted({row.test.cells for row in study.tests.values()})
        rows = [_row(results, name, condition, count) for count in cells for condition in results.conditions(count)]
        arms[name] = {
            "title": result.title,
            "seeds": list(result.seeds),
            "trained": {str(seed): dataclasses.asdict(one) for seed, one in result.trained.items()},
            "results": [row for row in rows if row is not None],
        }
    return {
        **{name.replace(" ", "_"): value for name, value in page.facts},
        "arms": arms,
        "choices": {name: dataclasses.asdict(choice) for name, choice in results.choices.items()},
        "claims": [dataclasses.asdict(one) for one in page.claims],
    }


def _row(results: Results, arm: str, condition: Condition, cells: int) -> dict[str, Any] | None:
    """A condition of an arm, pooled, and the shares of single seeds."""
    found = results.arms[arm].readings(condition, cells)
    if not found:
        return None
    names, lists = ("read", "exact", "free_read", "named_read"), ("read_by_place", "named_read_by_place", "mass")
    shares = {name: dataclasses.asdict(results.share(arm, name, condition, cells)) for name in names}  # pyrefly: ignore[bad-argument-type]
    several = {name: [one.mean for one in results.each(arm, name, condition, cells)] for name in lists}
    seeds = {name: [getattr(row, name) for row in found] for name in ("read", "exact")}
    about = {"k": condition.k, "blind": condition.blind, "span": condition.span, "cells": cells}
    return {**about, **shares, **several, "by_seed": seeds, "seconds": sum(row.seconds for row in found)}


def as_report(study: Study, results: Results, page: Page) -> Report:
    """The page for a browser."""
    first, *others = page.tables
    sections = tuple(Charts(title, (tables.html(table),)) for title, table in others)
    samples = _samples(study, results)
    return Report(
        title=f"Digit boards: a study of {len(results.arms)} arms",
        subtitle=time.strftime("%d %B %Y, %H:%M"),
        summary=tuple(str(one) for one in page.claims),
        table=first[1],
        charts=(*charts(results), *sections),
        boards_text="Test boards with what the models of the first seed wrote, greedily, at the longest common k.",
        samples=samples,
        facts=page.facts,
        details=(("Settings", html.flat(dataclasses.asdict(study.config))), ("Versions", html.versions())),
    )


def _tables(results: Results) -> tuple[tuple[str, Table], ...]:
    """All tables that have rows."""
    conditions = results.conditions()
    seeing = [c for c in conditions if c.positions == "plain"]
    controls = [c for c in conditions if c.positions != "plain"]
    read = dataclasses.replace(tables.shares(results, "read", 4, seeing), notes=(_MEANING,))
    found = [
        ("Digits read", read),
        ("Exact answers", tables.shares(results, "exact", 4, seeing)),
        ("Controls: far positions without words, many words on near positions (digits read)",
         tables.shares(results, "read", 4, controls)),
        ("Attention on the image by layer", tables.masses(results)),
    ]  # fmt: skip
    for cells in sorted(_cells(results) - {4}):
        table = dataclasses.replace(tables.by_place(results, cells), notes=(_PLACES,))
        found.append((f"Long text of one's own: {cells} cells, k=0", table))
    found += [("Trials of variants", tables.chosen(results)), ("What trained", tables.costs(results))]
    return tuple((title, table) for title, table in found if table.rows)


def _cells(results: Results) -> set[int]:
    """Numbers of cells that were asked for."""
    arms = results.arms.values()
    rows = (row for arm in arms for test in arm.tests.values() for readings in test.values() for row in readings)
    return {len(row.read_by_place) for row in rows}


def _facts(study: Study, results: Results, seconds: float, last: float) -> tuple[tuple[str, str], ...]:
    tested = sum(
        row.seconds
        for arm in results.arms.values()
        for test in arm.tests.values()
        for readings in test.values()
        for row in readings
    )
    trained = sum(run.seconds for arm in results.arms.values() for run in arm.trained.values())
    again = "" if seconds - last < 1 else f" (in several starts; the last took {last / 60:.1f})"
    return (
        ("command", shlex.join(["jaxmem", *sys.argv[1:]])),
        ("machine", tables.machine()),
        ("seeds", ", ".join(map(str, study.config.seeds))),
        ("wall time", f"{seconds / 60:.1f} minutes{again}, {study.config.workers} workers"),
        ("of which", f"training {trained / 60:.1f} and testing {tested / 60:.1f} minutes, summed over workers"),
    )


def _samples(study: Study, results: Results, count: int = 2) -> tuple[Sample, ...]:
    """Some boards of the longest length that the first two arms share, with the answers of all arms that saw them."""
    for key, exam in study.tests.items():
        sat = [(arm.title, arm.tests[key]) for arm in results.arms.values() if key in arm.tests]
        if len(sat) < 2 or exam.test.cells != 4:
            continue
        ((_, first), *_), seed = sat, next(iter(sat[0][1]))
        place = max(
            range(len(first[seed])), key=lambda i: (first[seed][i].condition.positions == "plain", first[seed][i].k)
        )
        test = study.limited(exam.test, seed)
        boards = test.dataset(first[seed][place].k)
        return tuple(
            Sample(
                boards[index],
                tuple((title, rows[seed][place].answers[index]) for title, rows in sat if seed in rows),
            )
            for index in range(min(count, len(boards)))
        )
    return ()
