"""Rotary position embeddings, one-dimensional and multi-axis, in the rotate-half convention."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxmem.backbones.batch import Array


def interleaved_axes(section: Sequence[int]) -> tuple[int, ...]:
    """Which position axis (0 time, 1 height, 2 width) drives each rotary frequency in interleaved M-RoPE.

    Args:
      section: how many frequencies each axis owns; their sum is half the head width.

    Returns:
      One axis number per frequency: t h w t h w ... and time for what is left (Qwen3-VL).
    """
    axes = [0] * sum(section)
    for axis in (1, 2):
        for frequency in range(axis, min(3 * section[axis], len(axes)), 3):
            axes[frequency] = axis
    return tuple(axes)


def sectioned_axes(section: Sequence[int]) -> tuple[int, ...]:
    """The same for M-RoPE in three runs: t ... t h ... h w ... w (Qwen2-VL, Qwen2.5-VL)."""
    return tuple(axis for axis, count in enumerate(section) for _ in range(count))


def angles(positions: Array, frequency_axes: Sequence[int], theta: float) -> Array:
    """Rotation angles of every token.

    Args:
      positions: [B, A, T] integer positions on A axes.
      frequency_axes: for each of the H/2 frequencies the axis that it follows.
      theta: base of the geometric frequencies theta^(-2j/H).

    Returns:
      [B, T, H/2] float32 radians.
    """
    half = len(frequency_axes)
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    driven = jnp.asarray(positions)[:, jnp.asarray(frequency_axes), :].astype(jnp.float32)  # [B, H/2, T]
    return driven.swapaxes(1, 2) * frequencies


def rotate(x: Array, angle: Array) -> Array:
    """Rotates the two halves of each head against each other, in float32.

    Args:
      x: [B, T, N, H] heads.
      angle: [B, T, H/2] radians.

    Returns:
      [B, T, N, H] in the dtype of x.
    """
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
