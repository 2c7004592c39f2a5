"""CoMEM's compressor (arXiv 2505.17670): hidden states of a knowledge item become a few continuous embeddings.

A perceiver resampler: learned latents look `depth` times at the item and at one another, through one block whose
weights all passes share. The item never changes, so its keys and values are made once, not once per pass.

Axis letters: B items, L hidden states of an item, M latents, E width of the hidden states, D of the embeddings,
N heads, H their width, P passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import Linear, attend_branches
from jaxmem.errors import ConfigError, DataError

WEIGHT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """The architecture; all but the widths are the published defaults.

    Attributes:
      width: D, that of the model which reads the embeddings.
      in_width: E, that of the encoder's hidden states.
      latents: M, embeddings per item.
      depth: P, passes through the block.
      heads: N.
      head_dim: H.
      ff_mult: hidden width of the feed-forward branch, in D.
      shared: all passes have the same weights; otherwise each has its own.
      norm_eps: of every LayerNorm.
    """

    width: int
    in_width: int
    latents: int = 8
    depth: int = 8
    heads: int = 16
    head_dim: int = 224
    ff_mult: int = 4
    shared: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("width", "in_width", "latents", "depth", "heads", "head_dim", "ff_mult")
        if wrong := [f"{name} {getattr(self, name)} must be at least 1" for name in sizes if getattr(self, name) < 1]:
            raise ConfigError("Q-Former: " + "; ".join(wrong))


class Block(nn.Module):
    """One pass: latents look at the item and at themselves, then the feed-forward branch."""

    config: QFormerConfig

    def setup(self) -> None:
        """Three LayerNorms with bias, five maps without."""
        c = self.config
        norm = lambda: nn.LayerNorm(c.norm_eps, use_fast_variance=False)  # noqa: E731
        linear = lambda features: Linear(features, kernel_init=WEIGHT)  # noqa: E731
        self.norm_item, self.norm_latents, self.norm_ffn = norm(), norm(), norm()
        self.q, self.kv, self.o = linear(c.heads * c.head_dim), linear(2 * c.heads * c.head_dim), linear(c.width)
        self.fc1, self.fc2 = linear(c.ff_mult * c.width), linear(c.width)

    def look(self, item: Array) -> tuple[Array, Array]:
        """Keys and values of the item: [B, L, D] -> two of [B, N, L, H]."""
        return self._keys(_normed(self.norm_item, item))

    def __call__(self, latents: Array, item: tuple[Array, Array], valid: Array) -> Array:
        """[B, M, D] latents, the item's keys and values, [B, L] bool -> [B, M, D].

        The latents themselves are always seen, so an item of padding alone gives finite numbers.
        """
        c = self.config
        normed = _normed(self.norm_latents, latents)
        query = self.q(normed).reshape(-1, 1, c.latents, c.heads, c.head_dim)
        own_key, own_value = (part[:, None] for part in self._keys(normed))
        sees = jnp.broadcast_to(valid[:, None, None], (len(valid), 1, c.latents, valid.shape[1]))
        all_of_them = jnp.ones((len(valid), 1, c.latents, c.latents), bool)
        found = attend_branches(query, item, (own_key, own_value), sees, all_of_them)
        latents = latents + self.o(found[:, 0])
        grown = jax.nn.gelu(self.fc1(_normed(self.norm_ffn, latents)), approximate=False)
        return latents + self.fc2(grown)

    def _keys(self, x: Array) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values [B, N, S, H]; the first half of the map's result are keys."""
        c = self.config
        parts = self.kv(x).reshape(*x.shape[:2], 2, c.heads, c.head_dim)
        key, value = jnp.moveaxis(parts, (2, 3), (0, 2))
        return key, value


class Ends(nn.Module):
    """The maps into the latents' space and out of it, each with a bias, and the last LayerNorm."""

    config: QFormerConfig

    def setup(self) -> None:
        """proj_in, proj_out, norm_out."""
        c = self.config
        self.proj_in, self.proj_out = (Linear(c.width, True, WEIGHT) for _ in range(2))
        self.norm_out = nn.LayerNorm(c.norm_eps, use_fast_variance=False)

    def enter(self, hidden: Array) -> Array:
        """[B, L, E] -> [B, L, D]."""
        return self.proj_in(hidden)

    def leave(self, latents: Array) -> Array:
        """[B, M, D] -> [B, M, D], of zero mean and unit variance at first."""
        return _normed(self.norm_out, self.proj_out(latents))

    def __call__(self, hidden: Array) -> Array:
        """All maps one after the other, for `init`."""
        return self.leave(self.enter(hidden))


def _normed(norm: nn.LayerNorm, x: Array) -> Array:
    """LayerNorm with statistics in float32 and the result in the dtype of x."""
    return norm(x).astype(x.dtype)


def init(key: Array, config: QFormerConfig) -> dict[str, Any]:
    """Fresh float32 parameters: latents N(0, 1) / sqrt(D), maps N(0, 0.02), biases 0.

    Args:
      key: a random key.
      config: the architecture.

    Returns:
      latents [M, D], proj_in, proj_out, norm_out, and block; or, unless shared, blocks with leaves stacked on [P].
    """
    latents, ends, block = jax.random.split(key, 3)

    def fresh(key: Array) -> Any:
        item, one = jnp.zeros((1, 1, config.width)), jnp.ones((1, 1), bool)
        together = lambda module, x: module(jnp.zeros((1, config.latents, config.width)), module.look(x), one)  # noqa: E731
        return Block(config).init(key, item, method=together)["params"]

    each = jax.random.split(block, config.depth)
    return {
        "latents": jax.random.normal(latents, (config.latents, config.width)) * config.width**-0.5,
        **({"block": fresh(block)} if config.shared else {"blocks": jax.vmap(fresh)(each)}),
        **Ends(config).init(ends, jnp.zeros((1, 1, config.in_width)))["params"],
    }


def compress(config: QFormerConfig, params: Any, hidden: Array, valid: Array) -> Array:
    """The embeddings of items (section 3.2 of the paper).

    Neither padding nor the order of the hidden states matters.

    Args:
      config: static.
      params: from `init`.
      hidden: [B, L, E] last hidden states of the encoder, after its final norm. Activations take this dtype.
      valid: [B, L] bool, False at padding.

    Returns:
      [B, M, D] in the dtype of `hidden`.

    Raises:
      DataError: shapes that do not fit.
    """
    if hidden.ndim != 3 or hidden.shape[-1] != config.in_width or valid.shape != hidden.shape[:2]:
        raise DataError(
            f"Q-Former: hidden states {hidden.shape} with valid {valid.shape} are not [B, L, {config.in_width}] with"
            " [B, L]"
        )
    block, ends = Block(config), {"params": {name: params[name] for name in ("proj_in", "proj_out", "norm_out")}}
    item: Any = Ends(config).apply(ends, jnp.where(valid[..., None], hidden, 0), method="enter")
    latents = jnp.broadcast_to(params["latents"].astype(hidden.dtype), (len(hidden), *params["latents"].shape))
    look = lambda weights: block.apply({"params": weights}, item, method="look")  # noqa: E731
    seen = look(params["block"]) if config.shared else None

    def one_pass(latents: Array, own: Any) -> tuple[Array, None]:
        weights = params["block"] if config.shared else own
        keys = seen if config.shared else look(own)
        return block.apply({"params": weights}, latents, keys, valid), None  # pyrefly: ignore

    passes = None if config.shared else params["blocks"]
    latents, _ = jax.lax.scan(one_pass, latents, passes, length=config.depth)
    return Ends(config).apply(ends, latents, method="leave")  # pyrefly: ignore
