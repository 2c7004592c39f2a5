"""What runs in a verifying process: it receives functions once, then calls until it is closed or killed."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from jaxmem.training.rewards.functions import call

_GRACE = 5.0


def main() -> None:
    """Serves the connection whose file descriptor is the first command-line word.

    First comes the tuple of functions, answered by (list of Wants, "") or (None, what went wrong). Then come tasks
    (function index, arguments, number of completions, seconds), each answered by a list of outcomes.
    """
    connection = Connection(int(sys.argv[1]))
    try:
        functions = _prepare(connection)
        while True:
            index, arguments, count, seconds = connection.recv()
            # The parent kills at `seconds`. Should it be gone, the alarm, which nothing here handles, ends the process.
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
            result = call(functions[index], arguments, count)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)
    except (EOFError, ConnectionError):
        return  # closed


def _prepare(connection: Connection) -> tuple:
    """The functions, imported; reports to the other side."""
    try:
        functions = connection.recv()
        for function in functions:
            function.prepare()
        wants = [function.wants() for function in functions]
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        connection.send((None, str(error) or type(error).__name__))
        raise EOFError from error
    connection.send((wants, ""))
    return functions
