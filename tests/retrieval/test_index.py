"""Indexes find what a comparison with everything finds, in the order of the scores, and refuse what does not fit."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest

from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import exact, files
from jaxmem.retrieval.approximate import ApproximateIndex
from jaxmem.retrieval.exact import ExactIndex
from jaxmem.retrieval.index import Index, create_index, open_index
from jaxmem.retrieval.lance import LanceIndex

KINDS = ("exact", "approximate", "lance")
EMBEDDER = "m" * 64
WIDTH = 32


@dataclasses.dataclass
class Known:
    """What an index is opened for."""

    digest: str = EMBEDDER
    width: int = WIDTH


def clusters(count, width=WIDTH, centres=20, seed=0, spread=1.0):
    """[count, width] float32, not normalised, around random centres that do not depend on `seed`."""
    middle = np.random.default_rng(99).normal(size=(centres, width))
    draw = np.random.default_rng(seed)
    found = middle[draw.integers(centres, size=count)] + spread * draw.normal(size=(count, width))
    return (found * draw.uniform(0.1, 9, size=(count, 1))).astype(np.float32)


def names(count, start=0):
    return [f"it'em {n}" for n in range(start, start + count)]


def brute_force(vectors, queries, k):
    """Places and cosines by a stable sort of everything in float64, compared as float32 numbers."""
    unit = lambda x: (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    products = unit(queries).astype(np.float64)[:, None] * unit(vectors).astype(np.float64)
    scores = products.sum(-1).astype(np.float32)
    places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return places, np.take_along_axis(scores, places, 1)


def check_equal(hits, ids, vectors, queries, k, kind="exact"):
    """The order too for the exact index; others compare in float32, where two that are nearly alike may swap."""
    places, scores = brute_force(vectors, queries, k)
    if kind == "exact":
        assert hits.ids == tuple(tuple(ids[at] for at in row) for row in places)
    where, (everywhere, every) = {name: at for at, name in enumerate(ids)}, brute_force(vectors, queries, len(vectors))
    for row, found in enumerate(hits.ids):
        own = dict(zip(everywhere[row].tolist(), every[row].tolist(), strict=True))
        np.testing.assert_allclose([own[where[name]] for name in found], hits.scores[row], rtol=0, atol=2e-6)
        assert len(set(found)) == len(found) == k
    np.testing.assert_allclose(hits.scores, scores, rtol=0, atol=2e-6)
    assert hits.scores.dtype == np.float32 and np.all(np.diff(hits.scores, axis=1) <= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_check_29_top_k_equals_brute_force(tmp_path, kind):
    """Below 1,000 items the approximate kinds compare everything too."""
    vectors, queries, ids = clusters(700), clusters(9, seed=1), names(700)
    made = create_index(kind, tmp_path, ids, vectors, EMBEDDER)
    assert isinstance(made, Index) and (len(made), made.width, made.embedder) == (700, WIDTH, EMBEDDER)
    for found in (made, open_index(tmp_path, Known())):
        assert type(found) is type(made) and len(found) == 700
        check_equal(found.search(queries, 10), ids, vectors, queries, 10, kind)
        check_equal(found.search(queries[:1], 1), ids, vectors, queries[:1], 1, kind)


@pytest.mark.parametrize("block", [32, 160, 1 << 20])
def test_check_29_ties_come_in_the_order_of_insertion(tmp_path, monkeypatch, block):
    """Copies of a vector lie in several blocks, and are cut off in the middle by k."""
    monkeypatch.setattr(exact, "_BLOCK", block)
    monkeypatch.setattr(exact, "_QUERIES", 3)
    some = clusters(12)
    order = np.random.default_rng(3).integers(12, size=150)
    vectors, ids = some[order], names(150)
    made = ExactIndex.create(tmp_path, ids, vectors, EMBEDDER)
    queries = clusters(8, seed=5)
    for k in (1, 5, 20, 150):
        check_equal(made.search(queries, k), ids, vectors, queries, k)
    first = made.search(some[4:5], 5).ids[0]
    assert first == tuple(ids[at] for at in np.flatnonzero(order == 4)[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_check_29_the_length_of_vectors_does_not_matter(tmp_path, kind):
    vectors, queries, ids = clusters(60), clusters(4, seed=1), names(60)
    a = create_index(kind, tmp_path / "a", ids, vectors, EMBEDDER).search(queries, 60)
    b = create_index(kind, tmp_path / "b", ids, vectors * 2.0**20, EMBEDDER).search(queries * 2.0**-20, 60)
    assert a.ids == b.ids and np.array_equal(a.scores, b.scores)
    itself = create_index(kind, tmp_path / "c", ids, vectors, EMBEDDER).search(vectors, 1)
    assert itself.ids == tuple((name,) for name in ids)
    np.testing.assert_allclose(itself.scores, 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_check_30_fewer_items_than_k_keep_the_question(tmp_path, kind, count):
    vectors, queries = clusters(5)[:count], clusters(4, seed=1)
    create_index(kind, tmp_path, names(count), vectors, EMBEDDER)
    hits = open_index(tmp_path).search(queries, 10)
    assert len(hits.ids) == 4 and hits.scores.shape == (4, count)
    assert all(set(row) == set(names(count)) for row in hits.ids)
    none = open_index(tmp_path).search(np.zeros((0, WIDTH)), 10)
    assert none.ids == () and none.scores.shape == (0, count)


@pytest.mark.parametrize("kind", KINDS)
def test_added_items_are_found(tmp_path, kind):
    vectors, queries, ids = clusters(90), clusters(6, seed=1), names(90)
    made = create_index(kind, tmp_path, ids[:50], vectors[:50], EMBEDDER)
    made.add(ids[50:51], vectors[50:51])
    made.add([], vectors[:0])
    opened = open_index(tmp_path)
    opened.add(ids[51:], [list(row) for row in vectors[51:]])
    for found in (opened, open_index(tmp_path)):
        check_equal(found.search(queries, 12), ids, vectors, queries, 12, kind)
    assert opened.known(["zz", "it'em 3", "it'em 89", "it'em 90"]) == {"it'em 3", "it'em 89"}
    with pytest.raises(DataError, match='already or twice among the new ones: "it\'em 3", "it\'em 95"$'):
        opened.add(["it'em 95", "it'em 3", "it'em 95"], vectors[:3])
    assert len(open_index(tmp_path)) == 90


@pytest.mark.parametrize("kind", KINDS)
def test_another_embedder_width_or_kind_is_refused(tmp_path, kind):
    create_index(kind, tmp_path, names(5), clusters(5), EMBEDDER)
    with pytest.raises(
        DataError, match="made by embedder mmmmmmmmmmmmmmmm, this one is nnnnnnnnnnnnnnnn; make another"
    ):
        open_index(tmp_path, Known(digest="n" * 64))
    with pytest.raises(DataError, match="holds vectors of width 32, this embedder's have 48"):
        open_index(tmp_path, Known(width=48))
    with pytest.raises(DataError, match="holds an index already; add to it, or name another folder"):
        create_index(kind, tmp_path, names(5), clusters(5), EMBEDDER)
    with pytest.raises(DataError, match=f"an index of the kind {kind}, not "):
        {"exact": LanceIndex, "lance": ApproximateIndex, "approximate": ExactIndex}[kind].open(tmp_path)
    with pytest.raises(DataError, match="no such file; this folder is no index"):
        open_index(tmp_path / "none")
    info = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(info | {"format": 7}))
    with pytest.raises(DataError, match="an index of format 7, this version reads 1"):
        open_index(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_cannot_be_compared_are_named(tmp_path, kind):
    made = create_index(kind, tmp_path, names(5), clusters(5), EMBEDDER)
    wide, holes, nothing = clusters(4, 33), clusters(4), clusters(4)
    holes[[1, 3], 5] = np.nan, np.inf
    nothing[2] = 0
    ragged = [list(row) for row in clusters(3)]
    ragged[1] = ragged[1][:-1]
    faults = [
        (wide, r"{} 0.* has shape \(33,\).*; the index has width 32"),
        (holes, "{} 1.* holds NaN or infinity, {} 3.* holds NaN"),
        (nothing, "{} 2.* has length 0"),
        (ragged, r"{} 1.* has shape \(31,\); the index has width 32"),
    ]
    for rows, message in faults:
        with pytest.raises(DataError, match="^" + message.replace("{}", "query")):
            made.search(rows, 2)
        with pytest.raises(DataError, match="^" + message.replace("{}", "vector").replace("1.*", "1 .'new1'.", 1)):
            made.add([f"new{n}" for n in range(len(rows))], rows)
        with pytest.raises(DataError, match="has shape|NaN|length 0"):
            fresh = ragged if rows is wide else rows
            create_index(kind, tmp_path / "new", names(len(fresh)), fresh, EMBEDDER)
    with pytest.raises(DataError, match=r"query rows have shape \(32,\) together, expected \[n, 32\]"):
        made.search(clusters(1)[0], 2)
    with pytest.raises(DataError, match="2 ids for 3 vectors"):
        made.add(["a", "b"], clusters(3))
    with pytest.raises(DataError, match="an id is a text, got 3, ''"):
        made.add(["a", 3, ""], clusters(3))
    with pytest.raises(ConfigError, match="k is 0"):
        made.search(clusters(1), 0)
    assert len(open_index(tmp_path)) == 5
    check_equal(
        open_index(tmp_path).search(clusters(2, seed=1), 5), names(5), clusters(5), clusters(2, seed=1), 5, kind
    )


def test_a_kind_and_a_package_that_are_missing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="exakt.*exact"):
        create_index("exakt", tmp_path, names(5), clusters(5), EMBEDDER)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for kind, extra in (("approximate", "retrieval"), ("lance", "lance")):
        with pytest.raises(ConfigError, match=rf"pip install 'jaxmem\[{extra}\]'"):
            create_index(kind, tmp_path / kind, names(5), clusters(5), EMBEDDER)


@functools.cache
def many():
    return clusters(20_000, 48, centres=100), clusters(200, 48, centres=100, seed=1)


def recall(hits, places, ids):
    """Share of the true neighbours that were found."""
    return np.mean(
        [len(set(row) & {ids[at] for at in true}) / len(true) for row, true in zip(hits.ids, places, strict=True)]
    )


def test_approximate_recall_against_exact(tmp_path):
    vectors, queries = many()
    ids = names(len(vectors))
    known = ExactIndex.create(tmp_path / "e", ids, vectors, EMBEDDER).search(queries, 10)
    made = ApproximateIndex.create(tmp_path / "a", ids, vectors, EMBEDDER)
    found = made.search(queries, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, known.ids, strict=True)])
    assert share >= 0.95
    assert np.all(np.diff(found.scores, axis=1) <= 0) and np.all(found.scores <= known.scores + 1e-6)
    made.probes = 1
    worse = made.search(queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(worse.ids, known.ids, strict=True)]) < share
    made.probes = 10_000  # all lists: nothing is missed
    assert made.search(queries, 10).ids == known.ids
    opened = open_index(tmp_path / "a")
    again = opened.search(queries, 10)
    assert again.ids == found.ids and np.array_equal(again.scores, found.scores)


def test_approximate_lists_that_hold_too_few_are_not_the_end(tmp_path):
    vectors, queries = clusters(3000, centres=50), clusters(5, seed=2, centres=50)
    made = ApproximateIndex.create(tmp_path, names(3000), vectors, EMBEDDER, probes=1)
    hits = made.search(queries, 2500)
    assert all(len(set(row)) == 2500 for row in hits.ids)
    check_equal(made.search(queries, 3000), names(3000), vectors, queries, 3000, "approximate")


def test_approximate_finds_among_many_copies(tmp_path):
    """The same picture many times over: of each query, the ten best scores are found."""
    some = clusters(100, centres=100)
    vectors, queries = (
        np.repeat(some, 60, 0)[np.random.default_rng(0).permutation(6000)],
        clusters(50, seed=1, centres=100),
    )
    found = ApproximateIndex.create(tmp_path, names(6000), vectors, EMBEDDER).search(queries, 10)
    np.testing.assert_allclose(found.scores, brute_force(vectors, queries, 10)[1], rtol=0, atol=1e-6)


def test_approximate_grows_from_few_to_many(tmp_path):
    vectors, ids = clusters(6000, centres=50), names(6000)
    made = ApproximateIndex.create(tmp_path, ids[:100], vectors[:100], EMBEDDER)
    for start, stop in ((100, 1200), (1200, 1300), (1300, 6000)):
        made.add(ids[start:stop], vectors[start:stop])
    assert [path.name for path in tmp_path.glob("*.faiss")] == ["vectors_6000.faiss"]
    opened = open_index(tmp_path)
    assert opened._index.nlist == round(4 * 6000**0.5)
    assert opened.search(vectors, 1).ids == tuple((name,) for name in ids)


def test_lance_with_lists_and_additions(tmp_path):
    vectors, queries = many()
    ids = names(len(vectors))
    made = LanceIndex.create(tmp_path, ids[:15_000], vectors[:15_000], EMBEDDER, lists=60, probes=20)
    made.add(ids[15_000:], vectors[15_000:])
    with pytest.raises(DataError, match='already or twice among the new ones: "it\'em 19999"'):
        made.add([ids[-1], "new"], vectors[:2])
    places, scores = brute_force(vectors, queries[:60], 10)
    found = open_index(tmp_path, Known(width=48)).search(queries[:60], 10)
    assert recall(found, places, ids) >= 0.95
    assert np.all(np.diff(found.scores, axis=1) <= 0)
    np.testing.assert_allclose(found.scores[:, 0], scores[:, 0], atol=1e-3)
    assert all(len(set(row)) == 4000 for row in open_index(tmp_path).search(queries[:2], 4000).ids)


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_a_full_disk_leaves_the_index_as_it_was(tmp_path, monkeypatch, kind):
    vectors, queries, ids = clusters(60), clusters(3, seed=1), names(60)
    made = create_index(kind, tmp_path, ids[:40], vectors[:40], EMBEDDER)
    plain, calls, stop = files.write, [], [0]

    def write(file, chunk):
        calls.append(0)
        if len(calls) == stop[0]:
            plain(file, bytes(chunk)[:7])
            raise OSError(28, "No space left on device")
        plain(file, chunk)

    monkeypatch.setattr(files, "write", write)
    for stop[0] in (1, 2):
        calls.clear()
        with pytest.raises(DataError, match="cannot write .*no space left on the disk"):
            made.add(ids[40:], vectors[40:])
        for found in (made, open_index(tmp_path)):
            check_equal(found.search(queries, 50), ids[:40], vectors[:40], queries, 40, kind)
    monkeypatch.setattr(files, "write", plain)
    made.add(ids[40:], vectors[40:])
    check_equal(open_index(tmp_path).search(queries, 60), ids, vectors, queries, 60, kind)


@pytest.mark.parametrize(("kind", "file"), [("exact", "vectors.bin"), ("approximate", "vectors_40.faiss")])
def test_truncated_files_are_named(tmp_path, kind, file):
    create_index(kind, tmp_path, names(40), clusters(40), EMBEDDER)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{file}.*make the index again"):
        open_index(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=f"{file}.*make the index again"):
        open_index(tmp_path)
