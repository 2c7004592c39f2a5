"""Which leaves train: nested dicts of parameters, split and merged by path patterns.

A path is the keys from the root joined by "/": `memory/pvm/gate_alpha`. In a pattern `*` stands for anything within
one key and `**` for any number of keys; a pattern that matches an inner node matches everything below it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmem.errors import ConfigError

Tree = Any  # nested dicts whose leaves are arrays


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf of a nested dict, in the order of the dict."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}/{key}" if prefix else str(key))


def map_with_path(function: Any, tree: Tree, prefix: str = "") -> Tree:
    """`function(path, leaf)` of every leaf, in the shape of the tree."""
    if not isinstance(tree, dict):
        return function(prefix, tree)
    return {k: map_with_path(function, v, f"{prefix}/{k}" if prefix else str(k)) for k, v in tree.items()}


def matches(pattern: str, path: str) -> bool:
    """Does the pattern match the path or one of its ancestors?"""
    parts = [".*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("/")]
    regex = "/".join(parts).replace(".*/", "(?:.*/)?")
    return re.fullmatch(f"{regex}(?:/.*)?", path) is not None


def check_patterns(patterns: Sequence[str], tree: Tree, where: str) -> None:
    """Raises a ConfigError that names the first pattern that matches no leaf, with the nearest paths."""
    paths = [path for path, _ in leaves(tree)]
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0.0)
            raise ConfigError(f"{where}: pattern {pattern!r} matches no parameter; the nearest are {', '.join(near)}")


def select(patterns: Sequence[str], path: str) -> bool:
    """Is the path selected? Patterns are read in order and the last that matches decides; `!pattern` deselects."""
    selected = False
    for pattern in patterns:
        if matches(pattern.removeprefix("!"), path):
            selected = not pattern.startswith("!")
    return selected


def split(tree: Tree, patterns: str | Sequence[str]) -> tuple[Tree, Tree]:
    """The trainable and the frozen part of `{"base": ..., "memory": ...}`.

    Args:
      tree: nested dict of parameters.
      patterns: one pattern or several, e.g. "memory" (only the memories), ("**", "!base/visual") (everything but the
        vision tower).

    Returns:
      (trainable, frozen): two nested dicts with disjoint leaves; nodes without leaves are absent.

    Raises:
      ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    check_patterns([pattern.removeprefix("!") for pattern in patterns], tree, "trainable")
    trainable, frozen = (_keep(tree, patterns, wanted) for wanted in (True, False))
    if not trainable:
        raise ConfigError(f"trainable: the patterns {patterns} leave no parameter to train")
    return trainable, frozen


def _keep(tree: Tree, patterns: Sequence[str], wanted: bool, prefix: str = "") -> Tree:
    kept = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, dict):
            if inner := _keep(value, patterns, wanted, path):
                kept[key] = inner
        elif select(patterns, path) is wanted:
            kept[key] = value
    return kept


def merge(one: Tree, other: Tree, prefix: str = "") -> Tree:
    """The union of two nested dicts with disjoint leaves; a leaf that both have is a ValueError."""
    merged = dict(one)
    for key, value in other.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = merge(merged[key], value, f"{prefix}{key}/")
        else:
            raise ValueError(f"both trees have {prefix}{key}")
    return merged


def count(tree: Tree) -> int:
    """Number of parameters."""
    return sum(leaf.size for _, leaf in leaves(tree))
