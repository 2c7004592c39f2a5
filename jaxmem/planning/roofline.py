"""From counts to seconds: what the chips' figures allow at best.

Every time here is a lower bound: full speed of the matrix units, of the memory, and of all links at once. Real steps
take longer; the figures say what a mesh can at most reach and what will hold it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jaxmem.planning.chips import Topology
from jaxmem.planning.hlo import Counts
from jaxmem.planning.hlo_collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one execution on every device, and what they allow.

    Attributes:
      compute: FLOPs at the chip's peak.
      memory: bytes moved at the memory's full bandwidth.
      interconnect: bytes sent over all links at once.
      model_flops: useful FLOPs of the whole execution, over all devices, as the caller counts them; 0 if unknown.
      tokens: tokens of one execution over all devices; 0 if unknown.
      peak: FLOPs per second of all devices together.
    """

    compute: float
    memory: float
    interconnect: float
    model_flops: float
    tokens: float
    peak: float

    @property
    def seconds(self) -> float:
        """The roofline time: the largest of the three, as if they overlapped perfectly."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def serial(self) -> float:
        """The sum of the three, as if nothing overlapped."""
        return self.compute + self.memory + self.interconnect

    @property
    def bound(self) -> str:
        """Which of the three is the roofline time."""
        times = {"compute": self.compute, "memory": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation that the roofline time allows: useful FLOPs / (peak x time)."""
        return self.model_flops / (self.peak * self.seconds) if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the roofline time, over all devices."""
        return self.tokens / self.seconds if self.seconds else 0.0


def roofline(
    counts: Counts, topology: Topology, *, devices: int = 0, model_flops: float = 0.0, tokens: float = 0.0
) -> Roofline:
    """The roofline of a program.

    Args:
      counts: per device.
      topology: what it runs on.
      devices: how many devices the mesh uses; 0 for all.
      model_flops: useful FLOPs of one execution over all devices, such as 6 x parameters x tokens for training.
      tokens: of one execution over all devices.
    """
    chip = topology.chip
    return Roofline(
        compute=counts.flops / (chip.flops / chip.devices),
        memory=counts.moved / (chip.bandwidth / chip.devices),
        interconnect=send_seconds(counts.collectives.values(), topology),
        model_flops=model_flops,
        tokens=tokens,
        peak=(devices or topology.devices) * chip.flops / chip.devices,
    )


def send_seconds(collectives: Iterable[Collective], topology: Topology) -> float:
    """Seconds to send what a device sends, with all its links busy.

    On GPUs a group of at most one node's size is taken to lie inside a node; a larger one sends over the network.
    """
    chip, total = topology.chip, 0.0
    per_node = topology.shape[-1] if chip.kind == "gpu" else topology.devices
    for each in collectives:
        speed = chip.interconnect if each.group <= per_node or not chip.network else chip.network
        total += each.wire / (speed / chip.devices)
    return total
