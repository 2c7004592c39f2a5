"""TokenPacker (arXiv 2407.02392): a coarse token looks at the finer features of its own cell.

Axis letters: B tiles, P patches, C width of the tower, N' tokens, K patches of a cell, E inner width, N heads, H their
width, D width of the decoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones import cells
from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import WEIGHT, Linear
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import Norm, TwoLayer, cell_centres


class TokenPacker(nn.Module):
    """Point-to-region attention (section 3.2 of the paper), without a residual from the query, then the MLP."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C], and [B, P, C] for each of `config.layers` -> [B, N', D]."""
        c = self.config
        width, fine = c.width, jnp.concatenate(levels, axis=-1)
        norm = lambda name, x: Norm(c.norm_eps, name=f"norm_{name}")(x)  # noqa: E731
        query = norm("q", Linear(width, name="q")(cell_centres(features, c.side, c.ratio)))
        key, value = (norm(name, TwoLayer(width, name=name)(fine)) for name in "kv")
        found = Region(c, name="attention")(query, key, value)
        return TwoLayer(c.out_width, c.act, c.bias, name="mlp")(found)


class Region(nn.Module):
    """Multi-head attention of every token to its own cell: [B, N', E], two of [B, P, E] -> [B, N', E]."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        """[B, N', E], two of [B, P, E] -> [B, N', E]."""
        c, width = self.config, query.shape[-1]
        query, key, value = Packed(name="qkv")(query, key, value)
        key, mask = cells.pack(key, c.side, c.ratio)
        value, _ = cells.pack(value, c.side, c.ratio)
        query, key, value = (x.reshape(*x.shape[:-1], c.heads, -1) for x in (query, key, value))
        scores = jnp.einsum("bnhd,bnkhd->bnhk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        found = jnp.einsum("bnhk,bnkhd->bnhd", weights, value)
        return Linear(width, True, name="o")(found.reshape(*found.shape[:2], width))


class Packed(nn.Module):
    """The maps of queries, keys and values, whose weights lie side by side: three of [..., E] -> three of [..., E]."""

    @nn.compact
    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Three of [..., E] -> three of [..., E]."""
        width, dtype = inputs[0].shape[-1], inputs[0].dtype
        kernel = self.param("kernel", WEIGHT, (width, 3 * width)).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).astype(dtype)
        maps = zip(inputs, jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return tuple(x @ weight + shift for x, weight, shift in maps)
