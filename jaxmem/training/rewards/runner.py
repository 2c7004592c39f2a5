"""Calls the reward functions of a configuration, in this process or in ones that can be killed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from jaxmem import config as configs
from jaxmem.errors import ConfigError, DataError
from jaxmem.training.rewards.functions import (
    ON_REQUEST,
    BuiltIn,
    Case,
    Outcome,
    RewardError,
    Wants,
    call,
)
from jaxmem.training.rewards.pool import Pool, Task
from jaxmem.training.rewards.scored import Scored, collect
from jaxmem.training.rewards.settings import Reward, RewardConfig

_DUMMY = "I do not know."


class RewardRunner:
    """Starts the processes, tests every function, and then scores completions; use it in a `with` block.

    Args:
      config: functions and limits.
      columns: the columns of one row of the dataset; users' functions are tried on it.
      prompt: the chat of that row.

    Raises:
      ConfigError: a function cannot be imported, needs a column that the row lacks, or fails its self-test.
    """

    def __init__(
        self, config: RewardConfig, columns: Mapping[str, Any], prompt: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.config, self._rewards = config, config.rewards
        self._failed_steps = dict.fromkeys(config.labels, 0)
        self._pool: Pool | None = None
        self._wants = {r.label: r.function.wants() for r in self._rewards if isinstance(r.function, BuiltIn)}
        for reward in self._rewards:
            if reward.label in self._wants:
                check_columns(reward.label, self._wants[reward.label], columns)
        try:
            self._start()
            for reward in self._rewards:
                check_columns(reward.label, self._wants[reward.label], columns)
            self._test(columns, list(prompt or [{"role": "user", "content": "?"}]))
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Prepares the functions; starts processes when one needs them."""
        self._outside = tuple(reward for reward in self._rewards if not reward.function.in_process)
        for reward in self._rewards:
            if reward.function.in_process:
                reward.function.prepare()
        if self._outside:
            config, functions = self.config, [reward.function for reward in self._outside]
            self._pool = Pool(functions, config.workers, config.timeout_s, config.startup_s)
            self._wants |= {r.label: wants for r, wants in zip(self._outside, self._pool.wants, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        images: Sequence[Any] | None = None,
        diagnostics: Sequence[Any] | None = None,
    ) -> Scored:
        """Scores n completions.

        Args:
          prompts: n chats without the answer.
          completions: n texts.
          completion_ids: n lists of token ids.
          columns: the dataset's columns, each with one value per completion.
          images, diagnostics: one entry per completion, for the functions that name them.

        Raises:
          DataError: an argument has another length than n.
          ConfigError: a column that a function needs is missing.
          RewardError: every row of a function failed `max_failed_steps` times in a row.
        """
        start, count = time.perf_counter(), len(completions)
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name, value in (("images", images), ("diagnostics", diagnostics)):
            if value is not None or name not in columns:
                given[name] = value if value is not None else [None] * count
        for name, values in {**columns, **given}.items():
            if len(values) != count:
                raise DataError(f"rewards: {name!r} has {len(values)} entries for {count} completions")
        for reward in self._rewards:
            check_columns(reward.label, self._wants[reward.label], columns)
        found = self._outcomes(self._rewards, [(given, columns, count)] * len(self._rewards))
        self._count_failures(found)
        return collect(self.config.labels, found, count, time.perf_counter() - start)

    def _outcomes(
        self, rewards: Sequence[Reward], rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], int]]
    ) -> list[list[Outcome]]:
        """Outcomes of reward i on rows i = (standard arguments, columns, count); all processes work at once."""
        tasks, owners = [], []
        found: list[list[Outcome]] = [[] for _ in rewards]
        for i, (reward, (given, columns, count)) in enumerate(zip(rewards, rows, strict=True)):
            taken = _taken(self._wants[reward.label], given, columns)
            size = reward.chunk or max(count, 1)
            for first in range(0, count, size):
                piece = {name: list(values[first : first + size]) for name, values in taken.items()}
                rest = min(size, count - first)
                if reward.function.in_process:
                    found[i] += call(reward.function, piece, rest)
                else:
                    tasks.append(Task(self._outside.index(reward), piece, rest))
                    owners.append(i)
        if tasks and self._pool is not None:
            for owner, outcomes in zip(owners, self._pool.run(tasks), strict=True):
                found[owner] += outcomes
        return found

    def _count_failures(self, found: Sequence[Sequence[Outcome]]) -> None:
        """Stops a run in which a function has failed on every row for too long."""
        for label, outcomes in zip(self.config.labels, found, strict=True):
            failed = bool(outcomes) and all(outcome.kind for outcome in outcomes)
            self._failed_steps[label] = self._failed_steps[label] + 1 if failed else 0
            if self._failed_steps[label] >= self.config.max_failed_steps:
                raise RewardError(
                    f"reward function {label!r} failed on every completion of {self._failed_steps[label]} steps in "
                    f"a row (max_failed_steps); the last failure: {outcomes[-1].text}"
                )

    def _test(self, columns: Mapping[str, Any], prompt: list[Any]) -> None:
        """The self-test: cases of built-in functions, one call of users' functions."""
        rewards, rows, cases = [], [], []
        for reward in self._rewards:
            own = reward.function.cases() if isinstance(reward.function, BuiltIn) else (Case(_DUMMY, columns, None),)
            cases += [(reward, case) for case in own]
        for reward, case in cases:
            given = {"prompts": [prompt], "completions": [case.completion], "completion_ids": [[0]]}
            given |= {name: [None] for name in ON_REQUEST}
            rewards.append(reward)
            rows.append((given, {name: [value] for name, value in case.columns.items()}, 1))
        for (reward, case), [outcome] in zip(cases, self._outcomes(rewards, rows), strict=True):
            _judge(reward, case, outcome)


def _judge(reward: Reward, case: Case, outcome: Outcome) -> None:
    """Raises ConfigError when a self-test went wrong."""
    what = f"reward function {reward.label!r} fails its self-test on {case.completion!r}"
    if outcome.kind:
        raise ConfigError(f"{what}: {outcome.text}")
    if not isinstance(reward.function, BuiltIn):
        return
    expected = np.nan if case.expected is None else case.expected
    if not np.isclose(outcome.value, expected, rtol=0, atol=1e-9, equal_nan=True):
        raise ConfigError(f"{what} with {dict(case.columns)}: it gives {outcome.value}, expected {case.expected}")


def check_columns(label: str, wants: Wants, columns: Mapping[str, Any]) -> None:
    """Raises ConfigError when a dataset lacks a column that a function needs."""
    for name in wants.columns:
        if name not in columns:
            have = ", ".join(map(repr, sorted(columns))) or "no columns"
            raise ConfigError(
                f"reward function {label!r} needs the column {name!r}, which the dataset lacks "
                f"(it has {have}){configs.suggestion(name, columns) if columns else ''}"
            )


def _taken(wants: Wants, given: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes, of those that there are."""
    everything = {**columns, **given} if wants.everything else {}
    named = {name: value for name, value in {**columns, **given}.items() if name in wants.names}
    return {name: value for name, value in everything.items() if name not in ON_REQUEST} | named
