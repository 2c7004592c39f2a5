"""The command line: `jaxmem VERB --flag=value --config=FILE.py --config.key=value`.

One table lists the verbs (`jaxmem.verbs`). A verb's flags become keyword arguments of its function, which is imported
when the verb runs, so `jaxmem --help` and a misspelt flag answer without loading jax.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

import jaxmem
from jaxmem import config as configs
from jaxmem.errors import ConfigError, JaxmemError
from jaxmem.verbs import VERBS, Verb

_DEFINE: Mapping[str, Callable[..., Any]] = {
    "text": flags.DEFINE_string,
    "texts": flags.DEFINE_multi_string,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "bool": flags.DEFINE_boolean,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own words); returns the exit code.

    A JaxmemError becomes one message on standard error and exit code 2; `--debug` shows its traceback instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        return run(words)
    except JaxmemError as error:
        if debug:
            raise
        print(f"jaxmem: {error}", file=sys.stderr)
        if getattr(error, "gone", False):  # jax would wait for the host that is gone, and then abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("jaxmem: interrupted", file=sys.stderr)
        return 130


def run(words: Sequence[str]) -> int:
    """Dispatch to a verb; raises ConfigError for a command line that makes no sense."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"jaxmem {jaxmem.__version__}")
        return 0
    name = words[0]
    verb = configs.choose(VERBS, name, "verb")
    if any(w in ("-h", "--help") for w in words[1:]):
        print(verb_usage(name, verb))
        return 0
    arguments = parse(name, verb, words[1:])
    module, function = verb.target.split(":")
    return getattr(importlib.import_module(module), function)(**arguments) or 0


def parse(name: str, verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for a verb's function from the words after the verb."""
    overrides, words = split_overrides(words)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow the argument
    for flag in verb.flags:
        _DEFINE[flag.kind](flag.name, flag.default, flag.help, flag_values=values)
    if verb.config != "none":
        flags.DEFINE_string("config", None, "", flag_values=values)
    try:
        rest = values(["jaxmem", *words])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(
            f"{name}: unknown flag --{error.flagname}{configs.suggestion(error.flagname, _flag_names(verb), '--')}"
        ) from error
    except flags.Error as error:
        raise ConfigError(f"{name}: {error}") from error
    arguments = {flag.name: values[flag.name].value for flag in verb.flags}
    arguments |= _config(name, verb, values, overrides) | _argument(name, verb, rest)
    return arguments


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the --config.key=value words, the other words); `--config.key value` is joined to one word."""
    overrides, others, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith(("--config.", "--noconfig.")):
            others.append(word)
            continue
        if "=" not in word and word.startswith("--config.") and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        overrides.append(word)
    return overrides, others


def _config(name: str, verb: Verb, values: flags.FlagValues, overrides: Sequence[str]) -> dict[str, Any]:
    """{"config": ConfigDict or None} for a verb that takes one, else {}."""
    spec = values["config"].value if verb.config != "none" else None
    if verb.config == "required" and spec is None:
        raise ConfigError(f"{name} needs --config=FILE.py; for example: {verb.example}")
    if spec is None and overrides:
        raise ConfigError(f"{name}: {overrides[0]} changes a configuration, but there is no --config=FILE.py")
    if verb.config == "none":
        return {}
    return {"config": None if spec is None else configs.load(spec, overrides)}


def _argument(name: str, verb: Verb, rest: Sequence[str]) -> dict[str, str]:
    """The positional word of a verb under its lower-case name; anything else left over is an error."""
    wanted = 0 if verb.argument is None else 1
    if len(rest) < wanted:
        raise ConfigError(f"{name} needs {verb.argument}; for example: {verb.example}")
    if len(rest) > wanted:
        raise ConfigError(f"{name}: unexpected word {rest[wanted]!r}; flags are written --flag=value")
    return {} if verb.argument is None else {verb.argument.lower(): rest[0]}


def _flag_names(verb: Verb) -> list[str]:
    return [flag.name for flag in verb.flags] + ["help", "debug"] + (["config"] if verb.config != "none" else [])


def usage() -> str:
    """The text of `jaxmem --help`."""
    verbs = [(name, verb.summary) for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"jaxmem {jaxmem.__version__}: visual memories for frozen vision-language models",
            "",
            "usage: jaxmem VERB [--flag=value ...] [--config=FILE.py --config.key=value ...]",
            "",
            *_columns(verbs),
            "",
            "  jaxmem VERB --help   the flags of a verb",
            "  --debug              show the traceback of an error",
        ]
    )


def verb_usage(name: str, verb: Verb) -> str:
    """The text of `jaxmem VERB --help`."""
    argument = f" {verb.argument}" if verb.argument else ""
    rows = [
        (f"--{f.name}", f.help + ("" if f.default in (None, [], False) else f" (default: {f.default})"))
        for f in verb.flags
    ]
    if verb.config != "none":
        rows.append(("--config", f"a configuration file, FILE.py or FILE.py:ARGUMENT ({verb.config})"))
        rows.append(("--config.KEY", "replaces one value of the file; dots reach into sections"))
    rows.append(("--debug", "show the traceback of an error"))
    lines = [f"usage: jaxmem {name}{argument} [--flag=value ...]", "", f"  {verb.summary}", "", *_columns(rows)]
    return "\n".join([*lines, "", f"example: {verb.example}"])


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}   {right}" for left, right in rows]


if __name__ == "__main__":
    sys.exit(main())
