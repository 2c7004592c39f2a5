"""Bytes per device by kind: of a compiled program, and of one that the compiler refused for lack of memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SIZE = r"([\d.]+)([BKMGT]?)"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes on one device while a program runs.

    Attributes:
      kinds: what goes in, by kind ("weights", "optimizer", "cache", "inputs"); "padding" is what layouts add.
      temporaries: activations, gradients and whatever else exists only while the program runs, at the worst moment.
      outputs: results that do not take the place of an argument.
      code: the program itself.
      limit: what the device has.
      needed: where the compiler refused, the total that it named; temporaries are then what this leaves for them.
    """

    kinds: Mapping[str, float]
    temporaries: float = 0.0
    outputs: float = 0.0
    code: float = 0.0
    limit: float = math.inf
    needed: float | None = None

    @property
    def total(self) -> float:
        """All of it."""
        if self.needed is not None:
            return self.needed
        return sum(self.kinds.values()) + self.temporaries + self.outputs + self.code

    @property
    def fits(self) -> bool:
        """Does the device have as much?"""
        return self.total <= self.limit and self.needed is None

    def rows(self) -> dict[str, float]:
        """All kinds by name, the largest first, without those of no bytes."""
        rest = {"temporaries": self.temporaries, "outputs": self.outputs, "code": self.code}
        return dict(sorted(((k, v) for k, v in {**self.kinds, **rest}.items() if v > 0), key=lambda item: -item[1]))


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One of the largest buffers of a program that does not fit: its bytes and what it is."""

    size: float
    what: str


@dataclasses.dataclass(frozen=True)
class Exhausted:
    """What the compiler says when memory does not suffice.

    Attributes:
      needed: bytes that the program needs on a device, arguments included; of the largest array alone where no more is
        said.
      limit: bytes that a device has; 0 where the message does not say.
      largest: the largest buffers, where the message lists them.
    """

    needed: float
    limit: float
    largest: tuple[Allocation, ...] = ()


def tree_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays or `ShapeDtypeStruct`s, by their shardings; whole where there is none."""
    return sum(math.prod(_local(leaf)) * bits(leaf) // 8 for leaf in jax.tree.leaves(tree))


def bits(leaf: Any) -> int:
    """Bits of one element of an array, 4 for int4; a typed random key counts its words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8 * leaf.dtype.itemsize
    return jax.dtypes.itemsize_bits(leaf.dtype)


def _local(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def memory_by_kind(
    compiled: Any, arguments: Mapping[str, Any], limit: float = math.inf, resting: Mapping[str, Any] = _NOTHING
) -> Bytes:
    """Bytes per device of a compiled program.

    On TPUs the total is the compiler's `peak_memory_in_bytes`, which holds arguments, temporaries and outputs without
    those that take the place of a donated argument, and which the compiler itself compares with the device's memory
    (`temp_size_in_bytes` adds buffers that never live together). Other compilers leave the temporaries out of their
    peak; there the total is arguments + temporaries + outputs - aliased. The program's code, and arguments that the
    program does not use, come on top.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`.
      arguments: trees of `ShapeDtypeStruct` with shardings, by kind; together the program's arguments.
      limit: bytes that a device has.
      resting: trees that lie in memory meanwhile without being arguments, by kind; they come on top.
    """
    stats = compiled.memory_analysis()
    taken, aliased = stats.argument_size_in_bytes, stats.alias_size_in_bytes
    outputs = max(0, stats.output_size_in_bytes - aliased)
    peak = stats.peak_memory_in_bytes if _on_tpu(compiled) else taken + stats.temp_size_in_bytes + outputs
    kinds = _by_kind(arguments)
    if (padding := taken - sum(kinds.values())) > 0:
        kinds["padding"] = float(padding)
    kinds = _by_kind(resting, kinds)
    temporaries = float(max(0, peak - taken - outputs))
    return Bytes(kinds, temporaries, float(outputs), float(stats.generated_code_size_in_bytes), limit)


def _by_kind(trees: Mapping[str, Any], others: Mapping[str, float] = _NOTHING) -> dict[str, float]:
    """Bytes per device of trees by kind, added to those of `others`."""
    kinds = dict(others)
    for kind, tree in trees.items():
        kinds[kind] = kinds.get(kind, 0.0) + tree_bytes(tree)
    return kinds


def _on_tpu(compiled: Any) -> bool:
    """Is a program compiled for TPUs?"""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return any(device.platform == "tpu" for sharding in shardings[:1] for device in sharding.device_set)


def refused(message: str, arguments: Mapping[str, Any], limit: float, resting: Mapping[str, Any] = _NOTHING) -> Bytes:
    """Bytes per device of a program that the compiler refused: its total, and the arguments that are known.

    Args as in `memory_by_kind`; the total is the compiler's, with what rests on top.

    Raises:
      ValueError: the message is not about memory.
    """
    found = parse_exhausted(message)
    kinds = _by_kind(arguments)
    temporaries = max(0.0, found.needed - sum(kinds.values()))
    needed = found.needed + sum(_by_kind(resting).values())
    return Bytes(_by_kind(resting, kinds), temporaries, limit=found.limit or limit, needed=needed)


def parse_exhausted(message: str) -> Exhausted:
    """The figures of a RESOURCE_EXHAUSTED message of the TPU compiler, in any of its forms.

    The short form says how much is required "for HLO temporaries", which includes arguments and outputs; the long one
    "Used 17.5G of 15.7G hbm" with a list of the largest allocations. Of a program with one array that is larger than
    the memory, some compilers name that array alone, and the memory without what they keep for themselves.

    Raises:
      ValueError: the message says nothing of the kind.
    """
    short = re.search(rf"required[^(]*\({_SIZE}\) exceeds available[^(]*\({_SIZE}\)", message)
    long = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    found = short or long
    if found is None and (single := re.search(r"Allocation \(size=(\d+)\) would exceed memory", message)):
        return Exhausted(float(single[1]), 0.0)
    if found is None:
        raise ValueError(f"not a message about exhausted memory: {message[:200]!r}")
    return Exhausted(_bytes(found[1], found[2]), _bytes(found[3], found[4]), tuple(_allocations(message)))


def _allocations(message: str) -> Iterator[Allocation]:
    """Blocks "N. Size: 8.00G / Operator: ... / Shape: ..." of the long form."""
    for block in re.split(r"\n\s*\d+\. (?=Size:)", message)[1:]:
        size = re.match(rf"Size: {_SIZE}", block)
        name = re.search(r'op_name="([^"]*)"', block) or re.search(r"XLA label: (.*)", block)
        shape = re.search(r"Shape: ([^\s{]*)", block)
        if size:
            what = " ".join(found[1].strip() for found in (shape, name) if found)
            yield Allocation(_bytes(size[1], size[2]), what)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
