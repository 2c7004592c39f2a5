"""The layouts of the papers' own code, out and in: what others trained with it runs here, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxmem import api
from jaxmem.api import Model
from jaxmem.assets import TINY
from jaxmem.checkpoints.huggingface import SHARD_SIZE
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import original_comem, original_pvm, original_vismem
from jaxmem.export.prove import KEYS, Proof

MODULES: Mapping[str, ModuleType] = {"pvm": original_pvm, "vismem": original_vismem, "comem": original_comem}
"""Each has `write(model, folder, dtype=, max_shard_size=)` and a way to read."""
READ: Mapping[str, Callable[..., tuple[Any, Any]]] = {
    "pvm": lambda model, source, **options: original_pvm.read(source, model.spec.backbone, **options),
    "vismem": lambda model, source, **options: original_vismem.read(source, model.spec.backbone, model.base, **options),
    "comem": lambda model, source, **options: original_comem.read(source, model.spec.backbone, model.base, **options),
}


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes the memory as its paper's code does; ConfigError for one whose code has no layout of its own."""
    names = [memory.name for memory in model.spec.memories]
    if len(names) != 1 or names[0] not in MODULES:
        held = " and ".join(names) or "no memory"
        raise ConfigError(f"export --to=original: there are layouts for {', '.join(MODULES)}; the model has {held}")
    MODULES[names[0]].write(model, folder, dtype=dtype, max_shard_size=max_shard_size)


def read(model: Model, memory: str, source: str | Path, **options: Any) -> Model:
    """The model with a memory that a paper's code trained.

    Args:
      model: the backbone that it was trained on.
      memory: a key of `MODULES`.
      source: file or folder.
      **options: `allow_pickle`, and those of the memory's `read`.

    Raises:
      CheckpointError, ConfigError: see there.
    """
    if memory not in READ:
        raise ConfigError(f"import --memory={memory}: there are layouts of {', '.join(READ)}")
    return model._with(*READ[memory](model, source, **options))


def prove(model: Model, folder: Path) -> Proof:
    """Reads what was written, and compares it with the model bit by bit."""
    (config,) = model.spec.memories
    back = read(model.without_memory(), config.name, folder, allow_pickle=True)
    same = lambda one, two: np.array_equal(np.asarray(one), np.asarray(two))  # noqa: E731
    pairs = jax.tree_util.tree_map_with_path(
        lambda path, one, two: None if same(one, two) else jax.tree_util.keystr(path, simple=True, separator="/"),
        model.memory[config.name],
        back.memory[config.name],
    )
    return Proof(dict.fromkeys(KEYS, []) | {"changed": jax.tree.leaves(pairs)}, {})


def main(*, memory: str | None, source: str | None, model: str | None, output: str | None, allow_pickle: bool) -> int:
    """`jaxmem import`: prints what was read and where it lies now."""
    wanted = {"memory": memory, "source": source, "output": output}
    if absent := [f"--{name}" for name, given in wanted.items() if not given]:
        raise ConfigError(f"import needs {', '.join(absent)}")
    assert memory and source and output
    if Path(output).exists() and any(Path(output).iterdir()):
        raise CheckpointError(f"{output} exists and is not empty; choose another folder")
    found = read(api.load(model or TINY), memory, source, allow_pickle=allow_pickle)
    found.save(output)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.memory))
    print(f"{output}: {memory} with {count:,} parameters; use it as --memory={output}")
    return 0
