"""When a model asks for memory: how often, of which type, where in its answers (VisMem, arXiv 2511.11007, Figure 5).

The place of an invocation is the number of text slots in front of it as a share of all text slots of the completion, in
per cent: 0 in front of the first token, 100 behind the last. Memory vectors, end tokens and invocations themselves are
no text, so that what was inserted earlier does not move later places.

Axis letters: B prompts, G completions of each, N slots, Y types (short, long), P bins of places, C numbers of
invocations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from jaxmem.analysis.report import Table
from jaxmem.analysis.svg import Axis, Line, line_chart

TYPES = ("short", "long")
BINS = 20
SIGMA = 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class Invocations:
    """Sums over samples; those of several batches add up.

    Attributes:
      samples: completions that were looked at.
      either: samples with an invocation of any type.
      counts: [Y, C] int64 samples with exactly C = 0, 1, ... invocations of the type.
      places: [Y, P] int64 invocations by place; bin p holds the places from 100 p / P up to 100 (p + 1) / P, the last
        one 100 too.
      hits: [Y, P] int64 samples with at least one invocation of the type in the bin.
      passed: [Y] float64 sum of the invocations' places, in per cent.
    """

    samples: int
    either: int
    counts: np.ndarray
    places: np.ndarray
    hits: np.ndarray
    passed: np.ndarray

    def __add__(self, other: Invocations) -> Invocations:
        """Both together; ValueError when their bins differ."""
        if self.places.shape != other.places.shape:
            raise ValueError(f"{self.places.shape[1]} bins and {other.places.shape[1]} bins of places do not add up")
        longest = max(self.counts.shape[1], other.counts.shape[1])
        counts = sum(np.pad(one.counts, ((0, 0), (0, longest - one.counts.shape[1]))) for one in (self, other))
        return Invocations(
            self.samples + other.samples,
            self.either + other.either,
            np.asarray(counts),
            self.places + other.places,
            self.hits + other.hits,
            self.passed + other.passed,
        )

    @property
    def invoking(self) -> np.ndarray:
        """[Y] share of the samples that invoke the type at least once; NaN without samples."""
        return _shares(self.samples - self.counts[:, 0], self.samples)

    @property
    def per_sample(self) -> np.ndarray:
        """[Y] invocations of the type per sample; NaN without samples."""
        return _shares(self.places.sum(axis=1), self.samples)

    @property
    def mean_place(self) -> np.ndarray:
        """[Y] mean place of the type's invocations in per cent; NaN without any."""
        count = self.places.sum(axis=1)
        return np.where(count, self.passed / np.maximum(count, 1), np.nan)

    @property
    def ratios(self) -> np.ndarray:
        """[Y, P] share of the samples that invoke the type in the bin; NaN without samples. Wider bins hold more."""
        return _shares(self.hits, self.samples)

    @property
    def centres(self) -> np.ndarray:
        """[P] middle of every bin, in per cent."""
        bins = self.places.shape[1]
        return (np.arange(bins) + 0.5) * 100 / bins

    def smoothed(self, sigma: float = SIGMA) -> np.ndarray:
        """`ratios` averaged over places with Gaussian weights; in front of 0 and behind 100 per cent is nothing.

        Args:
          sigma: standard deviation of the weights, in per cent of the completion.

        Returns:
          [Y, P] float64.
        """
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}; it is a standard deviation in per cent, above 0")
        weights = np.exp(-0.5 * ((self.centres[:, None] - self.centres) / sigma) ** 2)
        return self.ratios @ (weights / weights.sum(axis=1, keepdims=True)).T


def empty(bins: int = BINS) -> Invocations:
    """Nothing seen yet, to add to."""
    if bins < 1:
        raise ValueError(f"bins is {bins}; use 1 or more")
    none = np.zeros((len(TYPES), bins), np.int64)
    return Invocations(0, 0, np.zeros((len(TYPES), 1), np.int64), none, none, np.zeros(len(TYPES)))


def measure(
    kinds: np.ndarray,
    types: np.ndarray,
    lengths: np.ndarray,
    *,
    text: Collection[int],
    invoke: Collection[int],
    bins: int = BINS,
) -> Invocations:
    """Counts the invocations of a batch of completions.

    Args:
      kinds: [B, G, N] int, what each slot holds.
      types: [B, G, N] int, 0 short and 1 long where a slot invokes; anything elsewhere.
      lengths: [B, G] int, slots in use. Completions of length 0 are rows of padding and no samples.
      text: the kinds that are text, the stop token's among them.
      invoke: the kinds that invoke, sampled or forced.
      bins: P.

    Raises:
      ValueError: shapes do not belong together, a kind that is both, or an invocation of another type.
    """
    kinds, types, lengths = (np.asarray(array) for array in (kinds, types, lengths))
    if kinds.ndim != 3 or types.shape != kinds.shape or lengths.shape != kinds.shape[:2]:
        raise ValueError(f"kinds {kinds.shape}, types {types.shape}, lengths {lengths.shape}: not [B, G, N] and [B, G]")
    if both := sorted(set(text) & set(invoke)):
        raise ValueError(f"the kinds {both} are both text and invocations")
    used = np.arange(kinds.shape[2]) < lengths[..., None]
    invokes = used & np.isin(kinds, list(invoke))
    if wrong := np.argwhere(invokes & ~np.isin(types, range(len(TYPES)))).tolist():
        raise ValueError(f"slot {wrong[0]} invokes the type {types[tuple(wrong[0])]}; 0 is short, 1 is long")
    return _summed(_places(used & np.isin(kinds, list(text)), invokes), types, lengths > 0, bins)


def _places(texts: np.ndarray, invokes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of every invocation: its indices b, g and n, the text slots in front of it, and those of its completion."""
    b, g, n = np.nonzero(invokes)
    return b, g, n, np.cumsum(texts, axis=2)[b, g, n], np.maximum(texts.sum(axis=2), 1)[b, g]


def _summed(found: tuple[np.ndarray, ...], types: np.ndarray, samples: np.ndarray, bins: int) -> Invocations:
    """The sums over the completions that are samples [B, G]."""
    b, g, n, front, total = found
    kind = types[b, g, n]
    each = np.zeros((*samples.shape, len(TYPES), bins), np.int64)
    np.add.at(each, (b, g, kind, np.minimum(front * bins // total, bins - 1)), 1)
    each = each[samples]
    if not len(each):
        return empty(bins)
    by_type = each.sum(axis=2)
    return Invocations(
        samples=len(each),
        either=int(by_type.any(axis=1).sum()),
        counts=np.stack([np.bincount(column, minlength=by_type.max() + 1) for column in by_type.T]),
        places=each.sum(axis=0),
        hits=(each > 0).sum(axis=0),
        passed=np.bincount(kind, weights=100 * front / total, minlength=len(TYPES)),
    )


def _shares(part: np.ndarray, whole: int) -> np.ndarray:
    return part / whole if whole else np.full(np.shape(part), np.nan)


def chart(found: Invocations, sigma: float = SIGMA, title: str = "Invocations by place") -> str:
    """The smoothed invocation ratio over the place, one line per type, the bins themselves behind it: SVG text."""
    lines = []
    for colour, (name, raw, smooth) in enumerate(zip(TYPES, found.ratios, found.smoothed(sigma), strict=True)):
        lines.append(Line("", list(found.centres), list(raw), colour=colour, faint=True))
        lines.append(Line(name, list(found.centres), list(smooth), colour=colour))
    width = 100 / found.places.shape[1]
    return line_chart(
        lines,
        title=title,
        x=Axis("place in the answer, % of its text", 0, 100, ticks=(0, 25, 50, 75, 100)),
        y=Axis(f"share of samples, per {width:g} %", low=0),
    )


def table(found: Invocations) -> Table:
    """By type: the share of samples that invoke, invocations per sample, their mean place and the busiest bin."""
    rows = [
        (name, *map(_cell, values), _place(place), _busiest(ratios))
        for name, *values, place, ratios in zip(
            TYPES,
            found.invoking,
            found.per_sample,
            found.ratios.mean(axis=1),
            found.mean_place,
            found.ratios,
            strict=True,
        )
    ]
    either = _shares(np.asarray(found.either), found.samples)
    rows.append(("either", _cell(float(either)), _cell(found.per_sample.sum()), "", "", ""))
    note = (
        f"{found.samples} samples. A place is the share of an answer's text in front of the invocation. The ratio is"
        f" the share of samples that invoke within a bin of {100 / found.places.shape[1]:g} %, here averaged over bins."
    )
    columns = ("type", "samples that invoke", "per sample", "mean ratio", "mean place", "busiest bin")
    return Table(columns, tuple(rows), notes=(note,))


def _place(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.0f} %"


def _busiest(ratios: np.ndarray) -> str:
    """The bin in which the most samples invoke, and their share."""
    if not np.nan_to_num(ratios).any():
        return "–"
    top, width = int(ratios.argmax()), 100 / len(ratios)
    return f"{top * width:g}–{(top + 1) * width:g} % ({ratios[top]:.3f})"


def _cell(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
