"""The charts of a study: accuracy against length, some arms at a time, and the attention on the image."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmem.analysis.report import Charts
from jaxmem.analysis.study_results import Results
from jaxmem.analysis.svg import Axis, Line, line_chart
from jaxmem.evaluation.conditions import Condition


def charts(results: Results) -> tuple[Charts, ...]:
    """Read and exact against k per arm, in charts of few lines each; and the attention."""
    plain = [c for c in results.conditions() if c == Condition(c.k)]
    groups = _groups(list(results.arms))
    shown = tuple(
        _chart(results, name, title, group, plain)
        for group in groups
        for name, title in (("read", "Digits read"), ("exact", "Final answers exact"))
    )
    found = [Charts("Accuracy by length", shown, "Bars are the standard deviation between seeds.")]
    if any(results.each(arm, "mass", c) for arm in results.arms for c in plain):
        found.append(Charts("Attention mass on the image", tuple(_mass_charts(results, plain))))
    return tuple(found)


def _groups(names: list[str], size: int = 2) -> list[list[str]]:
    """Arms that share a chart: the first two, memory off and what it is compared with, are in all of them."""
    fixed, rest = names[:2], names[2:]
    return [fixed + rest[start : start + size] for start in range(0, max(1, len(rest)), size)]


def _chart(results: Results, name: str, title: str, arms: list[str], plain: Sequence[Condition]) -> str:
    lines = []
    for place, arm in enumerate(arms):
        found = [(c.k, one) for c in plain if (one := results.share(arm, name, c)) is not None]
        if found:
            ks, ones = [k for k, _ in found], [one for _, one in found]
            means, spreads = [one.mean for one in ones], [one.spread for one in ones]
            lines.append(Line(arm.replace("_", " "), ks, means, spreads, colour=(1, 0, 2, 3, 4)[place % 5], marks=True))
    x = Axis("words between image and question", ticks=tuple(float(c.k) for c in plain if c.k != 128))
    return line_chart(lines, title=title, x=x, y=Axis("share", 0, 1.02, ticks=(0, 0.25, 0.5, 0.75, 1)))


def _mass_charts(results: Results, plain: Sequence[Condition]) -> list[str]:
    made = []
    for arm, result in results.arms.items():
        found = [(c.k, masses) for c in plain if (masses := results.each(arm, "mass", c))]
        if found:
            layers = range(len(found[0][1]))
            lines = [
                Line(
                    f"layer {layer}",
                    [k for k, _ in found],
                    [masses[layer].mean for _, masses in found],
                    [masses[layer].spread for _, masses in found],
                    colour=layer + 2,
                    marks=True,
                )
                for layer in layers
            ]
            x = Axis("words between image and question", ticks=tuple(float(k) for k, _ in found if k != 128))
            made.append(line_chart(lines, title=result.title, x=x, y=Axis("attention on the image", 0)))
    return made
