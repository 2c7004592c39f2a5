"""SIGTERM and SIGINT as ends of a run that lose nothing."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxmem.errors import JaxmemError

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Interrupted(JaxmemError):
    """Somebody asked the run to stop; what it did is in a checkpoint, and the same command goes on.

    Attributes:
      exit_code: of the command: "try again" in the table of sysexits (EX_TEMPFAIL), so that a launcher can tell it
        from a failure.
    """

    exit_code = 75


class Signals:
    """A block that a first SIGTERM or SIGINT ends in order; a second one ends the process at once.

    Args:
      wait: True only takes note of the signal in `caught`, so that the step under way can end; False raises
        Interrupted wherever the program is, which is right as long as nothing was learnt that is not saved yet.

    Attributes:
      caught: name of the signal, or ""; blocks inside one another share what they have caught.
    """

    def __init__(self, wait: bool = True) -> None:
        self.caught, self._wait, self._old = "", wait, {}
        self._outer: Signals | None = None
        self._raised = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            self._outer = outer if isinstance(outer, Signals) else None
            self.caught = self._outer.caught if self._outer else ""
            self._old = {number: signal.signal(number, self._handle) for number in CAUGHT}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        del frame
        if self.caught:
            _end(number)
        self.caught = signal.Signals(number).name
        if not self._wait:
            self._raised = True
            raise Interrupted(self._reason())

    def _reason(self) -> str:
        return f"stopped by {self.caught} outside of the steps; the same command goes on"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._outer is not None:
            self._outer.caught = self.caught
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: a handler that is not Python's
        if self._raised and isinstance(error, Exception) and not isinstance(error, Interrupted):
            raise Interrupted(self._reason()) from error  # a library took the signal for a fault of its own


def _end(number: int) -> None:
    """What the signal does to a process that has no handler for it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
