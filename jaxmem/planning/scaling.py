"""Weak scaling by compilation: what each device computes and sends as the machine grows with the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxmem.analysis.svg import Axis, Line, line_chart


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of the machine, at the same batch per chip as all others.

    Attributes:
      topology: its name.
      chips: how many.
      flops: per device and step.
      sent: bytes that a device sends per step.
    """

    topology: str
    chips: int
    flops: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Growth:
    """A point beside the smallest machine: 0.03 is 3 % more per device."""

    point: Point
    flops: float
    sent: float


def growth(points: Sequence[Point]) -> list[Growth]:
    """Growth of FLOPs and sent bytes per device relative to the point with the fewest chips, in order of chips.

    Where the smallest machine sends nothing, so that no ratio exists, growth is 0 for what sends nothing too and
    infinite for the rest.
    """
    ordered = sorted(points, key=lambda point: point.chips)
    return [Growth(p, _growth(p.flops, ordered[0].flops), _growth(p.sent, ordered[0].sent)) for p in ordered]


def _growth(value: float, first: float) -> float:
    if first:
        return value / first - 1
    return float("inf") if value else 0.0


def table(points: Sequence[Point]) -> str:
    """One line per size."""
    lines = [f"{'topology':14}{'chips':>7}{'FLOPs/device':>15}{'growth':>9}{'sent MiB/device':>18}{'growth':>9}"]
    for each in growth(points):
        point = each.point
        lines.append(
            f"{point.topology:14}{point.chips:7,}{point.flops:15.3e}{each.flops:+9.1%}{point.sent / 2**20:18,.1f}"
            f"{each.sent:+9.1%}"
        )
    return "\n".join(lines)


def chart(points: Sequence[Point], title: str = "Weak scaling, compiled, not run") -> str:
    """FLOPs and sent bytes per device relative to the smallest machine, over chips, as one <svg> element."""
    rows = growth(points)
    chips = [float(row.point.chips) for row in rows]
    lines = [
        Line("FLOPs per device", chips, [1 + row.flops for row in rows], colour=0, marks=True),
        Line("bytes sent per device", chips, [1 + row.sent for row in rows], colour=1, marks=True),
        Line("10 % more", chips, [1.1] * len(chips), colour=7, dashed=True),
    ]
    top = max([1.2, *(value for line in lines for value in line.y if value != float("inf"))])
    return line_chart(
        lines,
        title=title,
        x=Axis("chips (constant batch per chip)", log=True, ticks=tuple(chips)),
        y=Axis("relative to the smallest", low=0.0, high=1.05 * top),
        width=520,
        height=300,
    )


def write(points: Sequence[Point], folder: Path) -> Path:
    """Writes `weak_scaling.svg` into `folder` and returns its path."""
    path = folder / "weak_scaling.svg"
    path.write_text(chart(points) + "\n", encoding="utf-8")
    return path
