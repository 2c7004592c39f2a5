"""LLaVA-NeXT's perceiver resampler (after Flamingo, arXiv 2204.14198), and the MLP behind it.

Axis letters: B tiles, P patches, C width of the tower, M latents, W = N H inner width of attention, D width of the
decoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import Linear
from jaxmem.backbones.projectors.config import ACTS, ProjectorConfig
from jaxmem.backbones.projectors.parts import Norm, TwoLayer, look

GROW = 4
"""Hidden width of a feed-forward branch, in C."""


class Perceiver(nn.Module):
    """Learned latents look at the patches and at one another, `depth` times."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, features: Array, levels: tuple[Array, ...] = ()) -> Array:
        """[B, P, C] -> [B, M, D]."""
        c = self.config
        latents = self.param("latents", nn.initializers.normal(1), (c.queries, c.in_width)).astype(features.dtype)
        latents = jnp.broadcast_to(latents, (len(features), *latents.shape))
        blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.depth)
        latents, _ = blocks(c, name="blocks")(latents, features)
        return TwoLayer(c.out_width, c.act, c.bias, name="mlp")(Norm(c.norm_eps, name="norm")(latents))


class Block(nn.Module):
    """x + attention([patches, x]), then x + feed-forward(x), both from normed inputs and without biases."""

    config: ProjectorConfig

    @nn.compact
    def __call__(self, latents: Array, features: Array) -> tuple[Array, None]:
        """[B, M, C], [B, P, C] -> [B, M, C]."""
        c, width = self.config, self.config.width
        norm = lambda name, x: Norm(c.norm_eps, name=f"norm_{name}")(x)  # noqa: E731
        own = norm("latents", latents)
        both = jnp.concatenate([norm("media", features), own], axis=1)
        key, value = jnp.split(Linear(2 * width, name="kv")(both), 2, axis=-1)
        found = look(Linear(width, name="q")(own), key, value, c.heads)
        latents = latents + Linear(c.in_width, name="o")(found)
        hidden = ACTS["gelu"](Linear(GROW * c.in_width, name="fc1")(norm("ffn", latents)))
        return latents + Linear(c.in_width, name="fc2")(hidden), None
