"""How often a `while` runs, read from the optimized HLO.

The compiler notes the count where it knows it. Else the condition is read: `i < n` where `i` starts at a constant and
grows by a constant, through the fusions, tuples and outer loops that the values pass. A loop that may also end early
("and not all rows are done") has a bound instead of a count.
"""

from __future__ import annotations

import dataclasses
import re

from jaxmem.planning.hlo_text import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier", "broadcast")
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
_DEEPEST = 200


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often a loop runs: exactly `count` times; or, where it may end early, at most `bound` times; or neither."""

    count: int | None = None
    bound: int | None = None


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a computation is called from.

    Attributes:
      computation: whose instructions are read.
      caller: the frame of the instruction that calls it; None for the entry.
      call: that instruction.
    """

    computation: Computation
    caller: Frame | None = None
    call: Instruction | None = None


@dataclasses.dataclass(frozen=True)
class _Carried:
    """Element `index` of the tuple that the loop `loop` carries, plus `step`."""

    loop: str
    index: int
    step: int = 0


@dataclasses.dataclass(frozen=True)
class _Compared:
    """`left DIRECTION right`."""

    left: int | _Carried | None
    right: int | _Carried | None
    direction: str


def trips(module: Module, frame: Frame, loop: Instruction) -> Trips:
    """How often `loop`, an instruction of `frame`'s computation, runs."""
    if known := re.search(r'known_trip_count":\s*\{"n":"?(\d+)', loop.attributes):
        return Trips(count=int(known[1]))
    condition = module.computations.get(loop.called("condition") or "")
    if condition is None or condition.root is None:
        return Trips()
    inside = Frame(condition, frame, loop)
    terms, exact = _terms(module, inside, condition.root)
    counts = [n for term in terms if (n := _count(module, frame, loop, term)) is not None]
    if not counts:
        return Trips()
    return Trips(count=min(counts)) if exact and len(counts) == len(terms) else Trips(bound=min(counts))


def _terms(module: Module, frame: Frame, root: Instruction) -> tuple[list[_Compared], bool]:
    """Comparisons that must all hold for the loop to go on; are they the whole condition?"""
    if root.opcode in _SAME:
        return _terms(module, frame, frame.computation.operand(root, 0))
    if root.opcode == "compare":
        direction = re.search(r"direction=(\w+)", root.attributes)
        left, right = (_value(module, frame, name) for name in root.operands[:2])
        return [_Compared(left, right, direction[1] if direction else "")], True
    if root.opcode == "and":
        both = [_terms(module, frame, frame.computation.operand(root, place)) for place in (0, 1)]
        return both[0][0] + both[1][0], both[0][1] and both[1][1]
    inner = module.computations.get(root.called("calls") or "") if root.opcode == "fusion" else None
    if inner is None or inner.root is None:
        return [], False
    return _terms(module, Frame(inner, frame, root), inner.root)


def _count(module: Module, frame: Frame, loop: Instruction, term: _Compared) -> int | None:
    """Steps until a comparison of a counter with a constant fails; None where that cannot be known."""
    left, right, direction = term.left, term.right, term.direction
    if isinstance(right, _Carried):
        left, right, direction = right, left, _MIRRORED.get(direction, "")
    if not isinstance(left, _Carried) or left.loop != loop.name or not isinstance(right, int):
        return None
    body = module.computations.get(loop.called("body") or "")
    start = _initial(module, frame, loop, left.index)
    if body is None or not isinstance(start, int):
        return None
    end = _element(module, Frame(body, frame, loop), left.index)
    if not isinstance(end, _Carried) or (end.loop, end.index) != (loop.name, left.index) or end.step == 0:
        return None
    first, step = start + left.step, end.step
    distance = right - first + {"LE": 1, "GE": -1}.get(direction, 0)
    if (step > 0) != (direction in ("LT", "LE")) and direction != "NE":
        return None
    return max(0, -(-distance // step) if step > 0 else -(distance // -step))


def _initial(module: Module, frame: Frame, loop: Instruction, index: int) -> int | _Carried | None:
    """What a loop starts with at `index` of its tuple."""
    start = frame.computation.operand(loop, 0)
    while start.opcode in ("copy", "bitcast", "optimization-barrier"):
        start = frame.computation.operand(start, 0)
    if start.opcode != "tuple" or index >= len(start.operands):
        return None
    return _value(module, frame, start.operands[index])


def _element(module: Module, frame: Frame, index: int) -> int | _Carried | None:
    """Element `index` of what a loop's body returns."""
    root = frame.computation.root
    if root is None or root.opcode != "tuple":
        return None
    return _value(module, frame, root.operands[index], loops=False)


def _value(module: Module, frame: Frame, name: str, loops: bool = True, depth: int = 0) -> int | _Carried | None:
    """A scalar whole number as a constant or as something that a loop carries; None for anything else.

    Args:
      module: the program.
      frame: where `name` is an instruction.
      name: the instruction.
      loops: replace what an outer loop carries without changing it by what that loop started with.
      depth: of the recursion.
    """
    instruction = frame.computation.instructions.get(name)
    if instruction is None or depth > _DEEPEST:
        return None
    opcode, deeper = instruction.opcode, depth + 1
    if opcode == "constant":
        return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument.strip()) else None
    if opcode in _SAME and instruction.operands:
        return _value(module, frame, instruction.operands[0], loops, deeper)
    if opcode == "parameter" and frame.caller and frame.call and frame.call.opcode != "while":
        place = int(instruction.argument)
        names = frame.call.operands
        return _value(module, frame.caller, names[place], loops, deeper) if place < len(names) else None
    if opcode in ("add", "subtract"):
        left = _value(module, frame, instruction.operands[0], loops, deeper)
        right = None if left is None else _value(module, frame, instruction.operands[1], loops, deeper)
        return _sum(left, right, 1 if opcode == "add" else -1)
    if opcode == "fusion":
        inner = module.computations.get(instruction.called("calls") or "")
        if inner is None or inner.root is None:
            return None
        return _value(module, Frame(inner, frame, instruction), inner.root.name, loops, deeper)
    return _carried(module, frame, instruction, loops, deeper) if opcode == "get-tuple-element" else None


def _carried(module: Module, frame: Frame, instruction: Instruction, loops: bool, depth: int) -> int | _Carried | None:
    """A `get-tuple-element`: of a tuple made here, of a fusion, or of what the loop around carries."""
    source = frame.computation.operand(instruction, 0)
    found = re.search(r"index=(\d+)", instruction.attributes)
    index = int(found[1]) if found else 0
    if source.opcode == "tuple":
        return _value(module, frame, source.operands[index], loops, depth)
    if source.opcode == "fusion":
        inner = module.computations.get(source.called("calls") or "")
        if inner is None or inner.root is None or inner.root.opcode != "tuple":
            return None
        return _value(module, Frame(inner, frame, source), inner.root.operands[index], loops, depth)
    if source.opcode != "parameter" or frame.call is None or frame.call.opcode != "while" or frame.caller is None:
        return None
    here = _Carried(frame.call.name, index)
    body = module.computations.get(frame.call.called("body") or "")
    if not loops or body is None or _element(module, Frame(body, frame.caller, frame.call), index) != here:
        return here
    start = _initial(module, frame.caller, frame.call, index)
    return here if start is None else start


def _sum(left: int | _Carried | None, right: int | _Carried | None, sign: int) -> int | _Carried | None:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return dataclasses.replace(left, step=left.step + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        return dataclasses.replace(right, step=right.step + left)
    return None
