"""The command line: `jaxmem VERB --flag=value --config=FILE.py --config.key=value`.

One table lists the verbs. A verb's flags become keyword arguments of its function, which is imported when the verb
runs, so `jaxmem --help` and a misspelt flag answer without loading jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

import jaxmem
from jaxmem import config as configs
from jaxmem.errors import ConfigError, JaxmemError

_DEFINE: Mapping[str, Callable[..., Any]] = {
    "text": flags.DEFINE_string,
    "texts": flags.DEFINE_multi_string,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "bool": flags.DEFINE_boolean,
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a verb: `kind` is a key of `_DEFINE`; "texts" may be given several times."""

    name: str
    kind: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: `target` is "module:function"; `config` is "required", "optional" or "none".

    `argument` names the one positional word that the verb needs, if any.
    """

    target: str
    summary: str
    flags: tuple[Flag, ...] = ()
    config: str = "none"
    argument: str | None = None
    example: str = ""


_JSON = Flag("json", "bool", False, "print one JSON object and nothing else")

VERBS: Mapping[str, Verb] = {
    "train": Verb(
        "jaxmem.training.run:main",
        "train a memory from examples or by rewards; running the same command again resumes",
        config="required",
        example="jaxmem train --config=configs/digits_quickstart.py",
    ),
    "generate": Verb(
        "jaxmem.sampling.cli:main",
        "answer a prompt about images, streaming to the terminal",
        (
            Flag(
                "model",
                "text",
                None,
                "a Hugging Face folder (default: the shipped tiny backbone)",
            ),
            Flag("memory", "text", None, "a folder with a trained memory; absent: the bare backbone"),
            Flag("prompt", "text", None, "the user's words; read from standard input when absent"),
            Flag("image", "texts", [], "an image file, before the prompt's words; repeat for several"),
            Flag("system", "text", None, "a system message"),
            Flag("max_new_tokens", "int", 256, "stop after so many tokens"),
            Flag("temperature", "float", 0.0, "0 takes the most likely token"),
            Flag("top_k", "int", 0, "sample among the k most likely tokens; 0 is off"),
            Flag("top_p", "float", 1.0, "sample among the tokens that hold this share of the probability"),
            Flag("min_p", "float", 0.0, "drop tokens below this share of the most likely one"),
            Flag("repetition_penalty", "float", 1.0, "above 1 makes seen tokens less likely"),
            Flag("seed", "int", 0, "random seed of the sampling"),
            Flag("dtype", "text", None, "float32, bfloat16 or float16 (default: as stored)"),
        ),
        example='jaxmem generate --image=board.png --prompt="Which digit is in row 1, column 2?"',
    ),
    "study": Verb(
        "jaxmem.analysis.study:main",
        "train several arms with several seeds and compare them; running the same command again resumes",
        config="required",
        example="jaxmem study --config=configs/digits_benchmark.py",
    ),
    "reward": Verb(
        "jaxmem.training.rewards.cli:main",
        "show what reward functions give for the completions of a JSON-lines file",
        (
            Flag("function", "texts", [], "a built-in, package.module:function, or a JSON object; repeat for several"),
            Flag("timeout", "float", 10.0, "seconds that verifying one completion may take"),
            _JSON,
        ),
        argument="FILE",
        example="jaxmem reward completions.jsonl --function=pvm --function=math",
    ),
    "invocations": Verb(
        "jaxmem.analysis.invocations_cli:main",
        "show where a trained VisMem called for memory, by type and place",
        (_JSON,),
        argument="RUN",
        example="jaxmem invocations runs/digits_vismem/seed_0/3_invocation",
    ),
    "plan": Verb(
        "jaxmem.planning.cli:main",
        "say what a run would need on a TPU pod or GPUs, without having them",
        (
            Flag("topology", "texts", [], "chips and shape, v5e:4x4 or h100:2x8 (nodes x GPUs); repeat for a table"),
            Flag("mesh", "texts", [], "axes such as fsdp=4,sequence=4 instead of config.mesh; repeat for a table"),
            Flag("tokens", "int", 0, "length of the planned rows; 0 is the longest of config.data.buckets"),
            Flag("patches", "int", 0, "image patches of the planned rows; 0 is the longest of config.data.buckets"),
            Flag("sweep", "bool", False, "one line per topology, mesh and program"),
            Flag("scaling_svg", "text", None, "draw weak scaling to this file; the batch grows with the chips"),
            _JSON,
        ),
        config="required",
        example="jaxmem plan --config=configs/pvm_qwen3vl.py:8b --topology=v5e:4x4",
    ),
    "bench": Verb(
        "jaxmem.bench.run:main",
        "measure jaxmem against its peer in one run",
        (_JSON,),
        argument="NAME",
        example="jaxmem bench decode --json",
    ),
    "doctor": Verb(
        "jaxmem.doctor:main",
        "show versions, devices, memory and what is missing for what",
        (Flag("checkpoint", "text", None, "a run's folder: verify its checkpoints instead"), _JSON),
        example="jaxmem doctor",
    ),
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
