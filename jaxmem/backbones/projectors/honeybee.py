"""Honeybee's resampler (arXiv 2312.06742): queries look at themselves and the patches through gated blocks.

Axis letters: B tiles, P patches, C width of the tower, M queries, W inner width, D width of the decoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import WEIGHT, Linear
from jaxmem.backbones.projectors.config import ProjectorConfig
from jaxmem.backbones.projectors.parts import Norm, look

GROW = 4
"""Hidden width of a feed-forward branch, in W."""
HIDDEN_EPS = 1e-6
"""Of the LayerNorm inside a feed-forward branch."""


class Honeybee(nn.Module):
    """A map in, blocks, and a map out, all with biases."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, M, D]."""
        c, width = self.config, self.config.width
        queries = self.param("queries", WEIGHT, (c.queries, width)).astype(features.dtype)
        queries = jnp.broadcast_to(queries, (len(features), *queries.shape))
        features = Linear(width, True, name="proj_in")(features)
        blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.depth)
        queries, _ = blocks(c, name="blocks")(queries, features)
        return Linear(c.out_width, True, name="proj_out")(queries)


class Block(nn.Module):
    """Attention and a gated feed-forward branch; what is added to is the normed query, not the query."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, queries: Array, features: Array) -> tuple[Array, None]:
        """[B, M, W], [B, P, W] -> [B, M, W]."""
        c, width = self.config, queries.shape[-1]
        norm = lambda name, x, eps=c.norm_eps: Norm(eps, name=f"norm_{name}")(x)  # noqa: E731
        linear = lambda name, x, width=width: Linear(width, True, name=name)(x)  # noqa: E731
        queries = norm("queries", queries)
        both = jnp.concatenate([queries, norm("features", features)], axis=1)
        found = look(linear("q", queries), linear("k", both), linear("v", both), c.heads)
        queries = queries + linear("o", found)
        inner = norm("ffn", queries)
        hidden = jax.nn.silu(linear("gate", inner, GROW * width)) * linear("up", inner, GROW * width)
        return queries + linear("down", norm("hidden", hidden, HIDDEN_EPS)), None
