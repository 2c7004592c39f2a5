"""The vision towers of the Qwen-VL family: patches in, merged visual rows (and DeepStack features) out.

Axis letters: B rows, P patches, C pixels per patch, W tower width, M = P / merge^2 merged rows, D decoder width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones import encoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import VisionConfig
from jaxmem.backbones.layers import Linear, RMSNorm, SwiGLU, attend, row_blocks
from jaxmem.backbones.rope import angles, rotate
from jaxmem.backbones.windows import attend_in_windows, by_window, reorder
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError


@flax.struct.dataclass
class Visual:
    """What the tower says of the images of each row.

    Attributes:
      rows: [B, M, D] merged visual rows, in the order of the placeholders.
      deepstack: [taps, B, M, D] features of the tapped blocks, each through its own merger.
      levels: by their numbers, hidden states [B, P, W] of the tower that memories asked for, in the patches' order.
    """

    rows: Array
    deepstack: Array
    levels: dict[int, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Which patches a visual row stands for.

    Attributes:
      side: patches per side of a square tile, whose cells are squares of it (`jaxmem.backbones.cells`); 0 where a row
        stands for ratio^2 neighbours on the patch axis.
      ratio: patches per side of a cell.
      first: visual rows in front of the first cell.
    """

    side: int
    ratio: int
    first: int = 0


Among = Callable[[Array, Array, Array], Array]
"""How a block's patches look at each other: (query, key, value), [B, P, heads, head_dim] each -> [B, P, W]."""

_ACTS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def _norm(config: VisionConfig, name: str) -> nn.Module:
    """LayerNorm (with a two-pass variance: the one-pass form loses digits where the mean is large) or RMSNorm."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, name=name)
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, P, W] -> [B, P, W]."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, angle: Array, among: Among) -> Array:
        c = self.config
        normed = _norm(c, "norm1")(x)
        x = x + _PatchAttention(c, name="attention")(normed, angle, among)
        gated = c.mlp == "swiglu"
        mlp = SwiGLU(c.mlp_width, use_bias=True, name="mlp") if gated else _MLP(c.mlp_width, c.mlp, name="mlp")
        return x + mlp(_norm(c, "norm2")(x))


class _PatchAttention(nn.Module):
    """Attention among patches with 2-D rotary positions; `among` says which see each other."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, angle: Array, among: Among) -> Array:
        c = self.config
        qkv = Linear(3 * c.width, use_bias=True, name="qkv")(x).reshape(*x.shape[:2], 3, c.heads, c.head_dim)
        found = among(rotate(qkv[:, :, 0], angle), rotate(qkv[:, :, 1], angle), qkv[:, :, 2])
        return Linear(c.width, use_bias=True, name="proj")(found)


class _MLP(nn.Module):
    """fc2(act(fc1(x))) with biases."""

    width: int
    act: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = _ACTS[self.act](Linear(self.width, use_bias=True, name="fc1")(x))
        return Linear(x.shape[-1], use_bias=True, name="fc2")(hidden)


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


def _in_frames(frames: Array) -> Among:
    """Every patch sees those of its frame: frames [B, P] int32."""

    def among(query: Array, key: Array, value: Array) -> Array:
        same = lambda some: some[:, :, None] == frames[:, None, :]  # noqa: E731
        return row_blocks(lambda piece: attend(piece[0], key, value, same(piece[1])), (query, frames))

    return among


def _patch_rows(config: VisionConfig, params: Any, batch: Batch) -> Array:
    """[B, P, W]: embedded patches, with the learned positions where the tower has a table."""
    embed = params["patch_embed"]
    dtype = embed["kernel"].dtype
    x = jnp.asarray(batch.patches).astype(dtype) @ embed["kernel"]
    x = x + embed["bias"] if config.patch_bias else x
    if not config.table_side:
        return x
    table = params["position_table"].astype(jnp.float32)[jnp.asarray(batch.patch_table)]  # [B, P, 4, W]
    return x + jnp.einsum("bpcw,bpc->bpw", table, jnp.asarray(batch.patch_weights)).astype(dtype)


def see(
    config: VisionConfig, params: Any, batch: Batch, *, remat: bool = False, levels: tuple[int, ...] = ()
) -> Visual:
    """Runs the tower over the patches of every row, once per prompt.

    Args:
      config: sizes (static).
      params: the `visual` tree; its dtype is the compute dtype.
      batch: patches and their tables; padding patches only see each other and are read by no token.
      remat: a backward pass computes each block once more, and keeps what enters it alone.
      levels: outputs of blocks that are wanted too, counted from 1 as transformers counts hidden states.

    Returns:
      Visual with M = P / merge^2 rows.

    Raises:
      ConfigError: a level that does not exist.
    """
    tapped = (*config.taps, *(level - 1 for level in _levels(config, levels)))
    x, angle = _patch_rows(config, params, batch), _axial_angles(jnp.asarray(batch.patch_coords), config)
    frames = jnp.asarray(batch.patch_segments)
    if not config.window:
        x, taps = _blocks(config, params["blocks"], x, angle, lambda _: _in_frames(frames), remat, tapped)
        return _merged(config, params, x, taps, levels)
    if batch.patch_windows is None:
        raise ValueError("the tower looks through windows and the batch has no patch_windows: encode it anew")
    order = by_window(jnp.asarray(batch.patch_windows), config.merge_unit)
    x, angle, frames, windows = (
        reorder(leaf, order, config.merge_unit) for leaf in (x, angle, frames, jnp.asarray(batch.patch_windows))
    )
    full = jnp.zeros(config.depth, bool).at[jnp.asarray(config.full_blocks, jnp.int32)].set(True)
    whole, parts = _in_frames(frames), attend_in_windows(windows, config.window_patches)

    def among(index: Array) -> Among:
        return lambda query, key, value: jax.lax.cond(full[index], whole, parts, query, key, value)

    x, taps = _blocks(config, params["blocks"], x, angle, among, remat, tapped)
    seen = _merged(config, params, x, taps, levels)
    back = jnp.argsort(order, axis=1)
    deepstack = jax.vmap(lambda rows: reorder(rows, back, 1))(seen.deepstack)
    whole_levels = {name: reorder(level, back, config.merge_unit) for name, level in seen.levels.items()}
    return Visual(reorder(seen.rows, back, 1), deepstack, whole_levels)


def _levels(config: VisionConfig, levels: tuple[int, ...]) -> tuple[int, ...]:
    """Levels counted from 1. Raises ConfigError for one that does not exist."""
    found = encoder.resolve(levels, config.depth) if levels else ()
    if 0 in found:
        raise ConfigError(f"vision levels {list(levels)}: this tower keeps the outputs of blocks 1 to {config.depth}")
    return found


def _blocks(
    config: VisionConfig,
    blocks: Any,
    x: Array,
    angle: Array,
    among: Callable[[Array], Among],
    remat: bool,
    wanted: tuple[int, ...],
) -> tuple[Array, Array]:
    """[B, P, W] through all blocks in one scan -> the same, and [taps, B, P, W] of the wanted ones."""
    tapped = jnp.asarray(wanted, jnp.int32)

    def body(carry: tuple[Array, Array], block: tuple[Array, Any]) -> tuple[tuple[Array, Array], None]:
        (x, taps), (index, weights) = carry, block
        out: Any = constrain(_Block(config).apply({"params": weights}, x, angle, among(index)), "patches")
        return (out, jnp.where((tapped == index)[:, None, None, None], out, taps)), None

    x = constrain(x, "patches")
    carry = (x, jnp.zeros((len(wanted), *x.shape), x.dtype))
    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, (jnp.arange(config.depth), blocks))[0]


def _merged(config: VisionConfig, params: Any, x: Array, taps: Array, levels: tuple[int, ...]) -> Visual:
    """The tower's output and its taps through their mergers; further taps are levels."""
    merge = lambda weights, tap: _Merger(config, norm_joined=True).apply({"params": weights}, tap)  # noqa: E731
    rows: Any = _Merger(config, norm_joined=False).apply({"params": params["merger"]}, x)
    none = jnp.zeros((0, *rows.shape), rows.dtype)
    return Visual(
        rows=constrain(rows, "visual"),
        deepstack=jax.vmap(merge)(params["deepstack"], taps[: len(config.taps)]) if config.taps else none,
        levels=dict(zip(levels, taps[len(config.taps) :], strict=True)),
    )


def init(key: Array, config: VisionConfig) -> Any:
    """Random float32 weights: linear maps and the table N(0, 0.02^2), biases 0, norms 1."""
    patch_key, table_key, block_key, merger_key, tap_key = jax.random.split(key, 5)
    x = jnp.zeros((1, config.merge_unit, config.width))
    angle = jnp.zeros((1, config.merge_unit, config.head_dim // 2))
    among = _in_frames(jnp.ones((1, config.merge_unit), jnp.int32))
    block = lambda k: _Block(config).init(k, x, angle, among)["params"]  # noqa: E731
    merger = lambda k, joined: _Merger(config, joined).init(k, x)["params"]  # noqa: E731
    normal = lambda k, *shape: 0.02 * jax.random.normal(k, shape)  # noqa: E731
    params = {
        "patch_embed": {"kernel": normal(patch_key, config.patch_dim, config.width)},
        "blocks": jax.vmap(block)(jax.random.split(block_key, config.depth)),
        "merger": merger(merger_key, False),
    }
    if config.patch_bias:
        params["patch_embed"]["bias"] = jnp.zeros(config.width)
    if config.table_side:
        params["position_table"] = normal(table_key, config.table_side**2, config.width)
    if config.taps:
        params["deepstack"] = jax.vmap(lambda k: merger(k, True))(jax.random.split(tap_key, len(config.taps)))
    return params
