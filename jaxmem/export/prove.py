"""The proof of an export: what was written is loaded again by torch, in a process of its own, and must say the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxmem.api import Model
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import prompts

LIMIT = 1e-4
"""Of the largest difference of logits, in units of the largest logit where that is above 1."""
KEYS = ("missing", "unexpected", "mismatched")


@dataclasses.dataclass(frozen=True)
class Proof:
    """What torch found.

    Attributes:
      keys: names of tensors that did not fit, by kind.
      prompts: what was asked and compared, empty where tensors alone were: {"name/state": {"difference", "scale",
        "equal", "of"}}; states are those of `prompts.states`, or adapters.
    """

    keys: dict[str, list[str]]
    prompts: dict[str, dict[str, float]]

    @property
    def difference(self) -> float:
        """Of logits, the largest of all prompts."""
        return max((found["difference"] for found in self.prompts.values()), default=0.0)

    @property
    def tokens(self) -> tuple[int, int]:
        """Greedy tokens that agree, of how many."""
        return tuple(int(sum(found[key] for found in self.prompts.values())) for key in ("equal", "of"))  # pyrefly: ignore

    @property
    def faults(self) -> list[str]:
        """Why the export is not right; empty when it is."""
        said = [f"{len(names)} {kind} tensors ({', '.join(names[:5])})" for kind, names in self.keys.items() if names]
        for name, found in self.prompts.items():
            if not found["difference"] <= LIMIT * max(1.0, found["scale"]):
                said.append(f"{name}: logits differ by {found['difference']:.2e} (largest {found['scale']:.1f})")
            if found["equal"] < found["of"]:
                said.append(f"{name}: {found['equal']} of {found['of']} greedy tokens agree")
        return said


def check_torch() -> None:
    """Raises ConfigError where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "an export is proven by loading it in torch, which is not installed: pip install 'jaxmem[torch]', or"
            " --unproven to write it without proof"
        )


def prove(model: Model, folder: Path) -> Proof:
    """Loads an exported folder in torch and compares it with the model.

    Raises:
      CheckpointError: torch cannot load the folder; its last words are in the message.
    """
    check_torch()
    with tempfile.TemporaryDirectory() as reference:
        prompts.reference(model, Path(reference))
        report = reload("jaxmem.export.reload", str(folder), reference)
    return Proof({key: report[key] for key in KEYS}, report["prompts"])


def reload(module: str, *arguments: str) -> dict[str, Any]:
    """Runs a module with torch in a process of its own, without the network; returns the JSON object that it prints."""
    with tempfile.TemporaryDirectory() as cache:  # where transformers puts the folder's code to run it
        quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"torch cannot load what was exported:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
