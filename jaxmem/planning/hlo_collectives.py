"""What one collective instruction sends: its kind, its group, and bytes on the wire by the formulas of a ring."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxmem.planning.hlo_text import Computation, Instruction, Module
from jaxmem.planning.hlo_traffic import asynchronous, chained

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and group size.

    Attributes:
      kind: one of KINDS.
      group: devices that take part together.
      count: executions.
      payload: bytes per device that are combined: the whole of what is gathered, reduced, scattered or permuted.
      wire: bytes that a device sends, summed over executions: with n = group, 2 (n-1)/n of the payload for an
        all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all, all of it for the others.
    """

    kind: str
    group: int
    count: float
    payload: float
    wire: float

    def times(self, factor: float) -> Collective:
        """The same, executed `factor` times."""
        return Collective(self.kind, self.group, self.count * factor, self.payload * factor, self.wire * factor)

    def plus(self, other: Collective) -> Collective:
        """Both together; `other` is of the same kind and group."""
        sums = self.count + other.count, self.payload + other.payload, self.wire + other.wire
        return Collective(self.kind, self.group, *sums)


def collective(module: Module, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that `instruction` starts or is; None for anything else and for its further parts."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or (chained(instruction) and asynchronous(computation) != "AsyncCollectiveStart"):
        return None
    payload = float(sum(a.size for name in instruction.operands for a in computation.instructions[name].arrays))
    group = group_size(instruction.attributes, module.devices)
    if kind == "all-reduce" and _scattered(computation, instruction):
        kind = "reduce-scatter"
    if kind == "all-gather":
        payload *= group
    return Collective(kind, group, 1.0, payload, payload * ring_share(kind, group))


def group_size(attributes: str, devices: int) -> int:
    """Devices per group of `replica_groups` in any of its forms; `devices` where all are one group."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return _ring(attributes) or devices


def _ring(attributes: str) -> int:
    """Devices of the longest ring or chain that a `collective-permute` joins."""
    listed = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    pairs = dict(re.findall(r"\{(\d+),(\d+)", listed[1])) if listed else {}
    reached = set(pairs.values())
    starts = [device for device in pairs if device not in reached]
    longest, met = 0, set()
    for start in (*starts, *pairs):
        device, length = start, 0
        while device and device not in met:
            met.add(device)
            device, length = pairs.get(device, ""), length + 1
        longest = max(longest, length)
    return longest


def ring_share(kind: str, group: int) -> float:
    """Bytes that a device sends per byte of payload, in a ring; none where it is alone."""
    others = (group - 1) / group
    whole = 1.0 if group > 1 else 0.0
    shares = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "all-to-all": others}
    return shares.get(kind, whole)


def _scattered(computation: Computation, instruction: Instruction) -> bool:
    """Is an all-reduce inside a TPU kernel that keeps only this device's slice of the sum?"""
    root = computation.root
    while root is not None and root.opcode == "bitcast":
        root = computation.operand(root, 0)
    if root is None or root.opcode != "dynamic-slice":
        return False
    return root.operands[0] == instruction.name
