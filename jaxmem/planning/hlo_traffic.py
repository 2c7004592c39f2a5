"""Bytes that one instruction moves to and from the device's main memory.

An instruction reads its operands and writes its result; a fusion does so as a whole. Slices and in-place updates touch
only their slice. Arrays in a TPU's vector memory do not count: they never leave the chip.
"""

from __future__ import annotations

import math
import re

from jaxmem.planning.hlo_text import Array, Computation, Instruction, Module, elements

FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id domain"
    " optimization-barrier add-dependency call-start async-start".split()
)
_FREE_CALLS = frozenset(
    "ConcatBitcast AllocateBuffer AssumeGatherIndicesInBound GatherScatterIndicesBitpacked PrepareAsyncCallStart"
    " PrepareAsyncCallDone Sharding SPMDFullToShardShape SPMDShardToFullShape".split()
)
_ASYNC_ENDS = frozenset("AsyncCollectiveStart AsyncCollectiveDone".split())
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "copy", "convert", "transpose")


class Traffic:
    """Bytes moved by the instructions of one module; remembers what it found out about fusions."""

    def __init__(self, module: Module):
        self._module = module
        self._reads: dict[tuple[str, int], float] = {}

    def moved(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that one execution of `instruction` moves; loops, calls and branches themselves move none."""
        opcode, inputs = instruction.opcode, self._inputs(computation, instruction)
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode == "fusion":
            return self._fusion(instruction, inputs)
        if opcode == "custom-call":
            return 0.0 if target(instruction) in _FREE_CALLS | _ASYNC_ENDS else _all(inputs) + _all(instruction.arrays)
        if opcode == "copy-start":
            return _all(inputs[:1]) + _all(elements(instruction.shape)[0])
        if opcode.endswith("-start"):
            return self._start(instruction, inputs)
        if opcode in _SLICES:
            result = instruction.arrays[0]
            return _main(result, result) + _main(result, inputs[0]) + _all(inputs[1:])
        if opcode in ("dynamic-update-slice", "scatter"):
            change = inputs[1] if opcode == "dynamic-update-slice" else inputs[-1]
            return _all(inputs[1:]) + _main(change, inputs[0]) * (1 if opcode == "dynamic-update-slice" else 2)
        return _all(inputs) + _all(instruction.arrays)

    def _inputs(self, computation: Computation, instruction: Instruction) -> list[Array]:
        """First arrays of the operands; operands that are tuples count where they are taken apart."""
        found = (computation.instructions.get(name) for name in instruction.operands)
        return [array for one in found if one is not None for array in one.arrays]

    def _start(self, instruction: Instruction, inputs: list[Array]) -> float:
        """An asynchronous slice or collective: its tuple holds what goes in, then what comes out."""
        parts = elements(instruction.shape)
        results = parts[1] if len(parts) > 1 else parts[0]
        if instruction.opcode in ("slice-start", "dynamic-slice-start"):
            return _all(results) + sum(_main(result, inputs[0]) for result in results)
        return _all(inputs) + _all(results)

    def _fusion(self, instruction: Instruction, inputs: list[Array]) -> float:
        inner = self._module.computations.get(instruction.called("calls") or "")
        if inner is None or inner.root is None:
            return _all(inputs) + _all(instruction.arrays)
        if asynchronous(inner) == "AsyncCollectiveStart":
            return _all(inputs[:1]) + _all(elements(instruction.shape)[1])
        if asynchronous(inner) == "AsyncCollectiveDone":
            return 0.0
        read = sum(
            min(array.stored, self._read(inner, number)) for number, array in enumerate(inputs) if array.space == 0
        )
        return read + self._written(inner, inner.root, instruction.arrays)

    def _read(self, computation: Computation, number: int) -> float:
        """Bytes of parameter `number` that a fused computation reads; infinite where it reads all."""
        key = computation.name, number
        if key not in self._reads:
            self._reads[key] = math.inf  # a computation cannot contain itself
            parameter = computation.parameters.get(number)
            self._reads[key] = math.inf if parameter is None else self._used(computation, parameter, True)
        return self._reads[key]

    def _used(self, computation: Computation, value: Instruction, untouched: bool) -> float:
        """Bytes that the users of `value` read; `untouched`: it is still the parameter's own memory."""
        total = 0.0 if untouched or not value.root else math.inf
        for user, place in computation.users[value.name]:
            if user.opcode in _SAME or _alias(user) == place:
                kept = user.opcode == "bitcast" or _alias(user) == place
                total += self._used(computation, user, untouched and kept)
            elif user.opcode in _SLICES and place == 0:
                total += user.arrays[0].stored
            elif user.opcode == "dynamic-update-slice" and place == 0 and untouched:
                total += self._used(computation, user, True)
            elif user.opcode == "fusion":
                inner = self._module.computations.get(user.called("calls") or "")
                total += math.inf if inner is None else self._read(inner, place)
            elif not ((user.opcode == "tuple" and user.root and untouched) or chained(user) or _ends(user)):
                return math.inf
        return total

    def _written(self, computation: Computation, root: Instruction, results: tuple[Array, ...]) -> float:
        """Bytes that a fused computation writes; `results` are the arrays of the fusion itself."""
        if root.opcode == "tuple" and len(root.operands) == len(results):
            parts = zip(root.operands, results, strict=True)
            return sum(self._written(computation, computation.instructions[name], (array,)) for name, array in parts)
        source = root
        while source.opcode == "bitcast" or _alias(source) is not None:
            source = computation.operand(source, _alias(source) or 0)
        if source.opcode == "parameter" or chained(source) or _ends(source):
            return 0.0 if source is not root or not root.root else _all(results)
        if source.opcode == "dynamic-update-slice":
            change = computation.operand(source, 1).arrays[0]
            return sum(min(array.stored, change.stored) for array in results if array.space == 0)
        inner = self._module.computations.get(source.called("calls") or "") if source.opcode == "fusion" else None
        if inner is not None and inner.root is not None:
            return self._written(inner, inner.root, results)
        return _all(results)


def _alias(instruction: Instruction) -> int | None:
    """The operand whose memory a fusion inside a fusion takes over as a whole, such as a mere change of layout."""
    found = re.search(r"output_to_operand_aliasing=\{\{\}: \((\d+), \{\}\)\}", instruction.attributes)
    return int(found[1]) if found and instruction.opcode == "fusion" else None


def target(instruction: Instruction) -> str:
    """What a custom call calls."""
    _, _, rest = instruction.attributes.partition('custom_call_target="')
    return rest.partition('"')[0]


def chained(instruction: Instruction) -> bool:
    """Is this a piece of an asynchronous collective that the TPU compiler spread over several fusions?"""
    return 'chain_id="' in instruction.attributes


def asynchronous(computation: Computation) -> str:
    """ "AsyncCollectiveStart" or "AsyncCollectiveDone" for a fusion that begins or ends such a collective, else ""."""
    return target(computation.root) if computation.root is not None and _ends(computation.root) else ""


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and target(instruction) in _ASYNC_ENDS


def _all(found: list[Array] | tuple[Array, ...]) -> float:
    """Bytes of those arrays that lie in main memory."""
    return float(sum(array.stored for array in found if array.space == 0))


def _main(piece: Array, whole: Array) -> float:
    """Bytes of `piece` when the array `whole` that it is cut from lies in main memory."""
    return float(piece.stored) if whole.space == 0 else 0.0
