"""Reward for numbers: tolerance, fractions, percent and units. Nothing is evaluated."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmem.training.rewards import text as texts
from jaxmem.training.rewards.functions import BuiltIn, Case


class Quantity(NamedTuple):
    """A number and its known unit ("%" among them), "" without one."""

    value: float
    unit: str = ""


UNITS: Mapping[str, tuple[str, float]] = {
    name: (kind, factor)
    for kind, rows in {
        "length": {"mm": 1e-3, "cm": 1e-2, "m": 1, "km": 1e3, "inch": 0.0254, "ft": 0.3048, "mile": 1609.344},
        "area": {"mm2": 1e-6, "cm2": 1e-4, "m2": 1, "km2": 1e6, "ha": 1e4},
        "volume": {"ml": 1e-6, "cm3": 1e-6, "l": 1e-3, "dm3": 1e-3, "m3": 1},
        "mass": {"mg": 1e-6, "g": 1e-3, "kg": 1, "t": 1e3, "lb": 0.45359237},
        "time": {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800},
        "speed": {"m/s": 1, "km/h": 1 / 3.6, "mph": 0.44704},
        "angle": {"deg": math.pi / 180, "rad": 1},
    }.items()
    for name, factor in rows.items()
}
"""Units that are converted: name -> (kind, factor). Other words behind a number are not read as units."""
_LONG_NAMES = {
    **dict.fromkeys(("degree", "degrees"), "deg"),
    **dict.fromkeys(("meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("centimeters", "centimetres"), "cm"),
    **dict.fromkeys(("kilometers", "kilometres"), "km"),
    **dict.fromkeys(("inches",), "inch"),
    **dict.fromkeys(("foot", "feet"), "ft"),
    **dict.fromkeys(("miles",), "mile"),
    **dict.fromkeys(("liter", "liters", "litre", "litres"), "l"),
    **dict.fromkeys(("gram", "grams"), "g"),
    **dict.fromkeys(("kilogram", "kilograms"), "kg"),
    **dict.fromkeys(("second", "seconds", "sec"), "s"),
    **dict.fromkeys(("minute", "minutes"), "min"),
    **dict.fromkeys(("hour", "hours"), "h"),
    **dict.fromkeys(("days",), "day"),
    **dict.fromkeys(("weeks",), "week"),
    **dict.fromkeys(("percent", "pct"), "%"),
}

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r" \1/\2 "),
        (r"\\[dt]?frac\s?(\d)\s?(\d)", r" \1/\2 "),
        (r"\\left|\\right|\\[,;! ]|\\(?=[%$#])", ""),
        (r"\^\s?\{?\s?(?:\\circ|\u2218)\s?\}?|\u00b0", " deg "),
        (r"\s?(?:\\times|\\cdot|\u00d7|\*|x)\s?10\s?\^\s?\{?([-+]?\d+)\}?", r"e\1"),
        (r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", ""),
        (r"(?<=[a-z])\^\{?([23])\}?", r"\1"),
    )
)
_RAISED = re.compile("[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")  # superscript digits and minus
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # one-character fractions
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_UNIT = r"%|[A-Za-z]+/[A-Za-z]+|[A-Za-z]+[23]?"
_QUANTITY = re.compile(
    rf"(?<![\w.^{{])(?P<sign>[-+]?)\s?(?:(?P<whole>\d+)\s+(?=\d+\s?/))?(?P<top>{_NUMBER})(?:\s?/\s?(?P<bottom>{_NUMBER}))?"
    rf"(?:(?P<gap>\s?)(?P<unit>{_UNIT}))?"
)


@dataclasses.dataclass(frozen=True)
class Numeric(BuiltIn):
    """1 when the final number is the reference within a tolerance, else 0.

    The number is read from the last marked answer, which must hold one number (or one behind its last "="), else it
    is the last number after the thinking. Fractions, mixed numbers, thousands commas, powers of ten and LaTeX fractions
    are read. A unit on one side only is ignored; two units are converted, and two kinds of units differ. With a
    percent sign on one side only, 50% equals both 50 and 0.5.

    Attributes:
      column: the reference, a number or text with one number in it; anything else does not apply.
      relative, absolute: |answer - reference| may be as large as the larger of relative * |reference| and absolute.
    """

    column: str = "answer"
    relative: float = 1e-3
    absolute: float = 1e-9

    def __post_init__(self) -> None:
        """Checks the tolerances; raises ValueError."""
        if not 0 <= self.relative < 1 or not 0 <= self.absolute < math.inf:
            raise ValueError(f"relative is {self.relative} (0 to below 1), absolute {self.absolute} (0 or more)")

    def score(self, text: str, *values: Any) -> float | None:
        """Closeness of the two quantities."""
        reference = the_quantity(str(values[0]))
        return None if reference is None else float(self._close(read_quantity(text), reference))

    def _close(self, answer: Quantity | None, reference: Quantity) -> bool:
        if answer is None:
            return False
        limit = max(self.absolute, self.relative * abs(reference.value))
        return any(abs(value - wanted) <= limit * scale for value, wanted, scale in _comparable(answer, reference))

    def cases(self) -> tuple[Case, ...]:
        """Fractions, units, and the hack of listing numbers."""
        half, length = {self.column: "1/2"}, {self.column: "12 cm"}
        return (
            Case(r"\boxed{\frac{1}{2}}", half, 1.0),
            Case("The answer is 50%.", half, 1.0),
            Case("<answer>7</answer>", half, 0.0),
            Case("It is 0.12 m", length, 1.0),
            Case("<answer>12, 90 or 700</answer>", length, 0.0),
            Case("4", {self.column: "unknown"}, None),
        )


def _comparable(answer: Quantity, reference: Quantity) -> list[tuple[float, float, float]]:
    """Pairs (answer, reference) in one unit, with the factor that the tolerance takes; none: two kinds of units."""
    units = (answer.unit, reference.unit)
    if units.count("%") == 1:
        shares = [(answer.value, reference.value, 1.0)]
        if units[0] == "%":
            return [*shares, (answer.value / 100, reference.value, 1.0)]
        return [*shares, (answer.value, reference.value / 100, 0.01)]
    if "" in units or units[0] == units[1]:
        return [(answer.value, reference.value, 1.0)]
    (kind, factor), (wanted_kind, wanted) = UNITS[units[0]], UNITS[units[1]]
    return [(answer.value * factor, reference.value * wanted, wanted)] if kind == wanted_kind else []


def read_quantity(text: str) -> Quantity | None:
    """The number that a completion ends on; None when there is none or a marked answer holds several."""
    rest = texts.after_thinking(text)
    marked = texts.explicit_answer(rest)
    if marked is not None:
        return the_quantity(marked)
    found = quantities(rest)
    return found[-1] if found else None


def the_quantity(text: str) -> Quantity | None:
    """The only number of a short text, or the only one behind its last "="; None for several different ones."""
    found = set(quantities(text.rpartition("=")[2]))
    return found.pop() if len(found) == 1 else None


def quantities(text: str) -> list[Quantity]:
    """All numbers of a text with their units, in order."""
    text = _RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match.group()), texts.unwrap(text))
    text = unicodedata.normalize("NFKC", _VULGAR.sub(r" \g<0>", text)).replace("\u2044", "/").replace("\u2212", "-")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found = [_quantity(match) for match in _QUANTITY.finditer(texts.plain(text))]
    return [quantity for quantity in found if math.isfinite(quantity.value)]


def _quantity(match: re.Match[str]) -> Quantity:
    """The quantity of a match; its value is NaN for 1/0 and for the number of a formula such as 2x or 2\\pi."""
    bottom = float(match["bottom"] or 1)
    value = float(match["whole"] or 0) + float(match["top"]) / bottom if bottom else math.nan
    unit = (match["unit"] or "").lower()
    unit = _LONG_NAMES.get(unit, unit)
    known = unit in UNITS or unit == "%"
    if (unit and not known and not match["gap"]) or match.string.startswith(("\\", "^", "("), match.end()):
        value = math.nan
    return Quantity(-value if match["sign"] == "-" else value, unit if known else "")
