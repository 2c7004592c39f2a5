"""Reads the text of an optimized HLO module: its computations, their instructions, and the arrays of a shape.

One pass over the lines; tens of megabytes take seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: as HLO names it: "bf16", "s32", "f8e4m3fn".
      dims: its dimensions.
      space: memory space; 0 is the device's main memory (HBM), 1 a TPU's vector memory, others are small or the host's.
      stored: bytes in memory, with the padding of a tiled layout.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int
    stored: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def size(self) -> int:
        """Bytes without padding."""
        return -(-self.elements * bits(self.dtype) // 8)


@dataclasses.dataclass(slots=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without "%".
      opcode: "fusion", "while", "all-gather-start".
      shape: text of the result's shape.
      operands: names of the instructions that it takes.
      argument: text between the parentheses: a constant's value, a parameter's number.
      attributes: text after the parentheses.
      root: is it the computation's result?
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays of the result, nested tuples flattened."""
        return arrays(self.shape)

    def called(self, key: str) -> str | None:
        """The computation that the attribute `key` names: calls, to_apply, body, condition."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order.

    Attributes:
      name: without "%".
      instructions: by name.
      root: the result.
    """

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(i.argument): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """For every instruction who takes it, and at which place."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for place, name in enumerate(instruction.operands):
                if name in found:
                    found[name].append((instruction, place))
        return found

    def operand(self, instruction: Instruction, place: int) -> Instruction:
        """What `instruction` takes at `place`."""
        return self.instructions[instruction.operands[place]]


@dataclasses.dataclass
class Module:
    """A whole program.

    Attributes:
      name: as JAX named it.
      computations: by name.
      entry: where it starts.
      devices: how many run it together.
    """

    name: str
    computations: dict[str, Computation]
    entry: Computation
    devices: int


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises ValueError when the text is no HLO module."""
    computations: dict[str, Computation] = {}
    entry = current = None
    header = ""
    for line in text.splitlines():
        if current is not None:
            if line.startswith("}"):
                current = None
            elif " = " in line:
                instruction = _instruction(line)
                current.instructions[instruction.name] = instruction
                if instruction.root:
                    current.root = instruction
        elif line.startswith("HloModule"):
            header = line
        elif line.endswith("{") and (match := _HEADER.match(line)):
            current = computations[match[2]] = Computation(match[2])
            entry = current if match[1] else entry
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is no HLO module")
    name = re.match(r"HloModule ([^,\s]+)", header)
    return Module(name[1] if name else "", computations, entry, _number(header, "num_partitions", "replica_count"))


def _number(header: str, *keys: str) -> int:
    return math.prod(int(m[1]) for key in keys if (m := re.search(rf"\b{key}=(\d+)", header)))


def _instruction(line: str) -> Instruction:
    """One line: `[ROOT] %name = SHAPE OPCODE(OPERANDS), ATTRIBUTES`."""
    left, _, rest = line.partition(" = ")
    root, name = left.lstrip().startswith("ROOT "), left.rpartition(" ")[2].lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    argument = rest[start + 1 : stop]
    return Instruction(name, rest[:start], shape, tuple(_NAME.findall(argument)), argument, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """All arrays in the text of a shape, nested tuples flattened."""
    return tuple(_array(*found.groups()) for found in _ARRAY.finditer(re.sub(r"/\*.*?\*/", "", shape)))


@functools.cache
def elements(shape: str) -> tuple[tuple[Array, ...], ...]:
    """Arrays of every element of a tuple shape; of a plain shape, one element."""
    if not shape.startswith("("):
        return (arrays(shape),)
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(shape):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[start:place])
            start = place + 1
    return tuple(arrays(part) for part in parts if part.strip())


@functools.cache
def bits(dtype: str) -> int:
    """Bits of one element: 16 for "bf16", 8 for "f8e4m3fn"."""
    number = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS.get(dtype, int(number[1]) if number else 0)


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(number.lstrip("<=")) for number in dims.split(",") if number)
    order, _, rest = (layout or "").partition(":")
    space = re.search(r"S\((\d+)\)", rest)
    return Array(dtype, sizes, int(space[1]) if space else 0, _stored(dtype, sizes, order, rest))


def _stored(dtype: str, dims: tuple[int, ...], order: str, rest: str) -> int:
    """Bytes of an array in a layout "1,0" with tiles "T(8,128)(2,1)": tiled dimensions are padded to whole tiles."""
    major = [dims[int(axis)] for axis in reversed(order.split(","))] if order else list(dims)
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        sizes = [int(number) for number in tile[1].split(",")]
        major = [1] * (len(sizes) - len(major)) + major
        major[-len(sizes) :] = [-(-n // t) * t for n, t in zip(major[-len(sizes) :], sizes, strict=True)]
    return -(-math.prod(major) * bits(dtype) // 8)
