"""Flags of the TPU and GPU compilers that let a pod compute while it communicates, as presets.

TPU flags are read once from `LIBTPU_INIT_ARGS`, GPU flags from `XLA_FLAGS`, both when a backend starts; an unknown flag
ends the process there. A flag that the environment has already stays as it is. Ahead-of-time compiling takes the same
flags as `compiler_options` and makes the same program.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from jaxmem.errors import ConfigError

Backend = Literal["tpu", "gpu"]
VARIABLES: dict[Backend, str] = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A compiler flag: its name without dashes, its value as written in the environment, and why it is set."""

    name: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Flags of the TPU compiler and of the GPU compiler."""

    tpu: tuple[Flag, ...] = ()
    gpu: tuple[Flag, ...] = ()

    def flags(self, backend: Backend) -> tuple[Flag, ...]:
        """The flags for one backend."""
        return self.tpu if backend == "tpu" else self.gpu


_HIDE = Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "starts collectives early and computes meanwhile")

# libtpu 0.0.42 has on by itself what is marked (on): these are pinned, so that another libtpu plans the same step.
TPU_OVERLAP = (
    Flag("xla_tpu_enable_latency_hiding_scheduler", "true", "(on) starts collectives early and computes meanwhile"),
    Flag("xla_tpu_enable_async_collective_fusion", "true", "(on) steps of a collective run inside a product's fusion"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "(on) so for the gathers of fsdp weights"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", "so for the sums after tensor-cut products"),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "(on) one collective spans several products"),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "(on) lets the core that computes also drive the network"),
    Flag("xla_enable_async_all_gather", "true", "(on) gathers have a start and an end to compute between"),
    Flag("xla_enable_async_all_reduce", "true", "sums have a start and an end to compute between"),
    Flag("xla_enable_async_collective_permute", "true", "(on) the steps of a windowed product overlap with it"),
    Flag("xla_tpu_enable_windowed_einsum_for_all_gather", "true", "(on) gather and product in turns, where it pays"),
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "several slices: gradient sums over the slow network"),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "several slices: pipelines sums of unequal sizes"),
)
# Pipelining, double buffering and the scheduler are off in XLA by default because they make programs larger.
GPU_OVERLAP = (
    _HIDE,
    Flag("xla_gpu_enable_pipelined_all_gather", "true", "gathers the next layer's weights during this layer"),
    Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "(on) scatters the last layer's gradients during this one"),
    Flag("xla_gpu_enable_pipelined_all_reduce", "true", "sums the last layer's gradients during this one"),
    Flag("xla_gpu_enable_while_loop_double_buffering", "true", "two layers per turn of a scan, without copies between"),
    Flag("xla_gpu_enable_highest_priority_async_stream", "true", "(on) collectives need not wait for queued kernels"),
    Flag("xla_gpu_all_gather_combine_threshold_bytes", str(128 << 20), "few large gathers: about half an 8B layer"),
    Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", str(64 << 20), "few large scatters, early enough to hide"),
    Flag("xla_gpu_all_reduce_combine_threshold_bytes", str(128 << 20), "few large sums; a memory's gradients are one"),
    Flag("xla_gpu_enable_command_buffer", "", "no CUDA graphs: they hold memory, and long kernels hide their launches"),
)
PRESETS: Mapping[str, Preset] = {
    "none": Preset(),
    "default": Preset(gpu=(_HIDE,)),  # libtpu needs nothing: it overlaps by itself
    "tpu-overlap": Preset(tpu=TPU_OVERLAP),
    "gpu-overlap": Preset(gpu=GPU_OVERLAP),
}
_PREFIXES: dict[Backend, tuple[str, ...]] = {
    "tpu": ("xla_tpu_", "xla_jf_", "xla_sc_", "xla_enable_async_", "xla_latency_hiding_", "xla_max_concurrent_"),
    "gpu": ("xla_gpu_", "xla_cpu_", "xla_dump_"),
}


def environment(
    preset: str = "default", extra: Sequence[str] = (), current: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables that a process needs from its start, each with what the environment has in it already.

    Args:
      preset: a name of `PRESETS`.
      extra: more flags, as in "--xla_tpu_scoped_vmem_limit_kib=65536"; they win over the preset's.
      current: the environment, whose flags win over both; None is that of this process.

    Returns:
      `LIBTPU_INIT_ARGS` and `XLA_FLAGS`, as far as the preset or `extra` adds to them.

    Raises:
      ConfigError: no such preset; a flag that is not one or that could belong to either compiler; `XLA_FLAGS` names a
        file, to which nothing can be added.
    """
    current = os.environ if current is None else current
    variables = {}
    for backend, variable in VARIABLES.items():
        given = current.get(variable, "")
        if added := [str(flag) for flag in _missing(backend, preset, extra, given)]:
            if variable == "XLA_FLAGS" and given and not given.lstrip().startswith("-"):
                raise ConfigError(f'XLA_FLAGS names the file {given!r}; add the flags there and use the preset "none"')
            variables[variable] = " ".join([*given.split(), *added])
    return variables


def apply(preset: str = "default", extra: Sequence[str] = ()) -> dict[str, str]:
    """Puts `environment(...)` into this process; before the first use of a device.

    Afterwards only the flags of the backends that run already matter, and they cannot change any more: "default" then
    leaves them alone.

    Returns:
      The variables that it changed.

    Raises:
      ConfigError: as `environment`, or a backend runs already without these flags.
    """
    changed = {name: text for name, text in environment(preset, extra).items() if os.environ.get(name) != text}
    late = [VARIABLES[backend] for backend in _running() if VARIABLES[backend] in changed]
    if late and (preset != "default" or extra):
        raise ConfigError(
            f"the compiler flags {preset!r} come too late: jax has started its devices. Set"
            f" {' and '.join(f'{name}={changed[name]!r}' for name in late)} in the environment, or start the run in a"
            " new process"
        )
    changed = {name: text for name, text in changed.items() if name not in late}
    os.environ.update(changed)
    return changed


def compiler_options(
    backend: Backend, preset: str = "default", extra: Sequence[str] = (), current: Mapping[str, str] | None = None
) -> dict[str, str | bool]:
    """The same flags for `lowered.compile(compiler_options=...)`, as ahead-of-time compiling for a pod needs them.

    Flags that the environment has are left out: the compiler knows them, and options would win over them.

    Raises:
      ConfigError: as `environment`.
    """
    given = (os.environ if current is None else current).get(VARIABLES[backend], "")
    truth = {"true": True, "false": False}  # GPU options take no other truth than Python's
    return {flag.name: truth.get(flag.value, flag.value) for flag in _missing(backend, preset, extra, given)}


def _missing(backend: Backend, preset: str, extra: Sequence[str], given: str) -> list[Flag]:
    """Flags of the preset and of `extra` for one backend that `given` does not set."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset of compiler flags is called {preset!r}; there are {', '.join(PRESETS)}")
    flags = {flag.name: flag for flag in PRESETS[preset].flags(backend)}
    flags |= {flag.name: flag for owner, flag in map(_parse, extra) if owner == backend}
    theirs = set(re.findall(r"(?:^|\s)--?(?:no)?(xla_\w+)", given))
    return [flag for name, flag in flags.items() if name not in theirs]


def _parse(text: str) -> tuple[Backend, Flag]:
    """ "--xla_gpu_name=value" as the backend that it belongs to and a Flag; without a value it is true."""
    found = re.fullmatch(r"--(xla_\w+)(?:=(\S*))?", text)
    if found is None:
        raise ConfigError(f'{text!r} is no compiler flag; write "--xla_name=value", one text per flag')
    name, value = found.group(1), found.group(2)
    for backend, prefixes in _PREFIXES.items():
        if name.startswith(prefixes):
            return backend, Flag(name, "true" if value is None else value, "given by the configuration")
    raise ConfigError(
        f"--{name} could belong to either compiler; set it in {' or '.join(VARIABLES.values())} in the environment"
    )


def _running() -> list[Backend]:
    """Backends that have read their flags; jax has no public name for it."""
    from jax._src import xla_bridge
    from jax._src.lib import xla_client

    running: list[Backend] = []
    if xla_client._xla.pjrt_plugin_loaded("tpu"):  # by a device or by a topology
        running.append("tpu")
    if xla_bridge.backends_are_initialized() and any(name in ("cuda", "rocm") for name in xla_bridge.backends()):
        running.append("gpu")
    return running
