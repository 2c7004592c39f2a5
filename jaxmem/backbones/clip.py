"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): images and texts as points of one space.

Axis letters: B rows, P patches (and the class token), T tokens, W width of a tower, E width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones import clip_text, vit
from jaxmem.backbones.batch import Array
from jaxmem.backbones.clip_config import ClipConfig
from jaxmem.backbones.encoder import MLP, layer_norm, normed
from jaxmem.backbones.layers import WEIGHT, Linear, attend
from jaxmem.backbones.vit import ViTConfig
from jaxmem.errors import ConfigError


class PoolingHead(nn.Module):
    """SigLIP's: a learned query looks at the normed patches, then x + mlp(norm(x)): [B, P, W] -> [B, W]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, P, W] -> [B, W]."""
        c = self.config
        probe = self.param("probe", WEIGHT, (c.width,)).astype(x.dtype)
        both = jnp.concatenate([jnp.broadcast_to(probe, (len(x), 1, c.width)), x], axis=1)
        parts = Linear(3 * c.width, use_bias=True, name="qkv")(both).reshape(*both.shape[:2], 3, c.heads, c.head_dim)
        query, key, value = parts[:, :1, 0], parts[:, 1:, 1], parts[:, 1:, 2]
        found = attend(query, key, value, jnp.ones((1, 1, x.shape[1]), bool))
        found = Linear(c.width, use_bias=True, name="o")(found)[:, 0]
        return found + MLP(c, name="mlp")(layer_norm(c, "norm")(found))


def init(key: Array, config: ClipConfig) -> dict[str, Any]:
    """Random float32 weights: maps and tables N(0, 0.02^2), biases 0, norms 1, scale and bias of logits 0.

    Returns:
      visual (see `vit.init`), pool, and with a text tower text (see `clip_text.init`), logit_scale, and SigLIP's
      logit_bias.
    """
    visual, head, projection, text = jax.random.split(key, 4)
    width = config.vision.width
    pool: dict[str, Any] = {"norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)}}
    if config.pool == "attention":
        pool["head"] = PoolingHead(config.vision).init(head, jnp.zeros((1, 1, width)))["params"]
    if config.projection:
        pool["projection"] = {"kernel": WEIGHT(projection, (width, config.projection))}
    params = {"visual": vit.init(visual, config.vision), "pool": pool}
    if config.text is None:
        return params
    one = {"logit_scale": jnp.zeros(1), "logit_bias": jnp.zeros(1)}
    logits = one if config.family == "siglip" else {"logit_scale": jnp.zeros(())}
    return params | {"text": clip_text.init(text, config.text)} | logits


def shapes(config: ClipConfig) -> Any:
    """The tree of `init` as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def pool_image(config: ClipConfig, params: Any, state: Array) -> Array:
    """Embeddings of images, not yet of length 1.

    Args:
      config: static.
      params: from `init`.
      state: [B, P, W], the last hidden state, before `post_layernorm`.

    Returns:
      [B, E].

    Raises:
      ConfigError: the folder's tower has no pooling.
    """
    pool = params["pool"]
    if config.pool == "none":
        raise ConfigError(f"this {config.model_type} has vision_use_head false: it gives hidden states, no embeddings")
    if config.pool == "attention":
        found: Any = PoolingHead(config.vision).apply(
            {"params": pool["head"]}, normed(config.vision, pool["norm"], state)
        )
        return found
    found = normed(config.vision, pool["norm"], state[:, 0])
    return found @ pool["projection"]["kernel"] if config.projection else found


def unit(x: Array) -> Array:
    """[B, E] -> float32 [B, E] of length 1."""
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)


def embed_images(config: ClipConfig, params: Any, images: Array, *, interpolate: bool = False) -> Array:
    """Float32 [B, E] of length 1; arguments as in `vit.forward`."""
    (state,) = vit.forward(config.vision, params["visual"], images, interpolate=interpolate)
    return unit(pool_image(config, params, state))


def embed_texts(config: ClipConfig, params: Any, tokens: Array) -> Array:
    """Float32 [B, E] of length 1; tokens as in `clip_text.pool`. Raises ConfigError without a text tower."""
    if config.text is None:
        raise ConfigError(f"this {config.model_type} folder holds no text tower; use the whole model's folder")
    (state,) = clip_text.forward(config.text, params["text"], tokens)
    return unit(clip_text.pool(config.text, params["text"], tokens, state))
