"""Charts: well-formed, escaped, and the points where the numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from jaxmem.analysis.svg import MOST_POINTS, Axis, Line, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def points(chart):
    lines = ElementTree.fromstring(chart).findall(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


@pytest.mark.parametrize(
    ("low", "high", "log", "wanted"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 400, False, [0, 100, 200, 300, 400]),
        (-0.3, 0.9, False, [-0.25, 0, 0.25, 0.5, 0.75]),
        (0.005, 20, True, [0.01, 0.1, 1, 10]),
        (0.25, 1.2, True, [0.5, 1]),
        (0.08, 1.2, True, [0.1, 0.2, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, wanted):
    assert ticks(low, high, log) == pytest.approx(wanted)


def test_points_are_linear_in_the_values():
    chart = line_chart([Line("a", [0, 5, 10], [0.0, 0.5, 1.0])], x=Axis(low=0, high=10), y=Axis(low=0, high=1))
    (line,) = points(chart)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x2 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y2 < y0  # up is less in SVG


def test_logarithmic_axis_spaces_powers_evenly():
    (line,) = points(line_chart([Line("a", [1, 2, 3], [0.01, 0.1, 1.0])], y=Axis(low=0.01, high=1, log=True)))
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.11)


def test_text_is_escaped_and_numbers_that_are_none_are_left_out():
    chart = line_chart(
        [Line("<b>&", [0, 1, 2], [1.0, float("nan"), 2.0], error=[0.1, 0.1, 0.1])],
        title="<script>alert(1)</script>",
        x=Axis('"x"'),
        y=Axis("y<"),
    )
    assert "<script" not in chart
    assert "<script>alert(1)</script>" in "".join(ElementTree.fromstring(chart).itertext())
    assert len(points(chart)[0]) == 2


@pytest.mark.parametrize(
    "lines", [[], [Line("empty", [], [])], [Line("one", [3], [2.0])], [Line("flat", [0, 1], [0, 0])]]
)
def test_charts_of_almost_nothing(lines):
    ElementTree.fromstring(line_chart(lines))


def test_long_lines_are_thinned_but_keep_their_end():
    n = 10 * MOST_POINTS + 3
    (line,) = points(line_chart([Line("a", range(n), range(n))], width=2000))
    assert len(line) <= MOST_POINTS + 2
    assert line[-1][0] == pytest.approx(2000 - 14)
