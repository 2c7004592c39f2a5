"""From a lowered program to its part of a plan, also when the compiler refuses it for lack of memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxmem.planning import hlo
from jaxmem.planning.chips import Topology
from jaxmem.planning.memory import memory_by_kind, parse_exhausted, refused
from jaxmem.planning.report import ProgramPlan
from jaxmem.planning.roofline import roofline


def plan_program(
    name: str,
    lower: Callable[[], Any],
    arguments: Mapping[str, Any],
    topology: Topology,
    *,
    resting: Mapping[str, Any] = MappingProxyType({}),
    devices: int = 0,
    model_flops: float = 0.0,
    tokens: float = 0.0,
    unknown_trips: float | Sequence[float] | None = None,
    branch_share: float | Mapping[str, float] = 1.0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> ProgramPlan:
    """Compiles a program and says what it needs.

    Args:
      name: of the program.
      lower: gives `jax.jit(f).lower(...)` for the topology's abstract devices.
      arguments: the program's arguments by kind, as trees of `ShapeDtypeStruct` with shardings.
      topology: what it is compiled for.
      resting: trees that lie in memory meanwhile without being arguments, by kind.
      devices: how many devices the mesh uses; 0 for all.
      model_flops, tokens: of one execution over all devices (see `roofline`).
      unknown_trips, branch_share: see `hlo.count`.
      options: of the compiler (`flags.compiler_options`).
    """
    start = time.perf_counter()
    try:
        with _uncached():
            compiled = lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refusal(name, str(error), arguments, resting, topology, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    program = hlo.count(compiled.as_text(), unknown_trips=unknown_trips, branch_share=branch_share)
    return ProgramPlan(
        name,
        memory_by_kind(compiled, arguments, topology.memory, resting),
        program.counts,
        program.most if program.branches else None,
        roofline(program.counts, topology, devices=devices, model_flops=model_flops, tokens=tokens),
        seconds,
        program.notes,
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the compile cache: it cannot read back programs for devices that are not there."""
    folder = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _refusal(
    name: str,
    message: str,
    arguments: Mapping[str, Any],
    resting: Mapping[str, Any],
    topology: Topology,
    seconds: float,
) -> ProgramPlan:
    """A program that does not fit, with the compiler's figures."""
    largest = parse_exhausted(message).largest
    warnings = tuple(f"allocates {each.size / 2**30:.2f} GiB for {each.what}" for each in largest[:5])
    found = refused(message, arguments, topology.memory, resting)
    return ProgramPlan(name, found, compile_seconds=seconds, warnings=warnings)
