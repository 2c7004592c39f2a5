"""Arithmetic of one instruction: FLOPs of matrix products and convolutions, from shapes alone."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from jaxmem.planning.hlo_text import Array, Computation, Instruction


def flops(computation: Computation, instruction: Instruction) -> float:
    """Multiplications and additions of a `dot` or `convolution`, two per product; 0 for anything else."""
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    return _convolution(computation, instruction) if instruction.opcode == "convolution" else 0.0


def _dot(computation: Computation, instruction: Instruction) -> float:
    left = computation.operand(instruction, 0).arrays[0].dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2.0 * instruction.arrays[0].elements * math.prod(left[axis] for axis in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Counts only products with real elements: padding and the holes of a dilation cost nothing.

    The TPU compiler writes most matrix products as convolutions, with batch dimensions as dilated windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    data, kernel, out = (array.dims for array in _arrays(computation, instruction))
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(word.split("=", 1) for word in window[1].split()) if window else {}
    products = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for axis in range(len(out) - 2):
        place = str(axis)
        products *= _positions(
            data[labels[1].index(place)],
            kernel[labels[2].index(place)],
            out[labels[3].index(place)],
            _setting(settings, "stride", axis, 1),
            _setting(settings, "pad", axis, 0),
            _setting(settings, "lhs_dilate", axis, 1),
            _setting(settings, "rhs_dilate", axis, 1),
        )
    return 2.0 * products


def _arrays(computation: Computation, instruction: Instruction) -> Iterator[Array]:
    """Data, kernel and result of a convolution."""
    yield computation.operand(instruction, 0).arrays[0]
    yield computation.operand(instruction, 1).arrays[0]
    yield instruction.arrays[0]


def _setting(settings: dict[str, str], key: str, axis: int, default: int) -> int:
    """`stride=2x1` or `pad=0_0x3_3` (its low side) along one axis."""
    return int(settings[key].split("x")[axis].split("_")[0]) if key in settings else default


@functools.cache
def _positions(data: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs (output place, kernel place) that meet an element of the data, along one axis."""
    length, total = (data - 1) * holes + 1, 0
    longer, per_long, per_short = (out, stride, spread) if out >= kernel else (kernel, spread, stride)
    places = np.arange(longer, dtype=np.int64) * per_long - pad
    for short in range(min(out, kernel)):
        at = places + short * per_short
        total += int(np.count_nonzero((at >= 0) & (at < length) & (at % holes == 0)))
    return total
