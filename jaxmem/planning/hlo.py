"""What a compiled program does on one device, counted from its optimized HLO: FLOPs, bytes moved, collectives.

`compiled.cost_analysis()` counts the body of a loop once. Here bodies count as often as they run. Optimized HLO is what
one device executes after partitioning, so all figures are per device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jaxmem.planning import hlo_loops, hlo_text
from jaxmem.planning.hlo_collectives import Collective, collective
from jaxmem.planning.hlo_loops import Frame
from jaxmem.planning.hlo_text import Computation, Instruction, Module
from jaxmem.planning.hlo_traffic import FREE, Traffic, target
from jaxmem.planning.hlo_work import flops

_SILENT = ("AsyncCollective", "ConcatBitcast", "AllocateBuffer", "Assume", "GatherScatter", "PrepareAsync", "Sharding")
_CALLS = ("fusion", "call", "call-start", "async-start")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over a program or a part of it, per device.

    Attributes:
      flops: of matrix products and convolutions.
      moved: bytes to and from main memory.
      collectives: by (kind, group size).
      kernels: executions of custom calls by target; their FLOPs are not in the HLO.
      operations: (FLOPs, bytes moved, bytes sent) by the JAX operation that they come from.
    """

    flops: float = 0.0
    moved: float = 0.0
    collectives: Mapping[tuple[str, int], Collective] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    operations: Mapping[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(each.wire for each in self.collectives.values())

    def times(self, factor: float) -> Counts:
        """The same work `factor` times."""
        scaled = {key: each.times(factor) for key, each in self.collectives.items()}
        kernels = {name: count * factor for name, count in self.kernels.items()}
        operations = {name: (a * factor, b * factor, c * factor) for name, (a, b, c) in self.operations.items()}
        return Counts(self.flops * factor, self.moved * factor, scaled, kernels, operations)

    def largest(self, what: int, count: int = 3) -> list[tuple[str, float]]:
        """The operations with the most FLOPs (`what` 0), bytes moved (1) or bytes sent (2)."""
        amounts = ((name, each[what]) for name, each in self.operations.items() if each[what])
        return sorted(amounts, key=lambda item: -item[1])[:count]


def together(parts: Sequence[Counts]) -> Counts:
    """All parts one after the other."""
    collectives: dict[tuple[str, int], Collective] = {}
    kernels: dict[str, float] = {}
    operations: dict[str, tuple[float, float, float]] = {}
    for part in parts:
        for key, each in part.collectives.items():
            collectives[key] = collectives[key].plus(each) if key in collectives else each
        for name, times in part.kernels.items():
            kernels[name] = kernels.get(name, 0.0) + times
        for name, (flops_, moved, sent) in part.operations.items():
            a, b, c = operations.get(name, (0.0, 0.0, 0.0))
            operations[name] = a + flops_, b + moved, c + sent
    sums = sum(part.flops for part in parts), sum(part.moved for part in parts)
    return Counts(*sums, collectives, kernels, operations)


_NOTHING = Counts()


@dataclasses.dataclass(frozen=True)
class Loop:
    """One `while` of the program.

    Attributes:
      name: the JAX operation that made it, else its HLO name.
      trips: how often its body was counted.
      known: "exact"; "at most", where it may end early and its bound was counted; "given" by the caller; or "unknown",
        counted once.
    """

    name: str
    trips: float
    known: str


@dataclasses.dataclass(frozen=True)
class Branches:
    """One `conditional` of the program.

    Attributes:
      name: the JAX operation that made it, else its HLO name.
      share: share of its executions that take the costliest branch; the others take the cheapest.
      flops: of each branch.
      moved: bytes of each branch.
    """

    name: str
    share: float
    flops: tuple[float, ...]
    moved: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that was counted.

    Attributes:
      counts: with branches weighted by how often they are taken, as the caller says.
      most: with the costliest branch always taken; equal to `counts` where there are no branches.
      loops, branches: what the program contains.
      notes: what the figures do not cover, in words.
    """

    counts: Counts
    most: Counts
    loops: tuple[Loop, ...]
    branches: tuple[Branches, ...]
    notes: tuple[str, ...]


def count(
    text: str,
    *,
    unknown_trips: float | Sequence[float] | None = None,
    branch_share: float | Mapping[str, float] = 1.0,
) -> Program:
    """Counts a program.

    Args:
      text: `compiled.as_text()`, of the TPU or the CPU compiler.
      unknown_trips: how often loops run whose count is not in the program, such as decoding until all rows are done;
        None counts their bound where there is one, else a single pass. Several numbers go by nesting: passes of such
        a loop, then of one inside it per pass of the one around it (0.3: in three of ten), and so on; the last number
        holds for all that lie deeper.
      branch_share: share of a conditional's executions that take its costliest branch: one number, or numbers by
        regular expressions that are searched in the conditional's operation name ("memory"); the first match wins, and
        a conditional that none matches always takes the costliest.

    Raises:
      ValueError: the text is no HLO module.
    """
    trips = (unknown_trips,) if isinstance(unknown_trips, float | int) else tuple(unknown_trips or ())
    counter = _Counter(hlo_text.parse(text), trips, branch_share)
    counts, most = counter.total()
    return Program(counts, most, tuple(counter.loops), tuple(counter.branches), counter.notes(counts))


class _Counter:
    """One walk over a module, from the entry down, with the counts of each part coming back up."""

    def __init__(self, module: Module, unknown_trips: Sequence[float], share: float | Mapping[str, float]):
        self._module, self._unknown, self._shares = module, unknown_trips, share
        self._traffic = Traffic(module)
        self._fused: dict[str, Counts] = {}
        self._inside_open = 0
        self.loops: list[Loop] = []
        self.branches: list[Branches] = []

    def total(self) -> tuple[Counts, Counts]:
        """(weighted, most) of the whole program."""
        return self._computation(Frame(self._module.entry))

    def _computation(self, frame: Frame) -> tuple[Counts, Counts]:
        weighted, most = [], []
        for instruction in frame.computation.instructions.values():
            if instruction.opcode in ("while", "conditional") or instruction.opcode in _CALLS:
                one, highest = self._nested(frame, instruction)
            elif instruction.opcode in FREE:
                continue
            else:
                one = highest = self._single(frame.computation, instruction, moves=True)
            weighted.append(one)
            most.append(highest)
        return together(weighted), together(most)

    def _nested(self, frame: Frame, instruction: Instruction) -> tuple[Counts, Counts]:
        """A loop, a conditional, a fusion or a call."""
        if instruction.opcode == "while":
            return self._while(frame, instruction)
        if instruction.opcode == "conditional":
            return self._conditional(frame, instruction)
        if instruction.opcode == "fusion":
            inner = self._inside(instruction.called("calls"))
            moved = self._traffic.moved(frame.computation, instruction)
            one = together([inner, Counts(moved=moved, operations={operation(instruction): (0.0, moved, 0.0)})])
            return one, one
        name = instruction.called("calls") or instruction.called("to_apply")
        called = self._module.computations.get(name or "")
        return (Counts(), Counts()) if called is None else self._computation(Frame(called, frame, instruction))

    def _single(self, computation: Computation, instruction: Instruction, moves: bool) -> Counts:
        """An instruction that contains no other; `moves` is false inside a fusion."""
        moved = self._traffic.moved(computation, instruction) if moves else 0.0
        work, each = flops(computation, instruction), collective(self._module, computation, instruction)
        name = target(instruction) if instruction.opcode == "custom-call" else ""
        kernels = {} if not name or name.startswith(_SILENT) else {name: 1.0}
        if not (work or moved or each or kernels):
            return _NOTHING
        collectives = {} if each is None else {(each.kind, each.group): each}
        costs = work, moved, 0.0 if each is None else each.wire
        return Counts(work, moved, collectives, kernels, {operation(instruction): costs})

    def _inside(self, name: str | None) -> Counts:
        """A fused computation without its traffic, which is that of the fusion as a whole."""
        computation = self._module.computations.get(name or "")
        if computation is None:
            return Counts()
        if computation.name not in self._fused:
            parts = []
            for instruction in computation.instructions.values():
                if instruction.opcode in _CALLS:
                    key = "calls" if instruction.called("calls") else "to_apply"
                    parts.append(self._inside(instruction.called(key)))
                elif instruction.opcode not in FREE:
                    parts.append(self._single(computation, instruction, moves=False))
            self._fused[computation.name] = together(parts)
        return self._fused[computation.name]

    def _while(self, frame: Frame, loop: Instruction) -> tuple[Counts, Counts]:
        found = hlo_loops.trips(self._module, frame, loop)
        is_open = found.count is None
        if found.count is not None:
            times, known = float(found.count), "exact"
        elif self._unknown:
            times, known = float(self._unknown[min(self._inside_open, len(self._unknown) - 1)]), "given"
        else:
            times, known = (1.0, "unknown") if found.bound is None else (float(found.bound), "at most")
        self.loops.append(Loop(operation(loop), times, known))
        self._inside_open += is_open
        called = [self._module.computations.get(loop.called(part) or "") for part in ("body", "condition")]
        parts = [self._computation(Frame(one, frame, loop)) for one in called if one is not None]
        self._inside_open -= is_open
        weighted, most = (together([part[side] for part in parts]).times(times) for side in (0, 1))
        return weighted, most

    def _conditional(self, frame: Frame, instruction: Instruction) -> tuple[Counts, Counts]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        names = names or [instruction.called(f"{side}_computation") or "" for side in ("true", "false")]
        costs = [self._computation(Frame(self._module.computations[name], frame, instruction)) for name in names]
        weighted = sorted((cost[0] for cost in costs), key=_weight)
        share = self._share(operation(instruction))
        flops_, moved = tuple(c[0].flops for c in costs), tuple(c[0].moved for c in costs)
        self.branches.append(Branches(operation(instruction), share, flops_, moved))
        mixed = together([weighted[-1].times(share), weighted[0].times(1.0 - share)])
        return mixed, max((cost[1] for cost in costs), key=_weight)

    def _share(self, name: str) -> float:
        if isinstance(self._shares, Mapping):
            return next((share for pattern, share in self._shares.items() if re.search(pattern, name)), 1.0)
        return self._shares

    def notes(self, counts: Counts) -> tuple[str, ...]:
        """What the figures do not cover."""
        notes = [
            f"custom call {name}, {times:g} times: its FLOPs are not in the HLO"
            for name, times in counts.kernels.items()
        ]
        words = {
            "unknown": "counted once: its count is not in the program",
            "at most": "counted at its bound; it may end",
        }
        for loop in self.loops:
            if loop.known in words:
                more = f" before {loop.trips:g} passes" if loop.known == "at most" else ""
                notes.append(f"loop {loop.name} {words[loop.known]}{more}")
        return tuple(dict.fromkeys(notes))


def operation(instruction: Instruction) -> str:
    """The JAX operation that an instruction comes from, such as "jit(step)/while/body/memory/cond"; else its name."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else instruction.name


def _weight(counts: Counts) -> tuple[float, float]:
    """Orders branches by what they cost."""
    return counts.flops, counts.moved + counts.wire
