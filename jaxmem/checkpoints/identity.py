"""What a memory and its backbone are, as plain JSON: written beside weights and compared before they are used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.backbones.config import BackboneConfig

_EDGE = 1 << 16


def weights_fingerprint(folder: str | Path) -> str:
    """Tells one backbone folder from another without reading it whole: names, sizes and both ends of its weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, path.stat().st_size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def backbone_identity(config: BackboneConfig) -> dict[str, Any]:
    """What a memory's weights depend on: the backbone's type, model width and number of decoder layers."""
    return {"model_type": config.model_type, "width": config.text.width, "layers": config.text.layers}


def memory_identity(config: Any) -> dict[str, Any]:
    """A memory's settings (a frozen dataclass with a field `name`) as JSON: tuples are lists.

    A field whose metadata say "later" is left out at its default: files from before it was there stay valid.
    """
    new = [field for field in dataclasses.fields(config) if field.metadata.get("later")]
    left_out = {field.name for field in new if getattr(config, field.name) == field.default}
    held = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return json.loads(json.dumps(held, default=str))


def run_identity(backbone: BackboneConfig, memories: Sequence[Any] = ()) -> dict[str, Any]:
    """What a training run trains: the backbone and every memory with its settings."""
    return {
        "backbone": backbone_identity(backbone),
        "memories": {config.name: memory_identity(config) for config in memories},
    }


def differences(stored: Any, wanted: Any, where: str = "") -> list[str]:
    """One line for every entry in which two JSON values differ, such as "memories.pvm.layers: stored [1], ..."."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        keys = [*wanted, *(key for key in stored if key not in wanted)]
        pairs = [(f"{where}.{key}".lstrip("."), stored.get(key, "none"), wanted.get(key, "none")) for key in keys]
        return [line for path, old, new in pairs for line in differences(old, new, path)]
    return [] if stored == wanted else [f"{where}: stored {stored}, this run has {wanted}"]
