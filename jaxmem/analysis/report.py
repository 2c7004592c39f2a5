"""The report of a run as one HTML file: no script, no network, pictures inside, every text of a model escaped."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import io
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from jaxmem.data.boards import CELL_PIXELS, CELLS, SIDE, Board

_PACKAGES = ("jax", "flax", "optax", "transformers", "numpy")
_CONTEXT = 40  # words of a prompt that are shown at either end
_UNPRINTABLE = {code: 0xFFFD for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
      columns: headings.
      rows: one text per column.
      strong: indices of the columns that matter.
      rules: indices of the rows with a line above them.
      notes: below the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[int, ...] = ()
    rules: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def show(table: Table, title: str | None = None, width: int = 120) -> None:
    """Prints a table; `width` is that of a file or a pipe."""
    from rich import box, console
    from rich import table as rich_table

    shown = rich_table.Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if not index else "right", style="bold" if index in table.strong else "")
    for index, row in enumerate(table.rows):
        shown.add_row(*row, end_section=index + 1 in table.rules)
    out = console.Console(highlight=False)
    out = out if out.is_terminal else console.Console(highlight=False, width=width)
    out.print(shown)
    for note in table.notes:
        out.print(note, markup=False)


@dataclasses.dataclass(frozen=True)
class Charts:
    """A section of charts (SVG text, see `jaxmem.analysis.svg`) under a title and a sentence."""

    title: str
    charts: tuple[str, ...]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A board and what was written about it: (name, text) per answer, e.g. ("memory off", "C7=7 ...")."""

    board: Board
    answers: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a report shows, top to bottom; the fields are plain text except where a class says otherwise."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    table: Table
    charts: tuple[Charts, ...]
    boards_text: str
    samples: tuple[Sample, ...]
    facts: tuple[tuple[str, str], ...]
    details: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


def render(report: Report) -> str:
    """The report as HTML."""
    shown = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return fill("report.html", {**shown, "boards": [_board(sample) for sample in report.samples]})


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of `assets/` with its values, all escaped but the SVG of `values["charts"]`, which are Charts.

    Control characters become U+FFFD.
    """
    assets = importlib.resources.files("jaxmem").joinpath("assets")
    loader = jinja2.FunctionLoader(lambda name: assets.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    sections = [{"title": s.title, "text": s.text, "charts": list(map(Markup, s.charts))} for s in values["charts"]]
    return environment.get_template(template).render({**values, "charts": sections}).translate(_UNPRINTABLE)


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the report to a file, which is either whole or untouched."""
    return save(render(report), path)


def save(html: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page to a file, which is either whole or untouched; half a surrogate pair becomes "?"."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="replace", dir=path.parent, delete=False) as file:
        file.write(html)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def _board(sample: Sample) -> dict[str, Any]:
    """What the template needs of a sample."""
    board = sample.board
    return {
        "picture": Markup(board_picture(board)),
        "between": _between(board.words),
        "question": board.prompt.rpartition("\n")[2],
        "expected": board.answer,
        "answers": [(name, compare(text, board.answer)) for name, text in sample.answers],
    }


def _between(words: Sequence[str]) -> str:
    """The filler words, shortened in the middle."""
    if not words:
        return "no words"
    shown = words if len(words) <= 2 * _CONTEXT else (*words[:_CONTEXT], "…", *words[-_CONTEXT:])
    return f"{len(words)} words: {' '.join(shown)}"


def compare(text: str, expected: str) -> list[tuple[str, str]]:
    """Pieces (text, class) of an answer, character by character against the expected one.

    Digits that agree are "right"; characters that differ or are too many are "wrong"; what agrees otherwise, and has
    nothing to read in it, is "".
    """
    pieces: list[tuple[str, str]] = []
    for place, character in enumerate(text):
        same = place < len(expected) and expected[place] == character
        kind = "wrong" if not same else "right" if character.isdigit() else ""
        if pieces and pieces[-1][1] == kind:
            pieces[-1] = (pieces[-1][0] + character, kind)
        else:
            pieces.append((character, kind))
    return pieces


def png(image: np.ndarray) -> str:
    """An image [H, W, 3] uint8 as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).convert("L" if _is_grey(image) else "RGB").save(
        buffer, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_grey(image: np.ndarray) -> bool:
    return bool((image == image[..., :1]).all())


def board_picture(board: Board) -> str:
    """The board as an <svg>: its image, the cells' names, and frames around the cells asked for."""
    size = SIDE * CELL_PIXELS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" role="img" aria-label="digit board">',
        f'<image href="{png(board.image)}" width="{size}" height="{size}" style="image-rendering:pixelated"/>',
    ]
    for cell, name in enumerate(CELLS):
        x, y = cell % SIDE * CELL_PIXELS, cell // SIDE * CELL_PIXELS
        asked = cell in board.cells
        colour = "#ffd166" if asked else "#9aa0a6"
        parts.append(
            f'<text x="{x + 2.5}" y="{y + 8.5}" font-size="7" font-family="system-ui,sans-serif" fill="{colour}">'
            f"{name}</text>"
        )
        if asked:
            side = CELL_PIXELS - 1.5
            parts.append(
                f'<rect x="{x + 0.75}" y="{y + 0.75}" width="{side}" height="{side}" rx="2" fill="none"'
                f' stroke="{colour}" stroke-width="1.5"/>'
            )
    return "".join([*parts, "</svg>"])


def versions() -> tuple[tuple[str, str], ...]:
    """Of jaxmem, Python and the packages that numbers depend on."""
    import jaxmem

    packages = [(name, _version(name)) for name in _PACKAGES]
    return (("jaxmem", jaxmem.__version__), ("Python", platform.python_version()), *packages)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def flat(settings: Mapping[str, Any], prefix: str = "") -> tuple[tuple[str, str], ...]:
    """(dotted key, value) of every value of nested mappings, as text."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return tuple(rows)
