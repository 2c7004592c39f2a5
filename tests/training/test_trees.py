"""Selecting what trains by path patterns."""

import numpy as np
import pytest

from jaxmem.training import trees

TREE = {
    "base": {"embed": np.zeros(2), "visual": {"fc1": {"kernel": np.ones(3)}}, "layers": {"q": {"kernel": np.ones(4)}}},
    "memory": {"pvm": {"gate_alpha": np.zeros(1), "mlp": {"up": {"kernel": np.ones(5)}}}},
}


def paths(tree):
    return [path for path, _ in trees.leaves(tree)]


@pytest.mark.parametrize(
    "patterns, want",
    [
        ("memory", ["memory/pvm/gate_alpha", "memory/pvm/mlp/up/kernel"]),
        (("**", "!base/visual"), [p for p in paths(TREE) if not p.startswith("base/visual")]),
        (("**", "!base/**", "base/embed"), ["base/embed", "memory/pvm/gate_alpha", "memory/pvm/mlp/up/kernel"]),
        ("base/*/q", ["base/layers/q/kernel"]),
        ("**/kernel", [p for p in paths(TREE) if p.endswith("kernel")]),
    ],
)
def test_split_selects_and_merge_restores(patterns, want):
    trainable, frozen = trees.split(TREE, patterns)
    assert paths(trainable) == want
    assert not set(paths(frozen)) & set(want)
    merged = trees.merge(trainable, frozen)
    assert sorted(paths(merged)) == sorted(paths(TREE))
    assert merged["base"]["layers"]["q"]["kernel"] is TREE["base"]["layers"]["q"]["kernel"]


@pytest.mark.parametrize(
    "pattern, path, want",
    [("**/scale", "scale", True), ("**/scale", "a/b/scale", True), ("a/*", "a/b/c", True), ("a/*/d", "a/b/c", False)],
)
def test_patterns(pattern, path, want):
    assert trees.matches(pattern, path) is want


def test_patterns_that_select_nothing_are_errors():
    with pytest.raises(ValueError, match=r"'memory/vpm' matches no parameter; the nearest are memory/pvm/"):
        trees.split(TREE, "memory/vpm")
    with pytest.raises(ValueError, match="no parameter to train"):
        trees.split(TREE, ("base", "!base"))


def test_a_leaf_in_both_trees_is_an_error():
    with pytest.raises(ValueError, match="both trees have base/embed"):
        trees.merge(TREE, {"base": {"embed": np.zeros(2)}})
