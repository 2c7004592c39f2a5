"""`run.json`: what a run is, so that its output directory can be told from another run's."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxmem
from jaxmem.checkpoints.identity import differences
from jaxmem.distributed import hosts
from jaxmem.errors import CheckpointError

FILE = "run.json"
_PACKAGES = ("jaxmem", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_fingerprint() -> str:
    """SHA-256 of jaxmem's own source files, by which hosts see whether they run the same code."""
    digest, root = hashlib.sha256(), Path(jaxmem.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def flat(config: Any) -> dict[str, str]:
    """Dotted key to value, in words, of a configuration (a dataclass)."""

    def walk(value: Any, key: str) -> dict[str, str]:
        if not isinstance(value, Mapping) or not value:
            return {key: repr(value)}
        return {k: v for name, inner in value.items() for k, v in walk(inner, f"{key}.{name}".lstrip(".")).items()}

    return walk(dataclasses.asdict(config), "")


def of_host(path: Path) -> Path:
    """A file that every host writes for itself: as it is on the first, with the host's number on the others."""
    return path if hosts.first() else path.with_stem(f"{path.stem}_host{hosts.index()}")


def require_shared(folder: str | Path, patience: float = 30.0) -> None:
    """Raises HostError on every host unless all see the `run.json` that the first one wrote.

    Args:
      folder: output directory.
      patience: seconds that a network file system may take to show it.
    """
    seen = (Path(folder) / FILE).exists()
    while not seen and patience > 0:
        time.sleep(0.5)
        seen, patience = (Path(folder) / FILE).exists(), patience - 0.5
    hosts.agree(f"output folder, {folder}: it must lie on storage that all hosts share", {FILE: seen})


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
