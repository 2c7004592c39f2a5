"""A checksum of an array's bits that is the same wherever the array lies and however it is cut over devices.

    sum over elements i of word(i) * (2 i + 1)   modulo 2**32

`word` is the element's bits as an unsigned number and i its place in row-major order. The weights are odd, so that
changing a single word always changes the sum; the sum is of whole numbers, so that its order does not matter.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """The checksum (uint32 scalar) of an array of any shape and real dtype, computed where the array lies.

    No element moves between devices: the place of an element is counted along each axis, without flattening.
    """
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis in range(words.ndim):
        stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def checksum_on_host(array: np.ndarray, block: int = 1 << 20) -> int:
    """The same number from a numpy array, `block` words at a time, so that little memory is needed."""
    words, total = np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.dtype.itemsize]), 0
    for start in range(0, words.size, block):
        part = words[start : start + block].astype(np.uint64)
        place = (2 * np.arange(start, start + part.size, dtype=np.uint64) + 1) & 0xFFFFFFFF
        total += int(np.sum((part * place) & 0xFFFFFFFF))
    return total % 2**32


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Name to checksum of many arrays; all are started before the first is waited for."""
    started = {name: checksum(array) for name, array in arrays.items()}
    return {name: int(value) for name, value in started.items()}
