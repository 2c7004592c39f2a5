"""Accelerators by name, with their vendors' figures, and topologies of them.

A TPU topology is `CHIP:AxB` or `CHIP:AxBxC` ("v5p:4x4x4"); the TPU compiler gives its devices without the machine. A
GPU topology is `CHIP:GPUS` or `CHIP:NODESxGPUS` ("h100:8", "h200:2x8"); its devices are only counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxmem.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. All figures are per chip; a chip is one or two JAX devices.

    Attributes:
      name: as in a topology.
      kind: "tpu" or "gpu".
      flops: dense bfloat16 operations per second at most.
      memory: bytes of high-bandwidth memory that a program may use. On TPUs this is what the TPU compiler names as
        available, slightly below the vendor's figure; on GPUs it is the vendor's figure.
      bandwidth: bytes per second to and from that memory.
      interconnect: bytes per second that leave the chip over all its fast links together (ICI, NVLink), one way.
      network: bytes per second that leave the chip for another slice or node, one way; 0 where the vendor names none.
      devices: JAX devices per chip.
      axes: numbers in a topology's shape (2 or 3 for a torus); 0 for GPUs.
      largest: chips of the largest slice.
      options: what the TPU compiler must be told about this chip.
    """

    name: str
    kind: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    network: float = 0.0
    devices: int = 1
    axes: int = 0
    largest: int = 0
    options: tuple[tuple[str, Any], ...] = ()


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x ("key chip specifications"). The pages give the
# interconnect in both directions together: v5e 400, v5p 1,200, v6e 800, TPU7x 1,200 GB/s; half of it is one way. v4 is
# given as 6 links of 50 GB/s one way. Memory is what libtpu 0.0.42 reports as available HBM. A TPU7x chip is two
# devices with a memory of their own.
# GPUs: NVIDIA's data sheets of A100, H100 SXM, H200 SXM and HGX B200: tensor cores without sparsity; NVLink 600, 900,
# 900 and 1,800 GB/s in both directions; DGX systems have one network port per GPU of 200 (A100) or 400 Gb/s.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 30.75 * GIB, 1228e9, 300e9, 0, 1, 3, 4096, (("chip_config_name", "megacore"),)),
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9, 0, 1, 2, 256),
        Chip("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 600e9, 0, 1, 3, 6144),
        Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1640e9, 400e9, 0, 1, 2, 256),
        Chip("tpu7x", "tpu", 2307e12, 2 * 94.75 * GIB, 7370e9, 600e9, 0, 2, 3, 9216),
        Chip("a100-40gb", "gpu", 312e12, 40e9, 1555e9, 300e9, 25e9),
        Chip("a100-80gb", "gpu", 312e12, 80e9, 2039e9, 300e9, 25e9),
        Chip("h100", "gpu", 989.4e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", "gpu", 989.4e12, 141e9, 4800e9, 450e9, 50e9),
        Chip("b200", "gpu", 2250e12, 180e9, 8000e9, 900e9, 50e9),
    )
}

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Keeps libtpu from asking a metadata server, from logging, and from locking out a second process on the machine."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips in one shape.

    Attributes:
      name: as written, "v5e:4x4".
      chip: what it is made of.
      shape: chips per torus axis, or (nodes, GPUs per node).
      hosts: machines, with four TPU chips each.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    hosts: int

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices, the product of a mesh that uses all."""
        return self.chips * self.chip.devices

    @property
    def compiles(self) -> bool:
        """Is there a compiler that needs no machine?"""
        return self.chip.kind == "tpu"

    @property
    def memory(self) -> float:
        """Bytes that a program may use per device."""
        return self.chip.memory / self.chip.devices

    def abstract_devices(self) -> list[Any]:
        """Devices to make a mesh of and compile for; nothing can run on them.

        Raises:
          ConfigError: GPUs, libtpu is not installed, or libtpu refuses the topology.
        """
        if not self.compiles:
            raise ConfigError(f"topology {self.name}: GPUs have no compiler without a GPU; plan them by arithmetic")
        from jax.experimental import topologies

        for name, value in _COMPILER.items():
            os.environ.setdefault(name, value)
        options = dict(self.chip.options)
        if self.chips == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            return list(topologies.get_topology_desc(self.name, platform="tpu", **options).devices)
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ConfigError(
                f"topology {self.name}: the TPU compiler says {lines[0]!r}; it comes with pip install 'jaxmem[tpu]'"
            ) from error


def topology(name: str) -> Topology:
    """The topology of a name such as "v5e:4x4", "v5p:4x4x4", "h100:8" or "h200:2x8".

    Raises:
      ConfigError: the chip is unknown, or there is no such shape of it; says which there are.
    """
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"topology {name!r}: write CHIP:SHAPE with a chip among {', '.join(CHIPS)}, for example v5e:4x4, v5p:4x4x4"
            " or h100:2x8"
        )
    chip, shape = CHIPS[match[1]], tuple(int(number) for number in match[2].split("x"))
    if chip.kind == "gpu":
        return _nodes(name, chip, shape)
    known = shapes(chip)
    if tuple(sorted(shape)) not in known:
        chips = math.prod(shape)
        near = sorted(known, key=lambda other: (abs(math.log(math.prod(other) / max(chips, 0.5))), other))[:4]
        raise ConfigError(
            f"topology {name!r}: there is no such slice of {chip.name}; near it are"
            f" {', '.join(_written(chip, other) for other in sorted(near, key=math.prod))}"
        )
    return Topology(f"{chip.name}:{match[2]}", chip, shape, max(1, math.prod(shape) // 4))


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """All slices of a TPU, each with its numbers in ascending order, small ones first."""
    if chip.axes == 2:
        return [shape for shape in _FLAT if math.prod(shape) <= chip.largest]
    sides = range(4, 65, 4)
    large = [s for s in itertools.combinations_with_replacement(sides, 3) if math.prod(s) <= chip.largest]
    return [*_SMALL, *sorted(large, key=math.prod)]


def _nodes(name: str, chip: Chip, shape: tuple[int, ...]) -> Topology:
    """GPUs: (count,) or (nodes, GPUs per node)."""
    nodes, gpus = (1, *shape) if len(shape) == 1 else shape if len(shape) == 2 else (0, 0)
    if nodes < 1 or not 1 <= gpus <= 8:
        raise ConfigError(
            f"topology {name!r}: GPUs are {chip.name}:GPUS or {chip.name}:NODESxGPUS with 1 to 8 GPUs per node, such as"
            f" {chip.name}:8 or {chip.name}:2x8"
        )
    return Topology(name.strip().lower(), chip, (nodes, gpus), nodes)


def _written(chip: Chip, shape: tuple[int, ...]) -> str:
    """How a shape is usually written: 2x2x1 has its 1 last."""
    first = [number for number in shape if number > 1] + [number for number in shape if number == 1]
    return f"{chip.name}:{'x'.join(map(str, first))}"
