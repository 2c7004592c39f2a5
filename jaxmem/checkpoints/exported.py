"""Folders that `jaxmem export --to=hf` wrote, read back: a backbone and its memory among the same tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.weights import open_weights, read_json
from jaxmem.errors import CheckpointError

SECTION = "jaxmem"
"""Of config.json: {"format": 1, "backbone": model type, "memory": {"name": ..., settings} or None}."""
OWN = re.compile(r"^memory\.|\.layers\.\d+\.(pvm_block|mlp_branch)\.")
"""Tensors of memories among a backbone's."""
_WRITTEN = (SECTION, "auto_map", "architectures")


def is_exported(hf: Mapping[str, Any]) -> bool:
    """Does config.json describe an exported folder?"""
    return isinstance(hf.get(SECTION), Mapping)


def backbone_of(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The backbone's config.json; CheckpointError for a folder of a newer format."""
    about = hf[SECTION]
    if about.get("format") != 1 or "backbone" not in about:
        raise CheckpointError(f"{where}: section {SECTION!r} is not of format 1; was it written by a newer jaxmem?")
    return {key: value for key, value in hf.items() if key not in _WRITTEN} | {"model_type": about["backbone"]}


def section(folder: str | Path) -> Mapping[str, Any] | None:
    """What config.json says of the export; None for any other folder."""
    file = Path(folder) / "config.json"
    hf = read_json(file) if file.is_file() else {}
    return hf[SECTION] if is_exported(hf) else None


def load_memory(folder: str | Path, config: Any, backbone: BackboneConfig, shapes: Any) -> Any:
    """The memory's parameters, in float32; CheckpointError when they do not fit `config`."""
    from jaxmem.checkpoints.huggingface import load_tree  # both read folders, each asks the other
    from jaxmem.checkpoints.memory_names import TORCH_TABLES

    tensors = {name: tensor for name, tensor in open_weights(folder).items() if OWN.search(name)}
    return load_tree(folder, tensors, TORCH_TABLES[config.name](config, backbone), shapes, dtype=jax.numpy.float32)
