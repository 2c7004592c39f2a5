"""The vision towers of CLIP and SigLIP: square images in, hidden states of chosen layers out.

What comes out is never normed by the tower's `post_layernorm`, which belongs to the pooling (`clip.py`): backbones that
read single layers want them raw.

Axis letters: B images, P patches (and the class token, in front), C = 3 p p numbers of a patch of side p, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import encoder
from jaxmem.backbones.batch import Array
from jaxmem.backbones.encoder import EncoderConfig, hidden_states, normed
from jaxmem.backbones.layers import attend, row_blocks
from jaxmem.errors import ConfigError, DataError

CHANNELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """A vision tower.

    Attributes:
      image_size: pixels per side of the images that the position table is for.
      patch_size: p; pixels beyond the last whole patch are not seen.
      class_token: a learned place stands in front of the patches (CLIP).
      pre_norm: a LayerNorm in front of the blocks (CLIP).
      patch_bias: the patch embedding has a bias (SigLIP).
    """

    image_size: int
    patch_size: int
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes; raises ConfigError."""
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ConfigError(f"ViTConfig: patches of {self.patch_size} pixels do not fit images of {self.image_size}")

    @property
    def side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """P with the class token: rows of the position table."""
        return self.side**2 + self.class_token

    @property
    def patch_dim(self) -> int:
        """C."""
        return CHANNELS * self.patch_size**2


def init(key: Array, config: ViTConfig) -> Any:
    """Random float32 weights: maps, table and class token N(0, 0.02^2), biases 0, norms 1."""
    patch, table, first, blocks = jax.random.split(key, 4)
    normal = lambda key, *shape: 0.02 * jax.random.normal(key, shape)  # noqa: E731
    params = {
        "patch_embed": {"kernel": normal(patch, config.patch_dim, config.width)},
        "position_table": normal(table, config.places, config.width),
        "blocks": encoder.init(blocks, config),
    }
    if config.patch_bias:
        params["patch_embed"]["bias"] = jnp.zeros(config.width)
    if config.class_token:
        params["class_embed"] = normal(first, config.width)
    if config.pre_norm:
        params["pre_norm"] = {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)}
    return params


def forward(
    config: ViTConfig,
    params: Any,
    images: Array,
    layers: Sequence[int] = (-1,),
    *,
    interpolate: bool = False,
    remat: bool = False,
) -> tuple[Array, ...]:
    """Hidden states of images, before any norm behind the blocks.

    Args:
      config: static.
      params: from `init`; their dtype is the compute dtype.
      images: normalised pixels [B, height, width, 3], or patches [B, side^2, C] from `patchify`.
      layers: static; indices as in transformers' `hidden_states`: 0 is what enters the first block (behind CLIP's norm
        there), -1 what the last block gives.
      interpolate: static; pixels of another size get positions by bicubic interpolation of the table, instead of being
        refused.
      remat: a backward pass computes each block once more, and keeps what enters it alone.

    Returns:
      [B, P, W] for each of `layers`.

    Raises:
      ConfigError: a layer that does not exist.
      DataError: images of another shape.
    """
    grid = _grid(config, images.shape, interpolate)
    patches = patchify(config, images) if images.ndim == 4 else images
    embed = params["patch_embed"]
    x = patches.astype(embed["kernel"].dtype) @ embed["kernel"]
    x = x + embed["bias"] if config.patch_bias else x
    if config.class_token:
        first = jnp.broadcast_to(params["class_embed"], (len(x), 1, config.width))
        x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    x = x + positions(config, params["position_table"], grid).astype(x.dtype)
    x = normed(config, params["pre_norm"], x) if config.pre_norm else x
    return hidden_states(config, params["blocks"], x, _everyone, layers, remat=remat)


def patchify(config: ViTConfig, pixels: Array) -> Array:
    """[B, height, width, 3] -> [B, rows * columns, C], row by row, each patch as (channel, y, x)."""
    p, (rows, columns) = config.patch_size, (side // config.patch_size for side in pixels.shape[1:3])
    whole = pixels[:, : rows * p, : columns * p].reshape(len(pixels), rows, p, columns, p, CHANNELS)
    return whole.transpose(0, 1, 3, 5, 2, 4).reshape(len(pixels), rows * columns, -1)


def _grid(config: ViTConfig, shape: tuple[int, ...], interpolate: bool) -> tuple[int, int]:
    """(rows, columns) of patches; DataError for shapes that are not taken."""
    c, size = config, config.image_size
    if len(shape) == 3 and shape[1:] == (c.side**2, c.patch_dim):
        return c.side, c.side
    if len(shape) != 4 or shape[3] != CHANNELS or min(shape[1:3]) < c.patch_size:
        raise DataError(
            f"images {shape} are neither pixels [B, {size}, {size}, {CHANNELS}] nor patches [B, {c.side**2},"
            f" {c.patch_dim}]"
        )
    if not interpolate and shape[1:3] != (size, size):
        raise DataError(
            f"images of {shape[1]}x{shape[2]} pixels: the tower's position table is for {size}x{size}; resize them, or"
            " ask for interpolated positions"
        )
    return shape[1] // c.patch_size, shape[2] // c.patch_size


def positions(config: ViTConfig, table: Array, grid: tuple[int, int]) -> Array:
    """The position table for a grid of (rows, columns) patches.

    Bicubic without antialiasing, as transformers' `interpolate_pos_encoding`; the class token's row stays.

    Args:
      config: static.
      table: [side^2 (+ 1), W].
      grid: static.

    Returns:
      [rows * columns (+ 1), W], the table itself for its own grid, else float32.
    """
    if grid == (config.side, config.side):
        return table
    first, patches = jnp.split(table.astype(jnp.float32), [int(config.class_token)])
    square = patches.reshape(config.side, config.side, config.width)
    down, across = (_bicubic(config.side, count) for count in grid)
    return jnp.concatenate([first, jnp.einsum("ri,cj,ijw->rcw", down, across, square).reshape(-1, config.width)])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """[new, old] float32 weights of a cubic convolution with half-pixel centres and repeated borders."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    start = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centres - start - tap)
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(start + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return weights.astype(np.float32)


def _everyone(query: Array, key: Array, value: Array) -> Array:
    """Every place sees every place."""
    seen = lambda some: attend(some, key, value, jnp.ones((1, some.shape[1], key.shape[1]), bool))  # noqa: E731
    return row_blocks(seen, query)
