"""The bank's bench measures what it says; its times are for people."""

import numpy as np

from jaxmem.bench import bank, run


def test_measure_and_its_table():
    found = bank.measure(count=3000, width=32, queries=40, probes=300)
    assert found["items"] == 3000 and found["bank bytes per item"] == 8 * 64 * 2
    assert found["recall@10"] == 1 and found["index bytes per item"] > 32 * 4
    assert all(value > 0 for value in found.values()) and found["search ms, p50"] <= found["search ms, p99"]


def test_the_table_is_of_the_same_figures(monkeypatch):
    figures = {}

    def measure(count, width):
        figures.update(plain(count, width, queries=10))
        return figures

    plain = bank.measure
    monkeypatch.setattr(bank, "measure", measure)
    compared = bank.run(count=1200, width=16)
    assert [one.goal for one in compared][:2] == ["p99 <= 10 ms", "recall >= 0.95"]
    assert compared[1].ours == figures["recall@10"] and compared[0].runs["index seconds"] == [figures["index seconds"]]
    assert "search ms, p99" in run.as_text("bank", compared)


def test_clusters_are_unit_vectors_that_seeds_share_the_centres_of():
    one, other = bank.clusters(500, 64, 0, centres=5, spread=0.2), bank.clusters(500, 64, 1, centres=5, spread=0.2)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert not np.array_equal(one, other)
    assert (one @ other.T).max(1).min() > 0.9  # each has a neighbour in the other draw
