"""The invocation analyser on logs whose places are known."""

import functools
import operator
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxmem.analysis import invocations
from jaxmem.analysis.invocations import empty, measure

PROMPT, TEXT, MEMORY, END, FORCED, INVOKE = 9, 0, 3, 4, 5, 6
LETTERS = {
    "t": (TEXT, 7),
    "s": (INVOKE, 0),
    "l": (INVOKE, 1),
    "S": (FORCED, 0),
    "L": (FORCED, 1),
    "m": (MEMORY, 0),
    "e": (END, 1),
}
SVG = "{http://www.w3.org/2000/svg}"


def log(*groups, tail="l"):
    """Groups of completions as letters -> kinds, types, lengths; what stands behind a completion is no part of it."""
    longest = max(len(text) for group in groups for text in group) + 2
    slots = np.array([[[LETTERS[c] for c in text.ljust(longest, tail)] for text in group] for group in groups])
    return slots[..., 0].astype(np.int8), slots[..., 1], np.array([[len(text) for text in group] for group in groups])


def found(*groups, bins=10):
    return measure(*log(*groups), text=(TEXT,), invoke=(FORCED, INVOKE), bins=bins)


LOG = (
    # 10 text slots each; memory and end slots in between move no place
    ("tttsmmettttttt", "LmmmmettttttttttL"[:-1]),  # short at 30 %, long at 0 %
    ("tttttttttt", "ttsmetttlmmettttt"),  # none; short at 20 %, long at 50 %
    ("tttsmetttttttsm", "SmesmeSmetttttttttt"),  # short at 30 and 100 %; short at 0 % three times
)


def test_check_52_exact_ratios_of_known_places():
    got = found(*LOG)
    assert got.samples == 6 and got.either == 5
    short, long = np.zeros(10, int), np.zeros(10, int)
    short[[3, 2, 9, 0]] = 2, 1, 1, 3
    long[[0, 5]] = 1
    np.testing.assert_array_equal(got.places, [short, long])
    short[0] = 1
    np.testing.assert_array_equal(got.hits, [short, long])
    np.testing.assert_array_equal(got.ratios, np.array([short, long]) / 6)
    np.testing.assert_array_equal(got.counts, [[2, 2, 1, 1], [4, 2, 0, 0]])
    np.testing.assert_allclose(got.invoking, [4 / 6, 2 / 6])
    np.testing.assert_allclose(got.per_sample, [7 / 6, 2 / 6])
    np.testing.assert_allclose(got.mean_place, [(30 + 20 + 30 + 100 + 3 * 0) / 7, (0 + 50) / 2])
    np.testing.assert_allclose(got.centres, np.arange(5, 100, 10))


def test_a_planted_ratio_comes_back():
    """At 40 % of the text a known share of the samples invokes, whatever was inserted before."""
    plain, asks = "t" * 25, "t" * 5 + "lmmmmmmmme" + "t" * 5 + "sme" + "t" * 15
    got = found(*[[asks] * 3 + [plain] * 5] * 7, bins=20)
    assert got.ratios[0].tolist() == [3 / 8 if p == 8 else 0 for p in range(20)]
    assert got.ratios[1].tolist() == [3 / 8 if p == 4 else 0 for p in range(20)]


def test_equals_a_loop_over_random_logs():
    draw = np.random.default_rng(0)
    groups = [["".join(draw.choice(list("tttslme"), draw.integers(1, 30))) for _ in range(4)] for _ in range(25)]
    got = found(*groups, bins=7)
    places, hits, counts = np.zeros((2, 7), int), np.zeros((2, 7), int), np.zeros((2, 31), int)
    for text in (text for group in groups for text in group):
        own = np.zeros((2, 7), int)
        for at, letter in enumerate(text):
            if letter in "sl":
                share = text[:at].count("t") / max(text.count("t"), 1)
                own["sl".index(letter), min(int(np.floor(share * 7 + 1e-9)), 6)] += 1
        places, hits = places + own, hits + (own > 0)
        counts[[0, 1], own.sum(1)] += 1
    np.testing.assert_array_equal(got.places, places)
    np.testing.assert_array_equal(got.hits, hits)
    np.testing.assert_array_equal(got.counts, counts[:, : got.counts.shape[1]])
    assert not counts[:, got.counts.shape[1] :].any()


def test_batches_add_up():
    whole = found(*LOG)
    parts = functools.reduce(operator.add, (found(group) for group in LOG), empty(10))
    assert (parts.samples, parts.either) == (whole.samples, whole.either)
    for name in ("counts", "places", "hits", "passed"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    with pytest.raises(ValueError, match="10 bins and 20 bins"):
        whole + empty()


def test_rows_of_padding_are_no_samples():
    kinds, types, lengths = log(*LOG)
    lengths[1] = 0
    got = measure(kinds, types, lengths, text=(TEXT,), invoke=(FORCED, INVOKE), bins=10)
    assert got.samples == 4
    np.testing.assert_array_equal(got.places, found(LOG[0], LOG[2]).places)
    nothing = measure(kinds, types, lengths * 0, text=(TEXT,), invoke=(INVOKE,))
    assert nothing.samples == 0 and np.isnan(nothing.invoking).all() and np.isnan(nothing.ratios).all()


def test_forced_and_sampled_invocations_can_be_told_apart():
    forced = measure(*log(*LOG), text=(TEXT,), invoke=(FORCED,), bins=10)
    sampled = measure(*log(*LOG), text=(TEXT,), invoke=(INVOKE,), bins=10)
    np.testing.assert_array_equal(forced.places + sampled.places, found(*LOG).places)
    assert forced.places.sum() == 3


def test_smoothing_is_a_gaussian_mean():
    got = found(*LOG, bins=40)
    ratios, centres, smooth = got.ratios, got.centres, got.smoothed(4.0)
    for y in range(2):
        for p in range(40):
            weights = [np.exp(-((c - centres[p]) ** 2) / (2 * 4.0**2)) for c in centres]
            assert smooth[y, p] == pytest.approx(np.dot(weights, ratios[y]) / sum(weights))
    np.testing.assert_allclose(got.smoothed(0.01), ratios, atol=1e-12)
    np.testing.assert_allclose(got.smoothed(1e6), np.repeat(ratios.mean(1)[:, None], 40, 1), rtol=1e-6)
    with pytest.raises(ValueError, match="sigma"):
        got.smoothed(0)


def test_chart_shows_a_curve_of_each_type():
    got = found(*LOG)
    chart = ElementTree.fromstring(invocations.chart(got))
    lines = [[float(p.split(",")[1]) for p in e.get("points").split()] for e in chart.findall(f"{SVG}polyline")]
    assert len(lines) == 4 and all(len(line) == 10 for line in lines)
    smooth = got.smoothed()
    for drawn, values in ((lines[1], smooth[0]), (lines[3], smooth[1])):
        assert np.corrcoef(drawn, values)[0, 1] < -0.999  # up is less in SVG
    texts = {e.text for e in chart.findall(f"{SVG}text")}
    assert {"short", "long", "share of samples, per 10 %"} <= texts


def test_table():
    short, long, either = invocations.table(found(*LOG)).rows
    assert short == ("short", "0.667", "1.167", "0.083", "26 %", "30–40 % (0.333)")
    assert long == ("long", "0.333", "0.333", "0.033", "25 %", "0–10 % (0.167)")
    assert either == ("either", "0.833", "1.500", "", "", "")
    assert [row[1:] for row in invocations.table(empty()).rows[:2]] == [("–",) * 5] * 2


def test_wrong_logs_are_refused():
    kinds, types, lengths = log(*LOG)
    with pytest.raises(ValueError, match=r"not \[B, G, N\]"):
        measure(kinds, types[..., 1:], lengths, text=(TEXT,), invoke=(INVOKE,))
    with pytest.raises(ValueError, match=r"\[6\] are both"):
        measure(kinds, types, lengths, text=(TEXT, INVOKE), invoke=(INVOKE,))
    with pytest.raises(ValueError, match=r"slot \[0, 0, 3\] invokes the type 7"):
        measure(kinds, np.full_like(types, 7), lengths, text=(TEXT,), invoke=(INVOKE,))
    with pytest.raises(ValueError, match="bins is 0"):
        empty(0)
