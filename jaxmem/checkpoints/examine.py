"""Reads a run's checkpoints as a stranger would, and says what is whole, what is not, and where a resume would go on.

Nothing is written or removed, so that the run may be going on meanwhile. One array at a time is in memory.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from etils import epath

from jaxmem.checkpoints.best import Score, ranked
from jaxmem.checkpoints.checksum import checksum_on_host
from jaxmem.checkpoints.identity import differences
from jaxmem.checkpoints.native import BEST, STATE, read_about
from jaxmem.errors import CheckpointError

CHECKPOINTS, RUN = "checkpoints", "run.json"
BESIDE = ("memory", "adapter", "backbone")
"""Folders of a run that hold safetensors files."""
_COMMITTED, _UNFINISHED = "_CHECKPOINT_METADATA", ".orbax-checkpoint-tmp"


def examine(folder: str | Path) -> dict[str, Any]:
    """Everything about the checkpoints of a run, as JSON types.

    Args:
      folder: a run's output directory, or its directory of checkpoints.

    Returns:
      {"folder", "run": what the run is or None, "steps": one object per step (see `_step`), "unfinished": folders of
      saves and of removals that never ended, "files": safetensors files beside, "resume": the step that a resume takes
      or None, "best": the best step or None, "problems": each with its remedy}. Bytes are sizes on disk.

    Raises:
      CheckpointError: the folder does not exist or is neither.
    """
    run, directory = _folders(folder)
    identity, problems = _identity(run)
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    numbers = sorted(int(name) for name in names if name.isdigit())
    named, wrong = _pointer(directory, numbers)
    steps = [_step(directory, number, identity) for number in numbers]
    torn = [step["step"] for step in steps[:-1] if not step["complete"] and step["step"] != named]
    steps = [step for step in steps if step["step"] not in torn]
    unfinished = [name for name in names if _UNFINISHED in name] + [str(number) for number in torn]
    scores = ranked(Score(step["step"], **step["score"]) for step in steps if step["score"])
    files = [_weights(path) for name in BESIDE for path in sorted((run / name).glob("*.safetensors"))]
    problems += [f"step {step['step']}: {problem}" for step in steps for problem in step["problems"]]
    problems += [f"{file['path']}: {file['problem']}" for file in files if file["problem"]]
    problems += wrong
    if not numbers:
        problems.append(f"{directory} holds no checkpoint: a resume would start at step 0")
    elif steps[-1]["problems"]:
        whole = [step["step"] for step in steps if not step["problems"]]
        other = f"to go on from step {whole[-1]}" if whole else "and start anew: no step is whole"
        problems.append(f"a resume would take step {numbers[-1]}, which has problems: remove its folder {other}")
    return {
        "folder": str(run),
        "run": identity,
        "steps": steps,
        "unfinished": unfinished,
        "files": files,
        "resume": numbers[-1] if numbers else None,
        "best": scores[0].step if scores else None,
        "problems": problems,
    }


def _folders(folder: str | Path) -> tuple[epath.Path, epath.Path]:
    """(the run's folder, its directory of checkpoints) from either of them."""
    given = epath.Path(folder) if "://" in str(folder) else epath.Path(os.path.abspath(folder))  # orbax wants it whole
    if not given.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a run's output directory, or its checkpoints")
    if (given / CHECKPOINTS).is_dir() or (given / RUN).exists():
        return given, given / CHECKPOINTS
    if given.name == CHECKPOINTS or any(path.name.isdigit() or _UNFINISHED in path.name for path in given.iterdir()):
        return given.parent, given
    raise CheckpointError(f"{folder} has neither {RUN} nor checkpoints; give a run's output directory")


def _identity(run: epath.Path) -> tuple[dict[str, Any] | None, list[str]]:
    """What `run.json` says the run is, and what is wrong with it."""
    if not (run / RUN).exists():
        return None, []
    try:
        return json.loads((run / RUN).read_text())["identity"], []
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"{run / RUN} is damaged ({error}): the run would refuse to go on; restore it from a copy"]


def _step(directory: epath.Path, number: int, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"step", "complete", "bytes", "saved", "arrays", "digest", "score", "position", "nonfinite", "problems"}.

    Steps with the same digest hold the same bits, wherever they were written.
    """
    path = directory / str(number)
    found = {"step": number, "complete": False, "bytes": _size(path), "saved": _saved(path), "arrays": 0}
    found |= {"digest": None, "score": None, "position": None, "nonfinite": {}, "problems": []}
    try:
        about = read_about(directory, number)
        leaves, run = about["leaves"], about["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return found | {"problems": [f"is incomplete: it does not say what it holds ({_brief(error)})"]}
    sums, nonfinite, problems = _arrays(path / STATE, leaves, about.get("checksums", {}))
    if found["saved"] is None:
        problems.append(f"is incomplete: it has no readable {_COMMITTED}")
    if identity is not None and (other := differences(run, identity)):
        problems.append(f"belongs to another run: {'; '.join(other)}")
    problems += [f"{name} has {count} values that are not finite" for name, count in nonfinite.items()]
    return found | {
        "complete": found["saved"] is not None,
        "arrays": len(sums),
        "digest": hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16],
        "score": about.get("score"),
        "position": about.get("metadata", {}).get("position"),
        "nonfinite": nonfinite,
        "problems": problems,
    }


def _arrays(
    path: epath.Path, leaves: Mapping[str, str], stored: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """(checksum by name, number of values that are not finite by name where there are any, problems)."""
    sums, nonfinite, problems = dict[str, int](), dict[str, int](), list[str]()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for name in leaves:
            try:
                array = _array(reader, path, name)
            except Exception as error:  # orbax and tensorstore raise many kinds
                problems.append(f"{name} cannot be read ({_brief(error)})")
                continue
            sums[name] = checksum_on_host(array)
            if sums[name] != stored.get(name, sums[name]):
                problems.append(f"{name} does not hold the bits that were saved")
            if jnp.issubdtype(array.dtype, jnp.inexact) and (count := int(np.sum(~np.isfinite(array)))):
                nonfinite[name] = count
    return sums, nonfinite, problems


def _array(reader: ocp.Checkpointer, path: epath.Path, name: str) -> np.ndarray:
    """One array of a step, on the host."""
    place = ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(item={name: np.zeros(0)}, restore_args={name: place}, partial_restore=True)
    return np.asarray(reader.restore(path, args=args)[name])


def _pointer(directory: epath.Path, numbers: list[int]) -> tuple[int | None, list[str]]:
    """The step that `best.json` names, and what is wrong with that file."""
    path = directory / BEST
    try:
        named = json.loads(path.read_text())["step"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"{path} is damaged ({_brief(error)}); the next start of the run writes it anew"]
    if named is None or named in numbers:
        return named, []
    return named, [f"{path} names step {named}, which is not there; the next start of the run writes it anew"]


def _weights(path: epath.Path) -> dict[str, Any]:
    """{"path", "bytes", "tensors", "problem"} of a safetensors file; only its header is read."""
    found = {"path": str(path), "bytes": path.stat().length, "tensors": None, "problem": None}
    try:
        with safetensors.safe_open(str(path), "np") as file:
            return found | {"tensors": len(list(file.keys()))}
    except Exception as error:  # safetensors has an error of its own for each fault
        return found | {"problem": f"cannot be read ({_brief(error)}); running the run's command again writes it anew"}


def _saved(path: epath.Path) -> str | None:
    """When a step got its final name, in UTC; None where it does not say."""
    try:
        stamp = json.loads((path / _COMMITTED).read_text())["commit_timestamp_nsecs"]
        return datetime.datetime.fromtimestamp(stamp / 1e9, datetime.UTC).isoformat(timespec="seconds")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(path: epath.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(_size(child) if child.is_dir() else child.stat().length for child in path.iterdir())


def _brief(error: Exception, limit: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."


def render(found: Mapping[str, Any]) -> str:
    """The report as text: one step a line, then what a resume would do, then problems."""
    lines = [f"checkpoints of {found['folder']}", ""]
    lines += [f"  {'step':>8}  {'saved (UTC)':<26}{'MiB':>9}  {'arrays':>6}  {'digest':<17} notes"]
    lines += [_line(step, found) for step in found["steps"]]
    lines += [f"  unfinished: {name} (not used; the run removes it as it goes on)" for name in found["unfinished"]]
    lines += [f"  {file['path']}: {file['tensors']} tensors" for file in found["files"] if not file["problem"]]
    lines += ["", f"a resume takes step {found['resume']}" if found["resume"] is not None else "a resume starts anew"]
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]] or ["no problems found"]
    return "\n".join(lines)


def _line(step: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """One step of the table."""
    notes = [name for name, number in (("last", found["resume"]), ("best", found["best"])) if number == step["step"]]
    if score := step["score"]:
        notes.append(f"{score['metric']} {score['value']:.4f}")
    if position := step["position"]:
        notes.append(f"epoch {position['epoch']}, batch {position['batch']}")
    if step["problems"]:
        notes.append("PROBLEMS" if step["complete"] else "INCOMPLETE")
    size = f"{step['bytes'] / 2**20:.1f}"
    row = f"  {step['step']:>8}  {step['saved'] or 'unknown':<26}{size:>9}  {step['arrays']:>6}  "
    return row + f"{step['digest'] or '':<17} " + ", ".join(notes)
