"""`manifest.json`: what a synthesis was made from, with checksums, and what came of it.

Inputs and settings are written before the first step. A later start with others is refused, since its samples would
not belong to those that are there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jaxmem
from jaxmem.assets import TINY
from jaxmem.checkpoints.identity import differences, weights_fingerprint
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import scoring
from jaxmem.retrieval import files
from jaxmem.retrieval.index import read_info
from jaxmem.training.synthesis.choosing import Asked
from jaxmem.training.synthesis.settings import SynthesisConfig

MANIFEST, FORMAT = "manifest.json", 1


def header(config: SynthesisConfig, asked: Iterable[Asked], mixture: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result: versions, settings, checksums of all inputs, and the mixture.

    Images count where they are used, in the digests of `questions.jsonl`.

    Raises:
      DataError: an input that cannot be read.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    folder = Path(config.rollout.model or TINY)
    index = Path(config.retrieval.index)
    inputs = {
        "files": {path: _sum(Path(path)) for path in _paths(config)},
        "index": {path.relative_to(index).as_posix(): _sum(path) for path in _inside(index)},
        "embedder": read_info(index)["embedder"],
        "model": {"folder": folder.name, "fingerprint": weights_fingerprint(folder)},
        "functions": {"scorers": scoring.VERSION, "templates": _templates(asked)},
    }
    versions = {"format": FORMAT, "jaxmem": jaxmem.__version__}
    return json.loads(json.dumps({**versions, "settings": settings, "inputs": inputs, "mixture": mixture}))


def _paths(config: SynthesisConfig) -> list[str]:
    """Files that are read as a whole."""
    named: list[str] = [config.retrieval.items]
    for source in config.sources.values():
        named += [*source.questions, *source.annotations, *([] if source.subset is None else [source.subset])]
    found = [[str(one) for one in sorted(Path(path).glob("*.parquet"))] or [path] for path in named]
    return list(dict.fromkeys(path for paths in found for path in paths))


def _inside(folder: Path) -> list[Path]:
    skipped = (files.LOCK, files.PARTIAL)
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(skipped))


def _sum(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _templates(asked: Iterable[Asked]) -> dict[str, str]:
    """Digests of the prompts' words by style."""
    templates = dict.fromkeys(one.template for one in asked)
    return {template.style: template.record["digest"] for template in templates}


def opened(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder, begun when there is none.

    Raises:
      ConfigError: the folder was begun with other inputs or settings; names each.
    """
    path = folder / MANIFEST
    if not path.exists():
        files.commit_json(path, {**wanted, "finished": False})
    there = files.read_json(path, "synthesis")
    begun = _fixed(there)
    if found := differences(begun, wanted):
        raise ConfigError(
            f"{folder} was begun with others: {'; '.join(found)}; restore them, or take another output folder"
        )
    return there


def _fixed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before the first step."""
    return {name: value for name, value in manifest.items() if name not in ("finished", "counts", "outputs")}


def finish(folder: Path, begun: Mapping[str, Any], counts: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
    """Writes counts and the checksums of the results, and that the synthesis is finished."""
    sums = {name: files.sha256(folder / name) for name in outputs}
    content = {**_fixed(begun), "finished": True, "counts": counts, "outputs": sums}
    files.commit_json(folder / MANIFEST, content)
    return content


def check_outputs(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DataError that names the results which are not as they were written."""
    sums = {name: files.sha256(folder / name) if (folder / name).is_file() else "" for name in manifest["outputs"]}
    if wrong := [name for name, found in sums.items() if found != manifest["outputs"][name]]:
        raise DataError(
            f"{folder}: {', '.join(wrong)} changed since the synthesis was finished; restore it, or remove the folder"
        )
