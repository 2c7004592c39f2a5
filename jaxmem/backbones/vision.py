"""The Qwen3-VL vision tower: patches in, merged visual rows and DeepStack features out.

Axis letters: B rows, P patches, C pixels per patch, W tower width, M = P / merge^2 merged rows, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import VisionConfig
from jaxmem.backbones.layers import Linear, attend, row_blocks
from jaxmem.backbones.rope import angles, rotate
from jaxmem.distributed.mesh import constrain


@flax.struct.dataclass
class Visual:
    """What the tower says of the images of each row.

    Attributes:
      rows: [B, M, D] merged visual rows, in the order of the placeholders.
      deepstack: [taps, B, M, D] features of the tapped blocks, each through its own merger.
    """

    rows: Array
    deepstack: Array


def _norm(config: VisionConfig, name: str) -> nn.LayerNorm:
    """LayerNorm with a two-pass variance: the one-pass form loses digits where the mean is large."""
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


class _Block(nn.Module):
    """LayerNorm attention inside a frame, then a LayerNorm MLP with tanh-GELU: [B, P, W] -> [B, P, W]."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, angle: Array, frames: Array) -> Array:
        c = self.config
        normed = _norm(c, "norm1")(x)
        x = x + _FrameAttention(c, name="attention")(normed, angle, frames)
        normed = _norm(c, "norm2")(x)
        return x + _MLP(c.mlp_width, c.width, lambda h: jax.nn.gelu(h, approximate=True), name="mlp")(normed)


class _FrameAttention(nn.Module):
    """Full attention among the patches of one frame, with 2-D rotary positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, angle: Array, frames: Array) -> Array:
        c = self.config
        qkv = Linear(3 * c.width, use_bias=True, name="qkv")(x).reshape(*x.shape[:2], 3, c.heads, c.head_dim)
        query, key, value = rotate(qkv[:, :, 0], angle), rotate(qkv[:, :, 1], angle), qkv[:, :, 2]
        same = lambda some: some[:, :, None] == frames[:, None, :]  # noqa: E731
        found = row_blocks(lambda piece: attend(piece[0], key, value, same(piece[1])), (query, frames))
        return Linear(c.width, use_bias=True, name="proj")(found)


class _MLP(nn.Module):
    """fc2(act(fc1(x))) with biases."""

    width: int
    out: int
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Linear(self.out, use_bias=True, name="fc2")(self.act(Linear(self.width, use_bias=True, name="fc1")(x)))


class _Merger(nn.Module):
    """Joins merge^2 neighbouring patches and maps them to the decoder's width: [B, P, W] -> [B, M, D].

    The main merger normalises each patch, the DeepStack mergers normalise the joined patches.
    """

    config: VisionConfig
    norm_joined: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, norm = self.config, _norm(self.config, "norm")
        joined = (x.shape[0], x.shape[1] // c.merge_unit, c.merge_unit * c.width)
        x = norm(x.reshape(joined)) if self.norm_joined else norm(x).reshape(joined)
        x = Linear(joined[-1], use_bias=True, name="fc1")(x)
        return Linear(c.out_width, use_bias=True, name="fc2")(jax.nn.gelu(x, approximate=False))


def _axial_angles(coords: Array, config: VisionConfig) -> Array:
    """[B, P, 2] (row, column) -> [B, P, head_dim/2] radians: half the frequencies follow rows, half columns."""
    quarter = config.head_dim // 4
    row, column = (angles(coords[..., axis][:, None], (0,) * quarter, config.rope_theta) for axis in (0, 1))
    return jnp.concatenate([row, column], axis=-1)


def see(config: VisionConfig, params: Any, batch: Batch) -> Visual:
    """Runs the tower over the patches of every row, once per prompt.

    Args:
      config: sizes (static).
      params: the `visual` tree; its dtype is the compute dtype.
      batch: patches and their tables; padding patches only see each other and are read by no token.

    Returns:
      Visual with M = P / merge^2 rows.
    """
    dtype = params["patch_embed"]["kernel"].dtype
    x = jnp.asarray(batch.patches).astype(dtype) @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    table = params["position_table"].astype(jnp.float32)[jnp.asarray(batch.patch_table)]  # [B, P, 4, W]
    x = x + jnp.einsum("bpcw,bpc->bpw", table, jnp.asarray(batch.patch_weights)).astype(dtype)

    angle = _axial_angles(jnp.asarray(batch.patch_coords), config)
    frames = jnp.asarray(batch.patch_segments)
    tapped = jnp.asarray(config.taps, jnp.int32)

    def body(carry: tuple[Array, Array], block: tuple[Array, Any]) -> tuple[tuple[Array, Array], None]:
        (x, taps), (index, weights) = carry, block
        out: Any = constrain(_Block(config).apply({"params": weights}, x, angle, frames), "patches")
        return (out, jnp.where((tapped == index)[:, None, None, None], out, taps)), None

    x = constrain(x, "patches")
    carry = (x, jnp.zeros((len(config.taps), *x.shape), dtype))
    (x, taps), _ = jax.lax.scan(body, carry, (jnp.arange(config.depth), params["blocks"]))
    merge = lambda weights, tap: _Merger(config, norm_joined=True).apply({"params": weights}, tap)  # noqa: E731
    rows: Any = _Merger(config, norm_joined=False).apply({"params": params["merger"]}, x)
    return Visual(
        rows=constrain(rows, "visual"),
        deepstack=jax.vmap(merge)(params["deepstack"], taps),
    )


def init(key: Array, config: VisionConfig) -> Any:
    """Random float32 weights: linear maps and the table N(0, 0.02^2), biases 0, norms 1."""
    patch_key, table_key, block_key, merger_key, tap_key = jax.random.split(key, 5)
    x = jnp.zeros((1, config.merge_unit, config.width))
    angle = jnp.zeros((1, config.merge_unit, config.head_dim // 2))
    frames = jnp.ones((1, config.merge_unit), jnp.int32)
    block = lambda k: _Block(config).init(k, x, angle, frames)["params"]  # noqa: E731
    merger = lambda k, joined: _Merger(config, joined).init(k, x)["params"]  # noqa: E731
    normal = lambda k, *shape: 0.02 * jax.random.normal(k, shape)  # noqa: E731
    return {
        "patch_embed": {"kernel": normal(patch_key, config.patch_dim, config.width), "bias": jnp.zeros(config.width)},
        "position_table": normal(table_key, config.table_side**2, config.width),
        "blocks": jax.vmap(block)(jax.random.split(block_key, config.depth)),
        "merger": merger(merger_key, False),
        "deepstack": jax.vmap(lambda k: merger(k, True))(jax.random.split(tap_key, len(config.taps))),
    }
