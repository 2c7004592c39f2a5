"""Processes that call reward functions and can be killed.

They are started as `python -c`, not by forking: a process with jax in it must not fork, and a fresh interpreter imports
neither jax nor the user's main script. A process that overruns its time, or dies, is replaced.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe, connection
from typing import Any, NamedTuple

from jaxmem.errors import ConfigError
from jaxmem.training.rewards.functions import NOT_APPLICABLE, Function, Outcome, RewardError, Wants

_CODE = "from jaxmem.training.rewards.worker import main; main()"


class Task(NamedTuple):
    """A call: the function's index, its arguments and the number of completions in them."""

    function: int
    arguments: dict[str, Any]
    count: int


class Worker:
    """One process. It is starting or working while `deadline` is a number, idle while it is None.

    Attributes:
      task: index of the task it works on; None while starting or idle.
      connection: to the process.
    """

    def __init__(self, functions: Sequence[Function], startup_s: float) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", _CODE, str(theirs.fileno())]
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what functions print must not mix with the output of a command
            start_new_session=True,  # its own children die with it, and Ctrl-C stays with the parent
        )
        theirs.close()
        self.task: int | None = None
        self.deadline: float | None = time.monotonic() + startup_s
        with contextlib.suppress(ConnectionError):  # a process that died at once shows when it is read
            self.connection.send(tuple(functions))

    def give(self, index: int, task: Task, seconds: float) -> None:
        """Starts a task; raises ConnectionError when the process is gone."""
        self.connection.send((*task, seconds))
        self.task, self.deadline = index, time.monotonic() + seconds

    def receive(self) -> Any:
        """The process's message; None when it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def kill(self) -> int:
        """Ends the process and its children; returns the exit code that it had or got."""
        if not self.connection.closed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.connection.close()
        return self.process.wait()


def _environment() -> dict[str, str]:
    """The child finds the modules that this process finds, and leaves accelerators alone."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


class Pool:
    """`workers` processes that know `functions`.

    Args:
      functions: what to call.
      workers: number of processes.
      timeout_s: seconds per completion.
      startup_s: seconds to start a process and import the functions.

    Attributes:
      wants: what each function takes.

    Raises:
      ConfigError: a function cannot be imported, or not within `startup_s`.
    """

    def __init__(self, functions: Sequence[Function], workers: int, timeout_s: float, startup_s: float) -> None:
        self._functions, self._timeout_s, self._startup_s = functions, timeout_s, startup_s
        self.wants: list[Wants] = []
        self._workers: list[Worker] = []
        try:
            self._workers += [Worker(functions, startup_s) for _ in range(workers)]
            while any(worker.deadline is not None for worker in self._workers):
                self._advance([], [])
        except RewardError as error:
            self.close()
            raise ConfigError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes."""
        while self._workers:
            self._workers.pop().kill()

    def run(self, tasks: Sequence[Task]) -> list[list[Outcome]]:
        """The outcomes of every task, in order; time-outs, exceptions and deaths are outcomes too.

        Raises:
          RewardError: a killed process cannot be started again.
        """
        if not self._workers:
            raise RewardError("the processes for reward functions are closed; make a new RewardRunner")
        results: list[list[Outcome]] = [[] for _ in tasks]
        waiting = collections.deque(range(len(tasks)))
        try:
            while waiting or any(worker.task is not None for worker in self._workers):
                self._hand_out(waiting, tasks, results)
                self._advance(tasks, results)
        except BaseException:  # an interrupted call leaves answers in the pipes
            self.close()
            raise
        return results

    def _hand_out(self, waiting: collections.deque[int], tasks: Sequence[Task], results: list[list[Outcome]]) -> None:
        """Gives waiting tasks to idle processes."""
        for place, worker in enumerate(self._workers):
            if not waiting or worker.deadline is not None:
                continue
            index = waiting.popleft()
            try:
                worker.give(index, tasks[index], self._seconds(tasks[index]))
            except ConnectionError:  # it died while idle
                self._replace(place)
                waiting.appendleft(index)
            except Exception as error:  # the arguments cannot be pickled
                text = f"the arguments cannot be sent to a process: {type(error).__name__}: {error}"
                results[index] = _failure(tasks[index], "error", text)

    def _advance(self, tasks: Sequence[Task], results: list[list[Outcome]]) -> None:
        """Waits until a process answers, dies or overruns its time, and deals with all that did."""
        busy = {worker.connection: worker.deadline for worker in self._workers if worker.deadline is not None}
        if not busy:
            return
        ready = connection.wait(list(busy), max(0.0, min(busy.values()) - time.monotonic()))
        for place, worker in enumerate(self._workers):
            if worker.connection in ready:
                self._answered(place, worker.receive(), tasks, results)
            elif worker.deadline is not None and time.monotonic() >= worker.deadline:
                self._overran(place, tasks, results)

    def _answered(self, place: int, message: Any, tasks: Sequence[Task], results: list[list[Outcome]]) -> None:
        worker = self._workers[place]
        if message is None:
            text = f"the process ended with exit code {worker.kill()}"
            if worker.task is None:
                raise RewardError(f"a process for reward functions does not start: {text}")
            results[worker.task] = _failure(tasks[worker.task], "error", text)
            self._replace(place)
            return
        if worker.task is None:
            self.wants, text = message[0] or [], message[1]
            if text:
                raise RewardError(text)
        else:
            results[worker.task] = message
        worker.task = worker.deadline = None

    def _overran(self, place: int, tasks: Sequence[Task], results: list[list[Outcome]]) -> None:
        index = self._workers[place].task
        if index is None:
            raise RewardError(
                f"a process for reward functions did not start within startup_s = {self._startup_s:g} seconds"
            )
        text = f"no answer within {self._seconds(tasks[index]):g} seconds; its process was killed"
        results[index] = _failure(tasks[index], "timeout", text)
        self._replace(place)

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place] = Worker(self._functions, self._startup_s)

    def _seconds(self, task: Task) -> float:
        return self._timeout_s * task.count


def _failure(task: Task, kind: str, text: str) -> list[Outcome]:
    return [Outcome(NOT_APPLICABLE, kind, text)] * task.count
