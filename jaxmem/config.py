"""Experiment configurations: from a Python file and `--config.key=value` overrides to frozen dataclasses.

A configuration file holds `get_config()`, or `get_config(argument)` for paths such as `configs/pvm_qwen3vl.py:8b`,
which returns an `ml_collections.ConfigDict`. Nothing is accepted silently: an unknown key, a missing key and a value of
the wrong type are each a ConfigError that names the file or section, the dotted key and the nearest valid one.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxmem.errors import ConfigError, JaxmemError

T = TypeVar("T")


class _NoneParser(flags.ArgumentParser):
    """Overrides of a field that is None in the file: a Python literal where the text is one, else the text."""

    def parse(self, argument: Any) -> Any:
        """The value that `argument` spells."""
        try:
            return ast.literal_eval(argument.capitalize() if argument in ("true", "false", "none") else argument)
        except (SyntaxError, ValueError):
            return argument

    def flag_type(self) -> str:
        """The type's name in absl's messages."""
        return "literal"


config_flags.register_flag_parser_for_type(type(None), _NoneParser())


def suggestion(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """'; did you mean ...?' for the valid names nearest to `name`, else a list of them all; each after `prefix`."""
    names = sorted(valid)
    section, _, key = name.rpartition(".")
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
    near = [n for n in names if n.rpartition(".")[2] == key]  # the same key in another section
    near = (
        near
        or [siblings[n] for n in difflib.get_close_matches(key, siblings)]
        or difflib.get_close_matches(name, names)
    )
    if near:
        return f"; did you mean {' or '.join(repr(prefix + n) for n in near[:3])}?"
    return f"; valid: {', '.join(prefix + n for n in names)}" if names else ""


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ConfigError that says which `what` there are and which is nearest."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}{suggestion(name, table)}")
    return table[name]


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read `spec` ("path.py" or "path.py:argument") and apply `overrides`.

    Args:
      spec: path of a configuration file, with an optional argument for its `get_config` after a colon.
      overrides: command-line words, each "--config.key=value", "--config.flag" or "--noconfig.flag". Values are parsed
        by the type that the file gives to the key.

    Returns:
      the locked ConfigDict: adding a key to it raises.

    Raises:
      ConfigError: naming `spec` and the key, with the nearest valid key.
    """
    config = _read(spec)
    config.lock()
    for word in overrides:
        _override(config, word, spec)
    return config


def _override(config: ConfigDict, word: str, spec: str) -> None:
    """Apply one "--config.key=value" to `config` in place."""
    name = word.split("=", 1)[0].lstrip("-")
    head, _, key = name.partition(".")
    if head not in ("config", "noconfig") or not key:
        raise ConfigError(f"{word!r} is no override; write --config.key=value")
    valid = keys(config)
    if key not in valid:
        raise ConfigError(f"{spec}: unknown key 'config.{key}'{suggestion(key, valid, 'config.')}")
    *path, last = key.split(".")
    section = functools.reduce(lambda section, part: section[part], path, config)
    now = section[last]
    if isinstance(now, ConfigDict) and len(now):
        raise ConfigError(f"{spec}: 'config.{key}' is a section; set one of its keys: {', '.join(now)}")
    values = flags.FlagValues()
    short = word.replace(
        f"{head}.{key}", f"{head}.{last}", 1
    )  # ml_collections reads no path like stages.1_warm_up.loop
    try:
        config_flags.DEFINE_config_dict("config", section, flag_values=values, sys_argv=[short])
        values(["jaxmem", short])
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{spec}: {word}: 'config.{key}' takes {type(now).__name__} (it is {now!r})") from error


def keys(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a nested mapping, sections included, in the file's order."""
    found = []
    for key, value in config.items():
        found.append(prefix + key)
        if isinstance(value, Mapping | ConfigDict):
            found += keys(value, f"{prefix}{key}.")
    return found


def _read(spec: str) -> ConfigDict:
    """Run a configuration file and call its `get_config`."""
    path, colon, argument = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        raise ConfigError(f"no configuration file {path!r} in {Path.cwd()}{suggestion(path, siblings)}")
    if file.suffix != ".py":
        raise ConfigError(f"{path}: a configuration is a Python file with a function get_config()")
    try:
        get_config = getattr(_module(file), "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"{path}: no function get_config()")
        config = get_config(*_arguments(get_config, path, argument if colon else None))
    except JaxmemError:
        raise
    except Exception as error:
        raise ConfigError(f"{spec}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not an ml_collections.ConfigDict")
    return config


def _module(file: Path) -> types.ModuleType:
    """Execute a Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"jaxmem_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(get_config: typing.Callable[..., Any], path: str, argument: str | None) -> tuple[str, ...]:
    """The words to call `get_config` with, checked against its signature."""
    words = () if argument is None else (argument,)
    signature = inspect.signature(get_config)
    try:
        signature.bind(*words)
    except TypeError:
        wanted = "takes no argument" if argument is not None else f"needs an argument: {path}:NAME"
        raise ConfigError(f"{path}: get_config{signature} {wanted}") from None
    return words


def build(cls: type[T], config: Mapping[str, Any] | ConfigDict, where: str) -> T:
    """A (frozen) dataclass from a section of a configuration.

    Nested dataclass fields are built from nested sections; lists become tuples and whole numbers become floats where
    the field's annotation asks for it; every other value must already have the annotated type.

    Args:
      cls: the dataclass.
      config: the section, a mapping from field names to values.
      where: the section's name in error messages, e.g. "config.optimizer".

    Raises:
      ConfigError: an unknown key, a missing key, a value of the wrong type, or one that `cls` itself refuses.
    """
    if isinstance(config, cls):
        return config
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(f"{where}: {config!r} is not a section of keys for {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyrefly: ignore[bad-argument-type]
    _check_names(cls, fields, config, where)
    hints = typing.get_type_hints(cls)
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in config.items()}
    try:
        return cls(**values)
    except JaxmemError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_names(cls: type, fields: Mapping[str, dataclasses.Field], config: Iterable[str], where: str) -> None:
    """Raise unless `config` holds only fields of `cls`, and all those without a default."""
    for name in config:
        if name not in fields:
            raise ConfigError(f"unknown key '{where}.{name}'{suggestion(name, fields, where + '.')}")
    for name, field in fields.items():
        default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in config and not default:
            raise ConfigError(f"missing key '{where}.{name}': {cls.__name__} needs a {_name(field.type)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or a ConfigError at `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # pyrefly: ignore[bad-argument-type]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"'{where}' is {value!r}; valid: {', '.join(repr(a) for a in arguments)}")
        return value
    if hint is tuple or origin is tuple:
        return _convert_tuple(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping | ConfigDict) and isinstance(value, ConfigDict):
        return value.to_dict()
    wrong_bool = isinstance(value, bool) and kind in (int, float)
    if isinstance(kind, type) and (wrong_bool or not isinstance(value, kind)):
        raise _wrong_type(hint, value, where)
    return value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    """`value` as the first member of a union that accepts it; a member of exactly its type comes first."""
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    others = [m for m in members if m is not type(None)]
    if len(others) == 1:
        return _convert(others[0], value, where)
    exact = [m for m in others if type(value) is m]
    for member in exact + others:
        try:
            return _convert(member, value, where)
        except ConfigError:
            continue
    raise _wrong_type(hint, value, where)


def _convert_tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    """A tuple from a tuple or a list, element by element."""
    if not isinstance(value, tuple | list):
        raise _wrong_type(hint, value, where)
    members = typing.get_args(hint)
    if not members:
        return tuple(value)
    if members[-1] is Ellipsis:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise ConfigError(f"'{where}' has {len(value)} elements, needs {len(members)}")
    return tuple(_convert(m, v, f"{where}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))


def _wrong_type(hint: Any, value: Any, where: str) -> ConfigError:
    return ConfigError(f"'{where}' is {value!r} ({type(value).__name__}), needs {_name(hint)}")


def _name(hint: Any) -> str:
    """How an annotation reads: 'int', 'tuple[int, ...]', 'float | None'."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
