"""The transformer encoder of CLIP and SigLIP, for images and texts alike, and which of its hidden states are wanted.

Hidden states are counted as in transformers: 0 is what enters the first block, k is what block k gives (blocks counted
from 1), always before any norm behind the blocks.

Axis letters: B rows, T patches or tokens, W width, N heads, H their width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import Linear
from jaxmem.distributed.mesh import constrain
from jaxmem.errors import ConfigError

ACTS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
"""By their names in config.json."""

Among = Callable[[Array, Array, Array], Array]
"""How places look at each other: (query, key, value), [B, T, N, H] each -> [B, T, W]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The blocks.

    Attributes:
      width: W.
      depth: blocks.
      heads: N, a divisor of the width.
      mlp_width: hidden width of a block's MLP.
      act: a key of `ACTS`.
      norm_eps: of every LayerNorm.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    act: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Checks the sizes; raises ConfigError."""
        name = type(self).__name__
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == "int"}
        if wrong := [f"{key} {size!r}" for key, size in sizes.items() if not isinstance(size, int) or size < 1]:
            raise ConfigError(f"{name}: {', '.join(wrong)} must be whole numbers of at least 1")
        if self.width % self.heads:
            raise ConfigError(f"{name}: width {self.width} is not a multiple of {self.heads} heads")
        if self.act not in ACTS:
            raise ConfigError(f"{name}: activation {self.act!r} is not implemented; there are {', '.join(ACTS)}")

    @property
    def head_dim(self) -> int:
        """H."""
        return self.width // self.heads


def layer_norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with scale and bias, statistics in float32, and a variance in two passes."""
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


def normed(config: EncoderConfig, params: Any, x: Array) -> Array:
    """LayerNorm by {"scale", "bias"}: [..., W] -> [..., W]."""
    found: Any = layer_norm(config).apply({"params": params}, x)
    return found.astype(x.dtype)


class MLP(nn.Module):
    """fc2(act(fc1(x))) with biases: [..., W] -> [..., W]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., W] -> [..., W]."""
        hidden = ACTS[self.config.act](Linear(self.config.mlp_width, use_bias=True, name="fc1")(x))
        return Linear(self.config.width, use_bias=True, name="fc2")(hidden)


class SelfAttention(nn.Module):
    """Attention with biased maps; `among` says which places see each other: [B, T, W] -> [B, T, W]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, among: Among) -> Array:
        """[B, T, W] -> [B, T, W]."""
        c = self.config
        linear = lambda name: Linear(c.width, use_bias=True, name=name)  # noqa: E731
        query, key, value = (linear(name)(x).reshape(*x.shape[:2], c.heads, c.head_dim) for name in "qkv")
        return linear("o")(among(query, key, value))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): [B, T, W] -> [B, T, W]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, among: Among) -> Array:
        """[B, T, W] -> [B, T, W]."""
        c = self.config
        x = x + SelfAttention(c, name="attention")(layer_norm(c, "norm1")(x), among)
        return x + MLP(c, name="mlp")(layer_norm(c, "norm2")(x))


def init(key: Array, config: EncoderConfig) -> Any:
    """Random float32 weights of all blocks, stacked on a leading axis [depth]: maps N(0, 0.02^2), biases 0, norms 1."""
    x, alone = jnp.zeros((1, 1, config.width)), lambda query, key, value: value.reshape(1, 1, -1)
    block = lambda key: Block(config).init(key, x, alone)["params"]  # noqa: E731
    return jax.vmap(block)(jax.random.split(key, config.depth))


def resolve(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of hidden states, counted from the front: -1 is `depth`.

    Args:
      layers: one or more indices as in transformers' `hidden_states`.
      depth: blocks; there are depth + 1 hidden states.

    Raises:
      ConfigError: a hidden state that does not exist, or none asked for.
    """
    wrong = [layer for layer in layers if not -depth - 1 <= layer <= depth]
    if wrong or not layers:
        raise ConfigError(
            f"hidden states {list(layers)}: {wrong or 'none'} cannot be given; {depth} blocks have 0 (what enters the"
            f" first) to {depth}, or {-depth - 1} to -1"
        )
    return tuple(layer % (depth + 1) for layer in layers)


def hidden_states(
    config: EncoderConfig, blocks: Any, x: Array, among: Among, layers: Sequence[int], *, remat: bool = False
) -> tuple[Array, ...]:
    """The wanted hidden states, in one scan over the blocks; blocks behind the last wanted one are not computed.

    Args:
      config: static.
      blocks: from `init`.
      x: [B, T, W].
      among: which places see each other.
      layers: see `resolve`.
      remat: a backward pass computes each block once more, and keeps what enters it alone.

    Returns:
      [B, T, W] for each of `layers`, in their order.
    """
    wanted = resolve(layers, config.depth)
    last, kept = max(wanted), sorted(set(wanted) - {0, max(wanted)})
    slots = np.full(config.depth, len(kept), np.int32)  # what nobody asks for is written to a spare slot
    slots[[layer - 1 for layer in kept]] = np.arange(len(kept))

    def body(carry: tuple[Array, Array], step: tuple[Array, Array, Any]) -> tuple[tuple[Array, Array], None]:
        (x, states), (index, slot, weights) = carry, step

        def one(x: Array) -> Array:
            out: Any = Block(config).apply({"params": weights}, x, among)
            return constrain(out, "patches")

        one = jax.checkpoint(one) if remat else one
        x = one(x) if last == config.depth else jax.lax.cond(index < last, one, lambda x: x, x)
        return (x, jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)), None

    entered = constrain(x, "patches")
    carry = (entered, jnp.zeros((len(kept) + 1, *x.shape), x.dtype))
    (left, states), _ = jax.lax.scan(body, carry, (jnp.arange(config.depth), slots, blocks))
    found = {0: entered} | {layer: states[slot] for slot, layer in enumerate(kept)} | ({last: left} if last else {})
    return tuple(found[layer] for layer in wanted)
