"""Mapping tables: one list of rules ties the tensors of a Hugging Face folder to our tree, in both directions.

A tensor that lies elsewhere (in a safetensors file, in a jax array) is a `View`: a shape, and a way to read any box
of it. Every operation of a rule turns views into views and has an inverse, so that a table answers three questions
with the same few lines: which tensors with which shapes a folder must hold (views of shapes, never read), what our
leaf is, or the slice of it that one device needs (views of files), and what their tensors are (views of our leaves).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.distributed import hosts

Box = tuple[slice, ...]  # one slice per axis, with start and stop
_THREADS, _PIECE = 8, 1 << 24  # at most so many threads fill an array, each so many bytes at a time
_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that has not been read.

    Attributes:
      shape: of the whole tensor.
      dtype: of what `read` returns.
      box: the part that a Box names as a numpy array, which may lie in a mapped file or have its axes swapped.
    """

    shape: tuple[int, ...]
    dtype: Any
    box: Callable[[Box], np.ndarray]

    def read(self, index: Iterable[slice] | None = None) -> np.ndarray:
        """The tensor, or the box that `index` (one slice per axis, step 1) names: in memory, row behind row."""
        index = (slice(None),) * len(self.shape) if index is None else index
        bounds = (part.indices(size) for part, size in zip(index, self.shape, strict=True))
        block = np.asanyarray(self.box(tuple(slice(start, stop) for start, stop, _ in bounds)))
        if type(block) is np.ndarray and block.flags.c_contiguous:
            return block
        out = _empty(block.shape, block.dtype)
        _in_threads(_copy, *_pieces(out, block))
        return out

    def cast(self, dtype: Any) -> View:
        """The same tensor, converted to `dtype` while it is read (to the nearest, ties to even)."""
        return View(self.shape, jnp.dtype(dtype), lambda box: self.box(box).astype(dtype, copy=False))


def view(leaf: Any) -> View:
    """A leaf of our tree (jax.Array, numpy array, ShapeDtypeStruct, which cannot be read, or a View) as a View.

    Of an array that is spread over several hosts, all hosts read the same boxes in the same order.
    """

    if isinstance(leaf, View):
        return leaf

    def box(index: Box) -> np.ndarray:
        if isinstance(leaf, np.ndarray):
            return leaf[index]
        starts, sizes = [part.start for part in index], [part.stop - part.start for part in index]
        return hosts.fetch(jax.lax.dynamic_slice(leaf, starts, sizes) if index else leaf)

    return View(tuple(leaf.shape), leaf.dtype, box)


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Swaps the last two axes: a torch linear weight [out, in] against our kernel [in, out]."""

    def read(self, source: View) -> View:
        """Theirs to ours."""
        *rest, rows, columns = source.shape

        def box(index: Box) -> np.ndarray:
            return source.box((*index[:-2], index[-1], index[-2])).swapaxes(-1, -2)

        return View((*rest, columns, rows), source.dtype, box)

    write = read


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Regroups the trailing axes: `theirs` becomes `ours`; ((3, 2, 16, 16), (1536,)) flattens a convolution's taps."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def read(self, source: View) -> View:
        """Theirs to ours."""
        return _regroup(source, len(self.theirs), self.ours)

    def write(self, source: View) -> View:
        """Ours to theirs."""
        return _regroup(source, len(self.ours), self.theirs)


def _regroup(source: View, count: int, tail: tuple[int, ...]) -> View:
    """The last `count` axes of `source` as `tail`; they are read whole and cut afterwards."""
    head = len(source.shape) - count
    whole = tuple(slice(0, size) for size in source.shape[head:])

    def box(index: Box) -> np.ndarray:
        block = source.box((*index[:head], *whole))
        return block.reshape((*block.shape[:head], *tail))[(slice(None),) * head + index[head:]]

    return View((*source.shape[:head], *tail), source.dtype, box)


def _stack(parts: list[View], lengths: tuple[int, ...]) -> View:
    """Equal tensors along new leading axes of these lengths; threads read them, each into its place in one buffer."""
    dtype, rest = functools.reduce(jnp.promote_types, [part.dtype for part in parts]), parts[0].shape
    places, axes = np.arange(len(parts)).reshape(lengths), len(lengths)

    def box(index: Box) -> np.ndarray:
        chosen, index = places[index[:axes]], index[axes:]
        block = _empty((*chosen.shape, *(part.stop - part.start for part in index)), dtype)
        slots = block.reshape(-1, *block.shape[axes:])

        def fill(slot: int, place: int) -> None:
            _copy(slots[slot, ...], parts[place].box(index))

        _in_threads(fill, range(len(slots)), chosen.flat)
        return block

    return View((*lengths, *rest), dtype, box)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new array at an address that jax on a CPU takes as it is; elsewhere in memory it would copy it once more."""
    count = math.prod(shape) * jnp.dtype(dtype).itemsize
    room = np.empty(count + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + count].view(dtype).reshape(shape)


def _in_threads(work: Callable[..., None], *arguments: Iterable[Any]) -> None:
    """Calls a function with one of each argument's items after the other; numpy copies without python's lock."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(work, *arguments))


def _outer(block: np.ndarray) -> int:
    """The axis, of the first and the last, whose entries lie farther apart in memory."""
    return -1 if block.ndim > 1 and block.strides[-1] > block.strides[-2] else 0


def _pieces(*arrays: np.ndarray) -> list[list[np.ndarray]]:
    """Arrays of one shape, each cut at the same places along the rows of the last one."""
    source = arrays[-1]
    parts = math.ceil(source.nbytes / _PIECE) if source.ndim else 1
    return [np.array_split(array, parts, _outer(source)) if parts > 1 else [array] for array in arrays]


def _copy(out: np.ndarray, block: np.ndarray, rows: int = 256) -> None:
    """Fills an array; from swapped axes a few rows of the source at a time, which stay in the cache."""
    if _outer(block) == 0:
        return np.copyto(out, block)
    for start in range(0, block.shape[-1], rows):
        np.copyto(out[..., start : start + rows], block[..., start : start + rows])


def _row(source: View, slot: int) -> View:
    """Entry `slot` of the leading axis."""
    return View(source.shape[1:], source.dtype, lambda index: source.box((slice(slot, slot + 1), *index))[0])


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf of our tree and the tensor, or the family of tensors, that it is made of.

    Attributes:
      ours: path of the leaf, such as "layers/attention/q/kernel".
      theirs: name of the tensor; `{i}` stands for the index `i` of `stack`.
      operations: applied in this order from each of their tensors to ours.
      stack: leading axes of our leaf, outermost first: (index name, its values in the order of our slots).
    """

    ours: str
    theirs: str
    operations: tuple[Transpose | Reshape, ...] = ()
    stack: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def read(self, tensors: Mapping[str, View]) -> View:
        """Our leaf from their tensors. Raises KeyError with the first name that `tensors` lacks."""

        names, values = zip(*self.stack, strict=True) if self.stack else ((), ())
        parts = []
        for bound in itertools.product(*values):
            source = tensors[self.theirs.format(**dict(zip(names, bound, strict=True)))]
            parts.append(functools.reduce(lambda source, step: step.read(source), self.operations, source))
        return _stack(parts, tuple(map(len, values))) if self.stack else parts[0]

    def write(self, leaf: View) -> Iterator[tuple[str, View]]:
        """Their names and tensors from our leaf."""

        def scatter(source: View, stack: tuple, bound: dict[str, int]) -> Iterator[tuple[str, View]]:
            if stack:
                (name, values), *rest = stack
                _same_length(self, source, values)
                for slot, value in enumerate(values):
                    yield from scatter(_row(source, slot), tuple(rest), bound | {name: value})
            else:
                steps = reversed(self.operations)
                yield self.theirs.format(**bound), functools.reduce(lambda part, step: step.write(part), steps, source)

        return scatter(leaf, self.stack, {})


def _same_length(rule: Rule, source: View, values: tuple[int, ...]) -> None:
    """Raises ValueError when a leaf has more or fewer slots than its rule."""
    if source.shape[:1] != (len(values),):
        raise ValueError(f"{rule.ours}: shape {source.shape}, but its rule stacks {len(values)} tensors")


Table = tuple[Rule, ...]


def write_tree(table: Table, tree: Any) -> Iterator[tuple[str, View]]:
    """Names and views of all their tensors from our tree of arrays (or of ShapeDtypeStructs), in the table's order.

    Raises ValueError when tree and table do not name the same leaves, or a leaf's slots do not match its rule.
    """
    leaves = flatten(tree)
    differing = sorted(set(leaves) ^ {rule.ours for rule in table})
    if differing:
        raise ValueError(f"the tree and its mapping table differ at {', '.join(differing)}")
    for rule in table:
        yield from rule.write(view(leaves[rule.ours]))


def expected(table: Table, shapes: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder must hold for the tree of target `shapes`."""
    return {name: tensor.shape for name, tensor in write_tree(table, shapes)}


def flatten(tree: Any) -> dict[str, Any]:
    """Path ("layers/ffn/up/kernel") to leaf of a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def size(tensor: View) -> int:
    """Bytes of a tensor."""
    return math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize
