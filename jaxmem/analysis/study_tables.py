"""The tables of a study: for the terminal, for the report and as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from jaxmem.analysis.report import Table
from jaxmem.analysis.study_results import Results
from jaxmem.evaluation.conditions import Condition
from jaxmem.evaluation.pooling import Pooled

_NONE = "–"


def shares(results: Results, name: str, cells: int, conditions: Sequence[Condition]) -> Table:
    """One share, arms by conditions: mean ± spread over seeds."""
    columns = ("arm", "seeds", "n", *(_heading(condition) for condition in conditions))
    rows = []
    for arm, result in results.arms.items():
        found = [results.share(arm, name, condition, cells) for condition in conditions]
        if any(found):
            seeds = max(one.seeds for one in found if one)
            rows.append((result.title, str(seeds), _counts(found), *(show(one) for one in found)))
    return Table(columns, tuple(rows))


def masses(results: Results) -> Table:
    """The image's share of the backbone's attention by layer, for arms where it was looked at."""
    rows = []
    conditions = [c for c in results.conditions() if any(results.each(arm, "mass", c) for arm in results.arms)]
    for arm, result in results.arms.items():
        found = [results.each(arm, "mass", condition) for condition in conditions]
        for layer in range(max(map(len, found), default=0)):
            rows.append(
                (f"{result.title}, layer {layer}", *(f"{one[layer].mean:.4f}" if one else _NONE for one in found))
            )
    return Table(("attention", *(_heading(condition) for condition in conditions)), tuple(rows))


def by_place(results: Results, cells: int) -> Table:
    """Long answers of one's own: what is read at the first places and at the last, k=0."""
    parts = _parts(cells)
    columns = ("arm", "n", "exact", *(f"read, places {a + 1}–{b}" for a, b in parts),
               *(f"named read, places {a + 1}–{b}" for a, b in parts))  # fmt: skip
    rows, condition = [], Condition(0)
    for arm, result in results.arms.items():
        exact = results.share(arm, "exact", condition, cells)
        if exact is None:
            continue
        fields = [results.each(arm, name, condition, cells) for name in ("read_by_place", "named_read_by_place")]
        values = [_part(places, part) for places in fields for part in parts]
        rows.append((result.title, f"{exact.boards:,}", show(exact), *values))
    return Table(columns, tuple(rows))


def costs(results: Results) -> Table:
    """What trained, for how long."""
    rows = []
    for result in results.arms.values():
        if result.trained:
            one = next(iter(result.trained.values()))
            seconds = sum(run.seconds for run in result.trained.values()) / len(result.trained)
            rows.append((result.title, f"{one.parameters:,}", str(one.steps), f"{seconds:.0f} s"))
    return Table(("arm", "parameters", "steps", "training per seed"), tuple(rows))


def chosen(results: Results) -> Table:
    """The trials of variants."""
    rows = [
        (
            results.arms[arm].title,
            variant,
            f"{score:.3f}",
            f"{choice.boards}",
            "chosen" if variant == choice.variant else "",
        )
        for arm, choice in results.choices.items()
        for variant, score in choice.scores.items()
    ]
    by = "/".join(sorted({choice.by for choice in results.choices.values()}))
    return Table(("arm", "variant", f"{by} on validation boards", "n", ""), tuple(rows))


def show(one: Pooled | None) -> str:
    """A share: mean ± spread over seeds; without a spread for one seed."""
    if one is None:
        return _NONE
    return f"{one.mean:.3f} ± {one.spread:.3f}" if one.seeds > 1 else f"{one.mean:.3f}"


def markdown(table: Table) -> str:
    """A Markdown table, with notes under it."""
    line = lambda row: f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"  # noqa: E731
    rule = f"|{'---|' * len(table.columns)}"
    return "\n".join([line(table.columns), rule, *map(line, table.rows), *("\n" + note for note in table.notes)])


def html(table: Table) -> str:
    """A table as HTML, every text escaped."""
    line: Callable[[Sequence[str], str], str] = lambda row, tag: (  # noqa: E731
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
    )
    rows = [line(table.columns, "th"), *(line(row, "td") for row in table.rows)]
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in table.notes)
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>{notes}'


def machine() -> str:
    """Cores and the processor's name, where the system tells."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = names[0] if names else name
    return f"{cores} cores, {name}"


def _heading(condition: Condition) -> str:
    kinds = {
        "plain": f"k={condition.k}",
        "stretched": f"{condition.k} words, {condition.span} positions skipped",
        "packed": f"{condition.k} words over {condition.span} positions",
    }
    return kinds[condition.positions] + (", image hidden" if condition.blind else "")


def _counts(found: Sequence[Pooled | None]) -> str:
    counts = sorted({one.boards for one in found if one})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"


def _parts(cells: int) -> list[tuple[int, int]]:
    """Quarters of an answer's places."""
    size = max(1, -(-cells // 4))
    return [(start, min(start + size, cells)) for start in range(0, cells, size)]


def _part(places: Sequence[Pooled], part: tuple[int, int]) -> str:
    """The mean of a field over some places."""
    inside = places[slice(*part)]
    return f"{sum(one.mean for one in inside) / len(inside):.3f}" if inside else _NONE
