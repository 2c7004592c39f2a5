"""Line charts as SVG text: no plotting library, no script, readable on light and on dark ground.

Text takes the colour of the page around it; lines have colours of middle lightness. Every text is escaped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape

COLOURS = ("#3b82f6", "#ea7317", "#2f9e6e", "#a463f2", "#c58a00", "#e0457b", "#17a2b8", "#8a8f98")
"""Blue, orange, green, violet, ochre, pink, teal, grey."""
MOST_POINTS = 400
"""Longer lines are thinned to about this many points."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      name: in the legend; an empty name has no entry there.
      x, y: the points; points that are not finite are left out.
      error: half the height of each point's error bar; () for none.
      colour: index into COLOURS.
      dashed: dashed instead of solid.
      faint: thin and pale, for raw values behind a smoothed line.
      marks: dots at the points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    colour: int = 0
    dashed: bool = False
    faint: bool = False
    marks: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      label: under or beside it.
      low, high: its range; None takes the data's.
      log: logarithmic, for positive values.
      ticks: where its numbers stand; () chooses round ones.
    """

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    ticks: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Maps values low..high onto pixels start..stop."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        warp = math.log10 if self.log else float
        low, high = warp(self.low), warp(self.high)
        share = (warp(max(value, self.low)) - low) / ((high - low) or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)


def line_chart(
    lines: Sequence[Line], *, title: str = "", x: Axis = Axis(), y: Axis = Axis(), width: int = 440, height: int = 280
) -> str:
    """A chart of lines as one <svg> element.

    Args:
      lines: what is drawn, later ones on top.
      title: above the chart; also its accessible name.
      x, y: the axes.
      width, height: in pixels; the drawing scales down with its container.
    """
    lines = [_thinned(_finite(line, y.log)) for line in lines]
    left, right, top, bottom = 58, width - 14, 52, height - 42
    across = _scale([value for line in lines for value in line.x], x, left, right, 0.0)
    tops = [v + e for line in lines for v, e in zip(line.y, line.error or [0.0] * len(line.y), strict=True)]
    up = _scale([*tops, *(v for line in lines for v in line.y)], y, bottom, top, 0.05)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' width="{width}" height="{height}" style="max-width:100%;height:auto"'
        f' font-family="system-ui,sans-serif" font-size="12" aria-label="{escape(title)}">',
        f'<text x="{left}" y="16" font-size="14" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *_grid(across, up, x, y),
        *(part for line in lines for part in _line(line, across, up)),
        *_legend([line for line in lines if line.name], left),
        _label(x.label, (left + right) / 2, height - 6),
        _label(y.label, 14, (top + bottom) / 2, turned=True),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    total = [0.0, *itertools.accumulate(values)]
    starts = [max(0, end - window) for end in range(1, len(total))]
    return [(total[end] - total[start]) / (end - start) for end, start in enumerate(starts, 1)]


def _finite(line: Line, positive: bool) -> Line:
    """The line without points that cannot be drawn."""
    errors = list(line.error) or [0.0] * len(line.x)
    points = [
        (float(a), float(b), float(e))
        for a, b, e in zip(line.x, line.y, errors, strict=True)
        if math.isfinite(a) and math.isfinite(b) and (b > 0 or not positive)
    ]
    xs, ys, es = zip(*points, strict=True) if points else ((), (), ())
    return dataclasses.replace(line, x=xs, y=ys, error=es if line.error else ())


def _thinned(line: Line) -> Line:
    """Every so-manyth point of a long line, and its last."""
    step = -(-len(line.x) // MOST_POINTS)
    if step <= 1:
        return line
    keep = sorted({*range(0, len(line.x), step), len(line.x) - 1})
    pick = lambda values: [values[i] for i in keep] if values else ()  # noqa: E731
    return dataclasses.replace(line, x=pick(line.x), y=pick(line.y), error=pick(line.error))


def _scale(values: Sequence[float], axis: Axis, start: float, stop: float, margin: float) -> _Scale:
    """The scale of an axis: its own range where it has one, else the data's with a margin."""
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    room = margin * (high - low) if high > low and not axis.log else 0.0
    low = low - room if axis.low is None else axis.low
    high = high + room if axis.high is None else axis.high
    if axis.log:
        low = max(low, 1e-12)
        return _Scale(low, max(high, low * 2), start, stop, True)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return _Scale(low, high, start, stop, False)


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers within low..high: about `count` of them, or, when `log`, the powers of ten (with
    their doubles and halves where these are few)."""
    if log:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9) + 1)
        inside = lambda values: [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]  # noqa: E731
        tens = inside(10.0**p for p in powers)
        return tens if len(tens) > 2 else inside(m * 10.0**p for p in powers for m in (1, 2, 5))
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    """Horizontal lines with their numbers, numbers under the chart, and its ground line."""
    parts = []
    for value in y.ticks or ticks(up.low, up.high, up.log):
        level = up(value)
        parts.append(
            f'<line x1="{across.start:.1f}" x2="{across.stop:.1f}" y1="{level:.1f}" y2="{level:.1f}"'
            ' stroke="currentColor" stroke-opacity="0.13"/>'
        )
        parts.append(_number(value, across.start - 7, level + 4, "end"))
    for value in x.ticks or ticks(across.low, across.high, across.log):
        parts.append(_number(value, across(value), up.start + 17, "middle"))
    parts.append(
        f'<line x1="{across.start:.1f}" x2="{across.stop:.1f}" y1="{up.start:.1f}" y2="{up.start:.1f}"'
        ' stroke="currentColor" stroke-opacity="0.5"/>'
    )
    return parts


def _number(value: float, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" opacity="0.75">{value:g}</text>'


def _line(line: Line, across: _Scale, up: _Scale) -> list[str]:
    """The stroke, its error bars and its dots."""
    points = [(across(a), up(b)) for a, b in zip(line.x, line.y, strict=True)]
    colour, pale = COLOURS[line.colour % len(COLOURS)], ' stroke-opacity="0.3"' if line.faint else ""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{1 if line.faint else 2}"'
        f' stroke-linejoin="round"{dash}{pale}/>'
    ]
    for (a, _), value, error in zip(points, line.y, line.error, strict=False):
        low, high = up(value - error), up(value + error)
        parts.append(
            f'<path d="M{a:.1f} {low:.1f}V{high:.1f}M{a - 4:.1f} {low:.1f}h8M{a - 4:.1f} {high:.1f}h8"'
            f' stroke="{colour}" stroke-width="1.2" fill="none"/>'
        )
    if line.marks:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{colour}"/>' for a, b in points]
    return parts


def _legend(lines: Sequence[Line], left: float) -> list[str]:
    """One row of names under the title."""
    parts, place = [], left
    for line in lines:
        colour, dash = COLOURS[line.colour % len(COLOURS)], ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(
            f'<line x1="{place:.0f}" x2="{place + 20:.0f}" y1="33" y2="33" stroke="{colour}" stroke-width="3"{dash}/>'
        )
        parts.append(f'<text x="{place + 25:.0f}" y="37" fill="currentColor">{escape(line.name)}</text>')
        place += 40 + 6.6 * len(line.name)
    return parts


def _label(text: str, x: float, y: float, turned: bool = False) -> str:
    """An axis label."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    style = 'text-anchor="middle" fill="currentColor" opacity="0.75"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{turn} {style}>{escape(text)}</text>' if text else ""
