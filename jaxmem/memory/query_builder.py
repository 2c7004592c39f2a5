"""VisMem's query builder (arXiv 2511.11007): hidden states of the image and of the text become K query vectors.

A small pre-norm transformer, shared by both memory types, reads [H ; Q]. The mask lets hidden states attend to hidden
states alone, in both directions, and queries to hidden states and to one another: what a hidden state becomes does not
depend on the queries. Equation 10 as printed takes the layer's input as the residual of the feed-forward branch, and
equation 11 cuts the mask at K; both are read as slips, the first is kept as `residual="paper_eq10"`.

Axis letters: B rows, H hidden states, K queries, S = H + K, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.layers import Linear, attend
from jaxmem.errors import ConfigError, DataError

EMBEDDING = nn.initializers.normal(0.02)
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(+-1/sqrt(in)): Kaiming with a = sqrt(5)."""
XAVIER_OF_THREE = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
"""U(+-sqrt(6/(D + 3D))) for one D x D part of a fused 3D x D map."""


@dataclasses.dataclass(frozen=True)
class QueryBuilderConfig:
    """The query builder's architecture; defaults are the published ones.

    Attributes:
      width: D, that of the language model.
      queries: K.
      layers: encoder layers (not given in the paper; two in its code).
      heads: attention heads, which divide the width.
      ff_mult: hidden width of the feed-forward branch, in D.
      max_length: rows of the position table: the most that H + K can be.
      norm_eps: of every LayerNorm.
      residual: "prenorm": x + FF(LN(x)) after attention; "paper_eq10": the layer's input + FF(LN(x)), as printed.
      twin_layers: all layers start alike, as in the published code; training alone parts them.
    """

    width: int
    queries: int = 8
    layers: int = 2
    heads: int = 8
    ff_mult: int = 4
    max_length: int = 2048
    norm_eps: float = 1e-5
    residual: Literal["prenorm", "paper_eq10"] = "prenorm"
    twin_layers: bool = False

    def __post_init__(self) -> None:
        sizes = ("width", "queries", "layers", "heads", "ff_mult", "max_length")
        faults = {f"{name} {getattr(self, name)} must be at least 1": getattr(self, name) < 1 for name in sizes} | {
            f"width {self.width} is not a multiple of {self.heads} heads": self.heads > 0 and self.width % self.heads,
            f"max_length {self.max_length} leaves no room for hidden states beside {self.queries} queries": (
                self.max_length <= self.queries
            ),
            f"residual {self.residual!r} is neither 'prenorm' nor 'paper_eq10'": (
                self.residual not in ("prenorm", "paper_eq10")
            ),
        }
        if wrong := [message for message, fault in faults.items() if fault]:
            raise ConfigError("query builder: " + "; ".join(wrong))


class SelfAttention(nn.Module):
    """Multi-head attention with biases and a float32 softmax: [B, S, D], mask [B, S, S] -> [B, S, D]."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """softmax(q k' / sqrt(D / heads), where the mask is True) v, through the output map."""
        width = x.shape[-1]
        split = (*x.shape[:2], self.heads, width // self.heads)
        part = lambda name: Linear(width, True, XAVIER_OF_THREE, name=name)(x).reshape(split)  # noqa: E731
        return Linear(width, True, UNIFORM, name="o")(attend(part("q"), part("k"), part("v"), mask))


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))) with the exact GELU: [B, S, D] -> [B, S, D]."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, S, D] -> [B, S, D]."""
        grown = jax.nn.gelu(Linear(self.hidden, True, UNIFORM, name="fc1")(x), approximate=False)
        return Linear(x.shape[-1], True, UNIFORM, name="fc2")(grown)


class EncoderLayer(nn.Module):
    """One pre-norm encoder layer (equation 10): [B, S, D], mask [B, S, S] -> [B, S, D]."""

    config: QueryBuilderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """a = x + MHA(LN(x)); a + FF(LN(a)), or x + FF(LN(a)) with the residual as printed."""
        c = self.config
        after = x + SelfAttention(c.heads, name="attention")(_norm(c, x, "norm1"), mask)
        kept = after if c.residual == "prenorm" else x
        return kept + FeedForward(c.ff_mult * c.width, name="ffn")(_norm(c, after, "norm2"))


def _norm(config: QueryBuilderConfig, x: Array, name: str) -> Array:
    """LayerNorm inside a module: statistics in float32, the result in the dtype of x."""
    return nn.LayerNorm(config.norm_eps, dtype=x.dtype, use_fast_variance=False, name=name)(x)


class LastNorm(nn.Module):
    """The LayerNorm over the stack's result, under the name `norm`: [B, S, D] -> [B, S, D]."""

    config: QueryBuilderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, S, D] -> [B, S, D]."""
        return _norm(self.config, x, "norm")


def init(key: Array, config: QueryBuilderConfig) -> dict[str, Any]:
    """Fresh float32 parameters, with the distributions of the published code.

    Args:
      key: a random key.
      config: the architecture.

    Returns:
      q_init [K, D], pos_emb [max_length, D], norm/{scale,bias} [D] and layers/..., stacked on a leading axis.
    """
    queries, positions, layers = jax.random.split(key, 3)
    keys = jax.random.split(layers, config.layers)
    if config.twin_layers:
        keys = jnp.broadcast_to(keys[:1], keys.shape)
    x = jnp.zeros((1, 1, config.width))
    return {
        "q_init": EMBEDDING(queries, (config.queries, config.width), jnp.float32),
        "pos_emb": EMBEDDING(positions, (config.max_length, config.width), jnp.float32),
        "layers": jax.vmap(lambda k: _layer(k, config))(keys),
        **LastNorm(config).init(key, x)["params"],
    }


def _layer(key: Array, config: QueryBuilderConfig) -> dict[str, Any]:
    """Parameters of one layer. The feed-forward biases are U(+-1/sqrt(in)), those of attention 0."""
    weights, *biases = jax.random.split(key, 3)
    mask = jnp.ones((1, 1, 1), bool)
    params: Any = EncoderLayer(config).init(weights, jnp.zeros((1, 1, config.width)), mask)["params"]

    def with_bias(name: str, key: Array) -> dict[str, Array]:
        kernel = params["ffn"][name]["kernel"]
        bound = kernel.shape[0] ** -0.5
        return {"kernel": kernel, "bias": jax.random.uniform(key, kernel.shape[1:], jnp.float32, -bound, bound)}

    return {**params, "ffn": {name: with_bias(name, key) for name, key in zip(("fc1", "fc2"), biases, strict=True)}}


def build(config: QueryBuilderConfig, params: Any, hidden: Array, valid: Array) -> Array:
    """The queries that hidden states lead to (equations 10 and 11).

    Padding may stand anywhere, and what is in it is ignored: a row's queries are those of its valid states alone.

    Args:
      config: static.
      params: from `init`.
      hidden: [B, H, D] states of the image, then of the text; H may be 0. Activations take this dtype.
      valid: [B, H] bool.

    Returns:
      [B, K, D] in the dtype of `hidden`.

    Raises:
      DataError: shapes that do not fit, or H + K above `max_length`.
    """
    return build_all(config, params, hidden, valid)[:, hidden.shape[1] :]


def build_all(config: QueryBuilderConfig, params: Any, hidden: Array, valid: Array) -> Array:
    """As `build`, with what the hidden states became in front: [B, H + K, D]; rows of padding mean nothing."""
    _check(config, hidden, valid)
    rows, places = _rows(config, params, hidden, valid)
    x = rows + params["pos_emb"].astype(hidden.dtype)[places]
    mask = _mask(valid, config.queries)

    def step(x: Array, layer: Any) -> tuple[Array, None]:
        return EncoderLayer(config).apply({"params": layer}, x, mask), None

    x, _ = jax.lax.scan(step, x, params["layers"])
    return LastNorm(config).apply({"params": {"norm": params["norm"]}}, x)


def _check(config: QueryBuilderConfig, hidden: Array, valid: Array) -> None:
    if hidden.ndim != 3 or hidden.shape[-1] != config.width or valid.shape != hidden.shape[:2]:
        raise DataError(
            f"query builder: hidden states {hidden.shape} with valid {valid.shape} are not "
            f"[B, H, {config.width}] with [B, H]"
        )
    if (length := hidden.shape[1] + config.queries) > config.max_length:
        raise DataError(
            f"query builder: {hidden.shape[1]} hidden states and {config.queries} queries are {length} rows, the "
            f"position table has {config.max_length}; pass at most {config.max_length - config.queries} states "
            "(subsample the image's) or make a query builder with a larger max_length"
        )


def _rows(config: QueryBuilderConfig, params: Any, hidden: Array, valid: Array) -> tuple[Array, Array]:
    """[H ; Q] as [B, S, D], and each row's place [B, S]: valid states count from 0, queries go on behind them."""
    queries = jnp.broadcast_to(params["q_init"].astype(hidden.dtype), (hidden.shape[0], config.queries, config.width))
    seen = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    behind = valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(config.queries, dtype=jnp.int32)
    rows = jnp.concatenate([jnp.where(valid[..., None], hidden, 0), queries], axis=1)
    return rows, jnp.concatenate([jnp.maximum(seen - 1, 0), behind], axis=1)


def _mask(valid: Array, queries: int) -> Array:
    """[B, S, S] bool: hidden states see valid hidden states, queries see those and every query (equation 11)."""
    hidden = valid.shape[1]
    seen = jnp.pad(valid, ((0, 0), (0, queries)), constant_values=True)
    is_query = jnp.arange(hidden + queries) >= hidden
    return seen[:, None, :] & (is_query[:, None] | ~is_query[None, :])
