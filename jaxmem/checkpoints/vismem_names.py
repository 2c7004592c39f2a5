"""VisMem in a folder: every leaf under its own path, joined by dots."""

from __future__ import annotations

from typing import Any

import jax

from jaxmem.checkpoints.table import Rule, Table, flatten
from jaxmem.memory import vismem

NAME = "vismem"


def table(config: Any) -> Table:
    """One rule per leaf of `vismem.init`."""
    shapes = jax.eval_shape(lambda: vismem.init(jax.random.key(0), config))
    return tuple(Rule(path, path.replace("/", ".")) for path in flatten(shapes))
