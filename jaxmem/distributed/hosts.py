"""Several hosts as one program: how they find one another, what one of them does for all, and waits that end.

Every host runs the same command. They meet at the same places in the same order (`share`, `once`), and every meeting
has a time limit. A host that fails says so at the next meeting, so that all end with its message instead of waiting.
With a single process all of this is free of cost and of communication.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.errors import ConfigError, JaxmemError

T = TypeVar("T")
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""What the environment of a plain node says: host:port of process 0, number of processes, and which one this is."""


class HostError(JaxmemError):
    """Another host failed, is gone, or is somewhere else in the program.

    Attributes:
      gone: a host is missing: there is nobody left to say goodbye to, so the process had better end at once.
      shared: every host raises it already.
    """

    gone = False
    shared = False


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How hosts find one another and how long they wait.

    Attributes:
      start: "auto" joins the others where the environment names them (`JAX_COORDINATOR_ADDRESS`, SLURM, TPU VMs, GKE);
        "off" runs this process alone.
      timeout_s: seconds that a host waits for the others at a meeting; longer than the slowest thing that one host
        does while the others wait, such as judging a step's completions.
      heartbeat_s: seconds after which a host without a sign of life counts as dead, and all others end.
    """

    start: Literal["auto", "off"] = "auto"
    timeout_s: float = 900.0
    heartbeat_s: int = 100

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.heartbeat_s < 1:
            raise ConfigError(f"hosts: timeout_s {self.timeout_s} and heartbeat_s {self.heartbeat_s} must be positive")


_config, _meetings = HostsConfig(), 0


def start(config: HostsConfig) -> None:
    """Joins the other hosts, if there are any; before the first use of a device. A second call does nothing.

    Raises:
      ConfigError: the environment names a coordinator but not which of how many processes this is.
      HostError: the others did not come within `timeout_s`.
    """
    global _config
    _config = config
    if config.start == "off" or jax.distributed.is_initialized() or (found := _environment()) is None:
        return
    limits = {"initialization_timeout": int(config.timeout_s), "heartbeat_timeout_seconds": config.heartbeat_s}
    try:
        jax.distributed.initialize(**found, **limits)
    except (RuntimeError, ValueError) as error:
        raise HostError(
            f"the hosts did not find one another within {config.timeout_s:g} s (hosts.timeout_s): {_brief(error)}."
            f" Was the same command started on every host, and can they reach {found.get('coordinator_address', '')}"
            " host 0?"
        ) from error
    atexit.register(_leave)


def _environment() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for a process on its own."""
    if COORDINATOR in os.environ:
        if absent := [name for name in (COUNT, INDEX) if name not in os.environ and "SLURM_PROCID" not in os.environ]:
            raise ConfigError(f"{COORDINATOR} is set but not {' and '.join(absent)}: every process needs all three")
        try:
            given = {key: int(os.environ[name]) for key, name in _NUMBERS if name in os.environ}
        except ValueError as error:
            raise ConfigError(f"{COUNT} and {INDEX} must be whole numbers: {error}") from error
        return {"coordinator_address": os.environ[COORDINATOR], **given}
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {}
    tpu = importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return {} if tpu and (Path("/dev/accel0").exists() or any(Path("/dev").glob("vfio/[0-9]*"))) else None


_NUMBERS = (("num_processes", COUNT), ("process_id", INDEX))


def _leave() -> None:
    """Says goodbye without a traceback when the others are gone already."""
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def count() -> int:
    """Number of hosts (processes)."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which host this is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def first() -> bool:
    """Is this the host that writes logs and reports and judges completions for all?"""
    return index() == 0


def share(what: str, value: Any, combine: Callable[[list[Any]], T]) -> T:
    """A meeting: every host gives a value, all get `combine` of the values in the order of the hosts.

    Args:
      what: says what the hosts meet for; must be the same on all.
      value: anything that pickles; small.
      combine: runs on host 0 (and in a process on its own).

    Raises:
      HostError: a host failed, did not come within the time limit, or came for something else.
    """
    return combine([value]) if count() == 1 else _meet(what, "value", value, combine)


def once(what: str, function: Callable[[], T]) -> T:
    """What `function` returns on host 0, on every host; an error of it ends all hosts."""
    if count() == 1:
        return function()
    return share(what, function() if first() else None, lambda values: values[0])


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Raises HostError on every host that names all facts in which a host differs from host 0."""

    def compare(all_facts: list[Mapping[str, Any]]) -> list[str]:
        mine = all_facts[0]
        return [
            f"{name}: host 0 has {mine.get(name)!r}, host {host} has {other.get(name)!r}"
            for host, other in enumerate(all_facts)
            for name in [*mine, *(name for name in other if name not in mine)]
            if mine.get(name) != other.get(name)
        ]

    if other := share(what, dict(facts), compare):
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        raise _shared(HostError(f"the hosts do not run the same {what}: {'; '.join(other[:8])}{more}"))


def fetch(tree: Any) -> Any:
    """Arrays as numpy arrays on every host, wherever their pieces lie. All hosts call it at the same place."""

    def one(leaf: Any) -> np.ndarray:
        if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all hosts run: where one fails, all end with its message."""
    try:
        yield
        _drain()
    except BaseException as error:
        if count() > 1 and not getattr(error, "shared", False):
            _tell(error)
        raise


def _tell(error: BaseException) -> None:
    """Tells the other hosts of this host's error; HostError where a computation failed because one of them is gone."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        text = (
            f"host {index()}: a computation over all hosts failed, most likely because one of them is gone:"
            f" {_brief(error)}. Look at the other hosts' output; the same command on all goes on from the last"
            " checkpoint"
        )
        raise _shared(HostError(text), gone=True) from error
    with contextlib.suppress(HostError):
        _meet("", "fault", f"{type(error).__name__}: {error}", lambda values: None)


def _drain() -> None:
    """Waits until every device of every host has finished: a host that leaves earlier may leave another one hanging."""
    if count() > 1:
        mesh = Mesh(np.array(jax.devices()), ("all",))
        ones = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(mesh.size)[index]
        )
        jax.block_until_ready(jax.jit(jnp.sum)(ones))
        share("the end", None, lambda values: None)


def _meet(what: str, kind: str, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
    """One meeting through the coordination service: (what, kind, value) of every host to the result of host 0."""
    global _meetings
    _meetings += 1
    place, limit, client = f"jaxmem/{_meetings}", int(1000 * _config.timeout_s), _client()
    try:
        client.key_value_set_bytes(f"{place}/{index():06d}", pickle.dumps((what, kind, value)))
        client.wait_at_barrier(place, limit)
        if first():
            entries = [pickle.loads(blob) for _, blob in sorted(client.key_value_dir_get_bytes(f"{place}/"))]
            fault = _fault(entries)
            result = None if fault else combine([entry[2] for entry in entries])
            client.key_value_set_bytes(f"{place}.result", pickle.dumps((fault, result)))
            client.key_value_delete(f"{place}/")
            client.key_value_delete(f"jaxmem/{_meetings - 2}.result")
        else:
            fault, result = pickle.loads(client.blocking_key_value_get_bytes(f"{place}.result", limit))
    except jax.errors.JaxRuntimeError as error:
        raise _shared(HostError(_absent(what, error)), gone=True) from error
    if fault:
        raise _shared(HostError(fault))
    return result


def _fault(entries: Sequence[tuple[str, str, Any]]) -> str:
    """What went wrong before a meeting, or that hosts came for different things; else ""."""
    faults = [f"host {host} failed: {value}" for host, (_, kind, value) in enumerate(entries) if kind == "fault"]
    places = {what for what, kind, _ in entries if kind != "fault"}
    if not faults and len(places) > 1:
        where = ", ".join(f"host {host} at {what!r}" for host, (what, _, _) in enumerate(entries))
        faults = [f"the hosts are at different places ({where}); do they read the same data and configuration?"]
    return "; ".join(faults)


def _absent(what: str, error: Exception) -> str:
    """Which hosts did not come, as far as the coordination service says."""
    late = re.search(r"timed out task names:\s*((?:\S*\d+[\s,]*)+)", str(error))
    numbers = re.findall(r"Task (\d+) heartbeat", str(error)) + re.findall(r"(\d+)(?=[\s,]|$)", late[1] if late else "")
    missing = sorted({int(number) for number in numbers} - {index()})
    who = f"host {', '.join(map(str, missing))}" if missing else "a host"
    return (
        f"host {index()} waited at {what!r}, and {who} did not come within {_config.timeout_s:g} s (hosts.timeout_s) or"
        f" is gone: {_brief(error)}. Look at that host's output; the same command on all hosts goes on from the last"
        " checkpoint"
    )


def _brief(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _shared(error: HostError, gone: bool = False) -> HostError:
    """Marks an error that every host raises already, or that no other host can be told of."""
    error.shared, error.gone = True, gone
    return error


def _client() -> Any:
    """The coordination service; jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
