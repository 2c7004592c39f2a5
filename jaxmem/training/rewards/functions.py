"""What a reward function is here, and what one call of it yields.

Functions have the signature that TRL made common, called by keyword:

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

with one entry per completion in every argument. None means "does not apply to this row". A function that names
`images` or `diagnostics` among its parameters gets those too.

This module is imported by the verifying processes, so it must stay light: no numpy, no jax.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from jaxmem.errors import ConfigError, JaxmemError

STANDARD = ("prompts", "completions", "completion_ids")
"""Arguments that every function may take."""
ON_REQUEST = ("images", "diagnostics")
"""Arguments that only functions get which name them: they are large."""
NOT_APPLICABLE = math.nan


class RewardError(JaxmemError, RuntimeError):
    """Reward functions fail in a way that a run cannot go on with."""


class Outcome(NamedTuple):
    """What a function said of one completion.

    Attributes:
      value: the reward; NaN when the function does not apply or failed.
      kind: "" (no failure), "error" or "timeout".
      text: what went wrong.
    """

    value: float
    kind: str = ""
    text: str = ""


class Case(NamedTuple):
    """One line of a self-test: the value that a completion must get; None means "does not apply"."""

    completion: str
    columns: Mapping[str, Any]
    expected: float | None


class Wants(NamedTuple):
    """Arguments of a function.

    Attributes:
      names: the arguments it takes.
      everything: it also takes every column of the dataset (it has **keywords).
      columns: the columns it cannot do without.
    """

    names: frozenset[str]
    everything: bool
    columns: tuple[str, ...]


class BuiltIn:
    """Base of the built-in functions: frozen dataclasses whose fields are their settings.

    A subclass writes `score(text, *values)` for one completion and the values of its `columns`.

    Attributes:
      judges: "answer", "form" or "both"; the detectors of reward hacking use it.
    """

    judges: ClassVar[str] = "answer"

    @property
    def in_process(self) -> bool:
        """It cannot hang, so it may run in the training process."""
        return True

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the dataset that the function needs."""
        return (self.column,)  # pyrefly: ignore[missing-attribute]

    def prepare(self) -> None:
        """Imports what `score` needs; raises ConfigError when it is not installed."""

    def wants(self) -> Wants:
        """The completions and the columns, nothing else."""
        return Wants(frozenset({"completions", *self.columns}), False, self.columns)

    def cases(self) -> tuple[Case, ...]:
        """The self-test, true under any settings."""
        raise NotImplementedError

    def score(self, text: str, *values: Any) -> float | None:
        """The reward of one completion; None when it does not apply."""
        raise NotImplementedError

    def __call__(self, *, completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """Rewards of several completions."""
        values = [columns[name] for name in self.columns]
        return [self.score(text, *(column[row] for column in values)) for row, text in enumerate(completions)]


@dataclasses.dataclass(frozen=True)
class Imported:
    """A user's own function, "package.module:function"; `settings` become further keyword arguments."""

    path: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    in_process: ClassVar[bool] = False
    judges: ClassVar[str] = "unknown"

    def prepare(self) -> None:
        """Imports the function; raises ConfigError when there is none."""
        self._load()

    def wants(self) -> Wants:
        """Read off the function's signature; `settings` are not asked of the dataset."""
        parameters = inspect.signature(self._load()).parameters.values()
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = [p for p in parameters if p.kind not in variadic and p.name not in self.settings]
        given = (*STANDARD, *ON_REQUEST)
        return Wants(
            names=frozenset(p.name for p in named),
            everything=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
            columns=tuple(p.name for p in named if p.default is p.empty and p.name not in given),
        )

    def __call__(self, **arguments: Any) -> Any:
        """Whatever the function returns; a coroutine is run to its end."""
        result = self._load()(**{**arguments, **self.settings})
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    def _load(self) -> Callable[..., Any]:
        module, _, name = self.path.partition(":")
        try:
            function = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # importing runs the user's code
            raise ConfigError(f"reward function {self.path!r}: {type(error).__name__}: {error}") from error
        if not callable(function):
            raise ConfigError(f"reward function {self.path!r}: {module} has no function {name!r}")
        return function


Function = BuiltIn | Imported


def call(function: Function, arguments: Mapping[str, Any], count: int) -> list[Outcome]:
    """Calls a function on `count` completions; whatever it does wrong becomes an outcome, never an exception."""
    try:
        return outcomes(function(**arguments), count)
    except (Exception, SystemExit) as error:
        return [Outcome(NOT_APPLICABLE, "error", f"{type(error).__name__}: {error}"[:500])] * count


def outcomes(result: Any, count: int) -> list[Outcome]:
    """The values that a function returned, checked.

    Raises:
      TypeError: it is no list of `count` values.
    """
    if isinstance(result, str | Mapping) or not hasattr(result, "__len__"):
        raise TypeError(f"returned {result!r} ({type(result).__name__}), not a list of {count} numbers or None")
    if len(result) != count:
        raise TypeError(f"returned {len(result)} values for {count} completions")
    return [_outcome(value) for value in result]


def _outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(NOT_APPLICABLE)
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return Outcome(number)
    return Outcome(NOT_APPLICABLE, "error", f"returned {value!r} ({type(value).__name__}), not a finite number or None")
