"""The section `rewards` of a configuration: which functions, with which weights and limits."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from jaxmem import config as configs
from jaxmem.errors import ConfigError
from jaxmem.training.rewards.functions import Function, Imported

FUNCTIONS: Mapping[str, str] = {
    "anls": "matching:ANLS",
    "board": "boards:BoardReward",
    "choice": "answers:Choice",
    "exact": "answers:Exact",
    "exact_text": "matching:ExactText",
    "llm_judge": "judge:Judge",
    "math": "mathematics:Math",
    "numeric": "quantities:Numeric",
    "pvm": "tags:PVM",
    "substr": "matching:Substring",
    "think_format": "tags:ThinkFormat",
    "yesno": "yesno:YesNo",
}
"""The built-in functions: name -> "module:class" in this package."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """One function of a configuration.

    Attributes:
      label: its name in metrics; the default is the function's name.
      weight: its share in the sum of the rewards.
      chunk: completions per call, which fail together; 0 hands the function the whole batch at once.
      function: the callable.
    """

    label: str
    weight: float
    chunk: int
    function: Function

    def __post_init__(self) -> None:
        """Checks the chunk; raises ValueError."""
        if self.chunk < 0:
            raise ValueError(f"chunk is {self.chunk}; use 1 or more, or 0 for the whole batch")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Rewards and the limits of their verification.

    Attributes:
      functions: each {"name": a built-in name or "package.module:function", "weight": 1.0, ...}, or just the name.
        Optional keys are `weight`, `label`, `chunk` (see Reward); all others are the function's own settings.
      timeout_s: seconds of wall time that verifying one completion may take before its process is killed.
      startup_s: seconds that starting a process and importing the functions may take.
      workers: number of processes.
      max_failed_steps: consecutive calls in which every row of a function fails before the run stops.

    Raises:
      ConfigError: an unknown function or setting, or a label that occurs twice.
      ValueError: a limit out of range.
    """

    functions: tuple[Mapping[str, Any] | str, ...]
    timeout_s: float = 10.0
    startup_s: float = 120.0
    workers: int = 2
    max_failed_steps: int = 3

    def __post_init__(self) -> None:
        """Builds every function once, so that a wrong setting is found with the configuration."""
        for name in ("timeout_s", "startup_s", "workers", "max_failed_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        labels = [reward.label for reward in self.rewards]
        if not labels:
            raise ValueError("functions is empty; name at least one reward function")
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"functions: {', '.join(map(repr, twice))} occurs twice; give one of them a 'label'")

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """The functions, built."""
        return tuple(build(section, f"functions[{i}]") for i, section in enumerate(self.functions))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the functions in metrics."""
        return tuple(reward.label for reward in self.rewards)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the functions."""
        return tuple(reward.weight for reward in self.rewards)


def build(section: Mapping[str, Any] | str, where: str) -> Reward:
    """One function from its section; raises ConfigError at `where` for a wrong name, key or value."""
    settings = {"name": section} if isinstance(section, str) else dict(section)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"missing key '{where}.name': name a built-in function or an import path")
    own = {key: settings.pop(key) for key in ("label", "weight", "chunk") if key in settings}
    function = _function(name, settings, where)
    values = {"label": name.rpartition(":")[2], "weight": 1.0, "chunk": 1} | own
    return configs.build(Reward, {**values, "function": function}, where)


def _function(name: str, settings: Mapping[str, Any], where: str) -> Function:
    if ":" in name:
        if name.startswith("__main__:"):
            raise ConfigError(f"{where}: {name!r} cannot be imported by other processes; move it to a module")
        return Imported(name, settings)
    module, cls = configs.choose(FUNCTIONS, name, "reward function").split(":")
    return configs.build(getattr(importlib.import_module(f"{__package__}.{module}"), cls), settings, where)
