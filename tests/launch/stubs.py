"""Commands of clouds and clusters that only write down how they were called."""

import json
import os
import stat
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
_RECORD = """#!/usr/bin/env python3
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


class Stubs:
    """A folder for the front of PATH with recording commands, and what they recorded."""

    def __init__(self, folder):
        self.folder, self._calls = folder, folder / "calls.jsonl"
        folder.mkdir()
        self.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def add(self, name, more="", record=True):
        """A command that records its arguments and then runs `more`, lines of Python."""
        path = self.folder / name
        path.write_text((_RECORD if record else "#!/usr/bin/env python3\n").format(calls=str(self._calls), name=name))
        with path.open("a") as file:
            file.write(more)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def calls(self, name):
        """The arguments of every call of a command, in order."""
        if not self._calls.exists():
            return []
        lines = map(json.loads, self._calls.read_text().splitlines())
        return [words[1:] for words in lines if words[0] == name]
