"""Memories whose file in a folder is ours alone: every leaf has its own path, joined by dots."""

from __future__ import annotations

from typing import Any

import jax

from jaxmem.checkpoints.table import Rule, Table, flatten
from jaxmem.memory.registry import memory

NAMES = ("vismem", "comem", "vision_remember", "deepstack", "sva", "fastv")


def table(config: Any) -> Table:
    """One rule per leaf of the memory's `init`."""
    shapes = jax.eval_shape(lambda: memory(config.name).init(jax.random.key(0), config))
    return tuple(Rule(path, path.replace("/", ".")) for path in flatten(shapes))
