"""What the digit-board experiment shows: its table, its charts, and the page that holds them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmem.analysis import report as html
from jaxmem.analysis.report import Charts, Report, Sample, Table
from jaxmem.analysis.svg import Axis, Line, line_chart, smoothed
from jaxmem.api import Model
from jaxmem.evaluation.boards import Reading
from jaxmem.evaluation.conditions import BoardTest, Condition

_OFF, _ON = 1, 0  # colours of svg.COLOURS: orange without, blue with memory
Readings = Sequence[Reading]


def results_table(off: Readings, on: Readings, notes: tuple[str, ...] = ()) -> Table:
    """Reading and exact answers, without and with memory, one row per length."""
    columns = ("words between", "read, off", "read, on", "exact, off", "exact, on", "attention on image, off")
    rows, rules = [], []
    for index, (a, b) in enumerate(zip(off, on, strict=True)):
        if a.blind and (not index or not off[index - 1].blind):
            rules.append(index)
        cells = [_share(r.read, r.read_error) for r in (a, b)] + [_share(r.exact, r.exact_error) for r in (a, b)]
        rows.append((a.condition.label, *cells, " / ".join(f"{m:.3f}" for m in a.mass)))
    first = off[0]
    notes = (
        f"{first.boards} boards of unseen digits per row; ± is one standard error; chance is 0.10. Read: the digit is"
        " the most likely token where it stands in the true answer. Exact: the final sum of a freely written answer."
        " Attention: share of the backbone's attention on the image where a digit is read, by layer.",
        *(("* The backbone's text cannot see the image at all; only the memory can.",) if rules else ()),
        *notes,
    )
    return Table(columns, tuple(rows), strong=(2, 4), rules=tuple(rules), notes=notes)


def accuracy_charts(off: Readings, on: Readings) -> Charts:
    """Read and exact against the number of words, off and on."""
    off, on = _seeing(off), _seeing(on)
    ticks = tuple(float(r.k) for r in off)

    def chart(name: str, title: str) -> str:
        lines = [
            Line(
                f"memory {word}",
                [r.k for r in rows],
                [getattr(r, name) for r in rows],
                [getattr(r, f"{name}_error") for r in rows],
                colour=colour,
                marks=True,
            )
            for word, rows, colour in (("off", off, _OFF), ("on", on, _ON))
        ]
        x = Axis("words between image and question", ticks=ticks)
        return line_chart(lines, title=title, x=x, y=Axis("share", 0, 1.02, ticks=(0, 0.25, 0.5, 0.75, 1)))

    charts = (chart("read", "Digits read"), chart("exact", "Final answers exact"))
    return Charts("Accuracy by length", charts, "Bars are one standard error.")


def mass_charts(off: Readings, on: Readings) -> Charts:
    """The image's attention mass per layer against the number of words."""

    def chart(rows: Readings, title: str) -> str:
        rows = _seeing(rows)
        lines = [
            Line(f"layer {layer}", [r.k for r in rows], [r.mass[layer] for r in rows], colour=layer + 2, marks=True)
            for layer in range(len(rows[0].mass))
        ]
        high = max([0.05, *(m for r in (*off, *on) for m in r.mass)]) * 1.05
        x = Axis("words between image and question", ticks=tuple(float(r.k) for r in rows))
        return line_chart(lines, title=title, x=x, y=Axis("attention on the image", 0, high))

    text = (
        "The softmax of the backbone shares one unit of attention among all tokens: the more text there is, the less is"
        " left for the image. A memory does not change this; it asks the image through a softmax of its own."
    )
    return Charts("Attention mass on the image", (chart(off, "Memory off"), chart(on, "Memory on")), text)


def training_charts(history: Sequence[Mapping[str, Any]], smooth: int = 15) -> Charts:
    """Gates and loss over the steps of a run's metrics."""
    rows = [row for row in history if row.get("loss") is not None]
    steps, loss = [row["step"] for row in rows], [row["loss"] for row in rows]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("gate/")]
    gates = [
        Line(
            name.removeprefix("gate/").replace("_", " "), steps, [_number(row.get(name)) for row in rows], colour=i + 2
        )
        for i, name in enumerate(names)
    ]
    shown = smoothed(loss, smooth)
    lines = [Line("each step", steps, loss, colour=7, faint=True), Line(f"mean of {smooth}", steps, shown, colour=0)]
    return Charts(
        "Training",
        (
            line_chart(gates, title="Gates", x=Axis("step", 0), y=Axis("gate")),
            line_chart(lines, title="Loss", x=Axis("step", 0), y=Axis("loss per answer token", log=True)),
        ),
        "Gates start at zero, where the model is its backbone; |gate| is the size (RMS) of what the memory injects.",
    )


def page(
    test: BoardTest,
    shown: int,
    table: Table,
    off: Readings,
    on: Readings,
    history: Sequence[Mapping[str, Any]],
    facts: tuple[tuple[str, str], ...],
    config: Mapping[str, Any],
) -> Report:
    """All of the above on one page.

    Args:
      test: what was evaluated.
      shown: boards on the page.
      table: from `results_table`.
      off, on: results without and with memory.
      history: the run's metrics by step.
      facts: see `facts`.
      config: nested settings of the run.
    """
    pairs = sorted(zip(_seeing(off), _seeing(on), strict=True), key=lambda pair: pair[0].k)
    (c, d), (a, b) = pairs[0], pairs[-1]
    return Report(
        title="Digit boards: a visual memory on a frozen model",
        subtitle=time.strftime("%d %B %Y, %H:%M"),
        summary=(
            "A tiny model of the Qwen3-VL architecture reads handwritten digits from a 4×4 board and adds them up. The"
            " question comes k neutral words after the image. The backbone sees well when the image is near and loses"
            " sight of it as the text grows; its weights stay frozen while a memory beside them is trained.",
            f"At {a.k} words the backbone reads {a.read:.1%} of the digits; with the memory it reads {b.read:.1%},"
            f" and exact final answers go from {a.exact:.1%} to {b.exact:.1%}."
            f" At {c.k} words it reads {c.read:.1%} without and {d.read:.1%} with the memory; exact answers are"
            f" {c.exact:.1%} and {d.exact:.1%}.",
        ),
        table=table,
        charts=(accuracy_charts(off, on), mass_charts(off, on), training_charts(history)),
        boards_text="Test boards with what the model wrote, greedily. The cells asked for are framed; in each entry,"
        " such as C7=7, the cell's letter is followed by its digit and the sum so far, modulo 10.",
        samples=_samples(test, shown, off, on),
        facts=facts,
        details=(("Settings", html.flat(config)), ("Versions", html.versions())),
    )


def facts(
    model: Model, history: Sequence[Mapping[str, Any]], off: Readings, on: Readings
) -> tuple[tuple[str, str], ...]:
    """What ran, and how long it took."""
    base, memory = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model.base, model.memory))
    names = ", ".join(f"{config.name} in layers {list(config.layers)}" for config in model.spec.memories)
    training = sum(row.get("seconds") or 0.0 for row in history)
    before, after = (sum(row.seconds for row in rows) for rows in (off, on))
    return (
        ("backbone", f"{model.folder.name}, {base:,} parameters, frozen"),
        ("memory", f"{names}: {memory:,} trained parameters ({memory / base:.1%} of the backbone)"),
        ("time", f"evaluation {before:.0f} s, training {training:.0f} s, evaluation {after:.0f} s"),
        ("device", f"{jax.default_backend()}: {jax.devices()[0].device_kind}, {os.cpu_count()} cores"),
    )


def _samples(test: BoardTest, shown: int, off: Readings, on: Readings) -> tuple[Sample, ...]:
    """Boards of all lengths in turn."""
    off, on, samples = _seeing(off), _seeing(on), []
    for place in range(shown):
        row, index = place % len(off), place // len(off)
        if index < off[row].boards:
            board = test.dataset(off[row].k)[index]
            answers = (("memory off", off[row].answers[index]), ("memory on", on[row].answers[index]))
            samples.append(Sample(board, answers))
    return tuple(samples)


def _seeing(rows: Readings) -> list[Reading]:
    """The results without blindfold or moved positions (all, if there are no others)."""
    return [row for row in rows if row.condition == Condition(row.k)] or list(rows)


def _share(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
