"""BLIP-2's Q-Former (arXiv 2301.12597) without its text side: queries look at themselves, and in every second layer at
the patches.

Axis letters: B tiles, P patches, C width of the tower, M queries, W inner width, D width of the decoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import WEIGHT, Linear
from jaxmem.backbones.projectors.config import ACTS, ProjectorConfig
from jaxmem.backbones.projectors.parts import Norm, look

GROW = 4
"""Hidden width of a feed-forward branch, in W."""


class QFormer(nn.Module):
    """Pairs of layers, and a map out; norms stand behind the sums, as in BERT."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, M, D]."""
        c = self.config
        queries = self.param("queries", WEIGHT, (c.queries, c.width)).astype(features.dtype)
        queries = Norm(c.norm_eps, name="norm")(jnp.broadcast_to(queries, (len(features), *queries.shape)))
        pairs = nn.scan(Pair, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.depth // 2)
        queries, _ = pairs(c, name="pairs")(queries, features)
        return Linear(c.out_width, True, name="proj_out")(queries)


class Pair(nn.Module):
    """A layer that looks at the patches, and one that does not."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, queries: Array, features: Array) -> tuple[Array, None]:
        """[B, M, W], [B, P, C] -> [B, M, W]."""
        queries = Layer(self.config, name="first")(queries, features)
        return Layer(self.config, name="second")(queries, None), None


class Layer(nn.Module):
    """Self-attention, attention to the patches where there are any, feed-forward."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, queries: Array, features: Array | None) -> Array:
        """[B, M, W], [B, P, C] -> [B, M, W]."""
        norm = lambda name, x: Norm(self.config.norm_eps, name=f"{name}_norm")(x)  # noqa: E731
        linear = lambda name, x, width: Linear(width, True, name=name)(x)  # noqa: E731
        queries = norm("self", queries + Attention(self.config, name="self")(queries, queries))
        if features is not None:
            queries = norm("cross", queries + Attention(self.config, name="cross")(queries, features))
        width = queries.shape[-1]
        hidden = ACTS["gelu"](linear("fc1", queries, GROW * width))
        return norm("ffn", queries + linear("fc2", hidden, width))


class Attention(nn.Module):
    """Multi-head attention with biased maps: [B, M, W] and [B, S, C] -> [B, M, W]."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """[B, M, W], [B, S, C] -> [B, M, W]."""
        linear = lambda name, x: Linear(queries.shape[-1], True, name=name)(x)  # noqa: E731
        found = look(linear("q", queries), linear("k", keys), linear("v", keys), self.config.heads)
        return linear("o", found)
