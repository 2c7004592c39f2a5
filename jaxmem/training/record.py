"""`run.json`: what a run is, so that its output directory can be told from another run's."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmem.checkpoints.identity import differences
from jaxmem.errors import CheckpointError

FILE = "run.json"
_PACKAGES = ("jaxmem", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
_EDGE = 1 << 16


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


def claim(folder: str | Path, identity: Mapping[str, Any], config: Any) -> None:
    """Makes the directory this run's own: writes `run.json`, or compares it with the one that is there.

    Args:
      folder: output directory; made when it does not exist.
      identity: JSON values that may not change between two starts of a run.
      config: the resolved configuration (a dataclass), for the reader of the file.

    Raises:
      CheckpointError: the directory belongs to another run; the message names every difference.
    """
    folder, now = Path(folder), versions()
    identity = json.loads(json.dumps(identity))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    if not path.exists():
        about = {"identity": identity, "versions": now, "config": dataclasses.asdict(config)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        other = differences(stored["identity"], identity)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); choose another output directory") from error
    if other:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(other)}."
            " Choose another output directory, or restore the settings"
        )
    if changed := differences(stored["versions"], now):
        warnings.warn(f"going on with other packages than the run began with: {'; '.join(changed)}", stacklevel=2)
