"""Persistent Visual Memory (arXiv 2605.00814): a bottleneck cross-attention to the images beside the FFN.

In a few decoder layers the residual stream after attention asks the visual embeddings of the prompt, and nothing
else: a softmax over the visual set alone, which no amount of text dilutes (Theorem 4.1). Docstrings count its
steps: 1 reduce text, 2 reduce vision, 3 norm, 4 queries, 5 keys, 6 values, 7 to 10 attention, 11 latent MLP,
12 expand, 13 norm, 14 gate, 15 silence at the images' own positions.

Axis letters: B rows, T tokens, M visual rows, D model width, R latent width, N query heads, K key heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.layers import FAN_IN, WEIGHT, Linear, RMSNorm, SwiGLU, rms_normalise, row_blocks
from jaxmem.backbones.ports import Port, Ports
from jaxmem.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PVMConfig:
    """One PVM (arXiv 2605.00814). `create` fills what follows from the backbone.

    Attributes:
      layers: 0-based decoder layers that get a branch.
      width: model width D.
      latent: width R of the bottleneck.
      heads, kv_heads, head_dim: N, K, H; N * H = R.
      mlp_width: width of the latent SwiGLU.
      norm_eps: of every RMSNorm.
      visibility: "causal": a token asks only visual rows that stand before it; "all": every row of its document,
        later ones too (the original's behaviour).
      silence: no injection at the images' own positions.
      query: "residual" asks with the stream after attention, "normed" with its RMS-normalised form (Algorithm 1).
      source: where keys and values come from: "visual", the merged visual rows (published), or "hidden", the residual
        stream at the images' positions in the branch's own layer, an ablation without later turns.
      output_norm: weightless RMSNorm in front of the gate, which makes |gate| the injection's RMS.
      dropout: probability of dropping an attention weight in training.
      gate: initial value of every gate.
      initialiser: "normal" N(0, 0.02^2) as published, or "fan_in" N(0, 1/in), for narrow backbones.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    latent: int = 512
    norm_eps: float = 1e-6
    visibility: Literal["causal", "all"] = "causal"
    silence: bool = True
    query: Literal["residual", "normed"] = "residual"
    source: Literal["visual", "hidden"] = "visual"
    output_norm: bool = True
    dropout: float = 0.0
    gate: float = 0.0
    initialiser: Literal["normal", "fan_in"] = "normal"
    name: str = "pvm"


def create(backbone: BackboneConfig, *, mlp_multiple: int = 1, **overrides: Any) -> PVMConfig:
    """The PVM that fits a backbone, by the published rules.

    Args:
      backbone: gives the width, the head size, the ratio of query to key heads and of FFN to model width.
      mlp_multiple: rounds the latent MLP's width up to a multiple (1 keeps the paper's truncation).
      **overrides: fields of PVMConfig; `layers` defaults to three evenly strided ones.

    Raises:
      ConfigError: an unknown field, layers outside the decoder, or a latent width that heads do not divide.
    """
    text = backbone.text
    fields = {field.name for field in dataclasses.fields(PVMConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"pvm has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    latent, head_dim = overrides.get("latent", 512), overrides.get("head_dim", text.head_dim)
    if latent % head_dim:
        raise ConfigError(f"pvm latent width {latent} is not divisible by the head size {head_dim}")
    heads = latent // head_dim
    mlp_width = int(latent * text.mlp_width / text.width)
    settings: dict[str, Any] = {
        "layers": _default_layers(backbone),
        "width": text.width,
        "heads": heads,
        "kv_heads": max(1, heads // (text.heads // text.kv_heads)),
        "head_dim": head_dim,
        "mlp_width": -(-mlp_width // mlp_multiple) * mlp_multiple,
        "norm_eps": text.norm_eps,
        **overrides,
    }
    settings["layers"] = tuple(settings["layers"])
    config = PVMConfig(**settings)
    _check(config, text.layers)
    return config


def _default_layers(backbone: BackboneConfig) -> tuple[int, ...]:
    """The published layers (at 36 layers they are the tower's DeepStack taps), else one stride apart."""
    depth = backbone.text.layers
    taps = getattr(backbone.vision, "taps", ())
    if depth == 36 and len(taps) == 3:
        return taps
    suggested = {28: (6, 12, 18), 64: (14, 28, 42)}
    return suggested.get(depth) or tuple(sorted({depth * part // 4 for part in (1, 2, 3)}))


def _check(config: PVMConfig, depth: int) -> None:
    faults = {
        f"layers {config.layers} must be different and within 0..{depth - 1}": (
            not config.layers
            or len(set(config.layers)) < len(config.layers)
            or not all(0 <= layer < depth for layer in config.layers)
        ),
        f"{config.heads} heads x {config.head_dim} differ from the latent width {config.latent}": (
            config.heads * config.head_dim != config.latent
        ),
        f"{config.heads} heads are not a multiple of {config.kv_heads} key heads": config.heads % config.kv_heads,
        f"visibility {config.visibility!r} is neither 'causal' nor 'all'": config.visibility not in ("causal", "all"),
        f"query {config.query!r} is neither 'residual' nor 'normed'": config.query not in ("residual", "normed"),
        f"source {config.source!r} is neither 'visual' nor 'hidden'": config.source not in ("visual", "hidden"),
        f"initialiser {config.initialiser!r} is neither 'normal' nor 'fan_in'": (
            config.initialiser not in ("normal", "fan_in")
        ),
        f"dropout {config.dropout} is outside [0, 1)": not 0 <= config.dropout < 1,
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("pvm: " + "; ".join(wrong))


class CrossAttention(nn.Module):
    """Queries from text, keys and values from the image, no position anywhere (steps 4 to 10)."""

    config: PVMConfig
    kernel_init: Any

    def setup(self) -> None:
        """q, o are R x R; k, v are R x (K * H); the norms are per head."""
        c = self.config
        linear = lambda features: Linear(features, kernel_init=self.kernel_init)  # noqa: E731
        self.q, self.o = linear(c.latent), linear(c.latent)
        self.k, self.v = linear(c.kv_heads * c.head_dim), linear(c.kv_heads * c.head_dim)
        self.q_norm, self.k_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)

    def remember(self, visual: Array) -> tuple[Array, Array]:
        """[B, M, R] -> keys and values [B, M, K, H]."""
        heads = (*visual.shape[:2], self.config.kv_heads, self.config.head_dim)
        return self.k_norm(self.k(visual).reshape(heads)), self.v(visual).reshape(heads)

    def weights(self, x: Array, keys: Array, seen: Array) -> Array:
        """Attention over the visual set, [B, K, N/K, T, M] float32; rows sum to 1 over what is seen, else 0."""
        c = self.config
        query = self.q_norm(self.q(x).reshape(*x.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_dim))
        scores = jnp.einsum("btkgh,bmkh->bkgtm", query, keys, preferred_element_type=jnp.float32)
        seen = seen[:, None, None]
        scores = jnp.where(seen, scores * c.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        return jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)

    def __call__(self, x: Array, keys: Array, values: Array, seen: Array, dropout: Array | None = None) -> Array:
        """[B, T, R] queries -> [B, T, R] what they found."""
        weights = self.weights(x, keys, seen)
        if dropout is not None:
            kept = jax.random.bernoulli(dropout, 1 - self.config.dropout, weights.shape)
            weights = jnp.where(kept, weights / (1 - self.config.dropout), 0.0)
        found = jnp.einsum("bkgtm,bmkh->btkgh", weights.astype(values.dtype), values)
        return self.o(found.reshape(*x.shape[:2], self.config.latent))


class PVM(nn.Module):
    """The branch of one layer: the 15 published tensors, kept in float32, computing in its input's dtype."""

    config: PVMConfig

    def setup(self) -> None:
        """Names follow the published checkpoints; bias-free throughout."""
        c = self.config
        kernel_init = FAN_IN if c.initialiser == "fan_in" else WEIGHT
        self.text_reducer = Linear(c.latent, kernel_init=kernel_init)
        self.vision_reducer = Linear(c.latent, kernel_init=kernel_init)
        self.output_expander = Linear(c.width, kernel_init=kernel_init)
        self.input_norm, self.post_attn_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
        self.cross_attn = CrossAttention(c, kernel_init)
        self.mlp = SwiGLU(c.mlp_width, kernel_init=kernel_init)
        self.gate_alpha = self.param("gate_alpha", nn.initializers.constant(c.gate), (), jnp.float32)

    def remember(self, visual: Array) -> tuple[Array, Array]:
        """Visual rows [B, M, D] -> keys and values [B, M, K, H] (steps 2, 5, 6): once per prompt."""
        folded = not self.is_initializing() and not self.has_variable("params", "vision_reducer")
        return self.cross_attn.remember(visual if folded else self.vision_reducer(visual))

    def query(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, R], what the text asks with (steps 1 and 3)."""
        return self.input_norm(self.text_reducer(x))

    def __call__(self, x: Array, keys: Array, values: Array, seen: Array, dropout: Array | None = None) -> Array:
        """The injection (steps 7 to 14).

        Args:
          x: [B, T, D] residual stream after attention.
          keys, values: [B, M, K, H] from `remember`.
          seen: [B, T, M] bool, which visual rows a token may ask.
          dropout: key for dropping attention weights; None drops none.

        Returns:
          [B, T, D]; exactly zero where a token sees no visual row.
        """
        found = self.cross_attn(self.query(x), keys, values, seen, dropout)
        found = found + self.mlp(self.post_attn_norm(found))
        out = self.output_expander(found).astype(jnp.float32)
        if self.config.output_norm:
            out = rms_normalise(out, self.config.norm_eps)
        return jnp.where(seen.any(-1, keepdims=True), self.gate_alpha * out, 0.0).astype(x.dtype)


@flax.struct.dataclass
class PVMState:
    """What PVM remembers of a prompt: 2 * K * H numbers per visual row and layer, never recomputed per token.

    Attributes:
      keys, values: [slots, B, M, K, H]; None before a prompt has been read with the source "hidden".
      order: [B, M] int32 place of the visual row in its sequence.
      segments: [B, M] int32 document of the visual row; 0 where a row is padding.
    """

    keys: Array | None
    values: Array | None
    order: Array
    segments: Array


def init(key: Array, config: PVMConfig, base: Any = None) -> Any:
    """Fresh parameters, stacked over the layers: maps N(0, 0.02^2) (or fan-in), norms 1, gates as configured.

    They do not depend on the backbone's weights, `base`.

    With the output map at zero as well the branch would be dead: every gradient carries the gate (arXiv 2605.00814).
    """
    x, visual, seen = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1, config.width)), jnp.ones((1, 1, 1), bool)

    def both(module: PVM) -> Array:
        return module(x, *module.remember(visual), seen)

    one = lambda k: PVM(config).init(k, method=both)["params"]  # noqa: E731
    return jax.vmap(one)(jax.random.split(key, len(config.layers)))


def prepare(config: PVMConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> PVMState | None:
    """Remembers the images of a prompt.

    Args:
      config: static.
      params: from `init`, leading axis slots.
      visual: [B, M, D] merged rows, in front of DeepStack and positions; None for a batch without images.
      rows: [B, T] visual row of each token, or -1.
      stream: places and documents of the tokens.

    Returns:
      PVMState, or None without images: then the branch does not exist.
    """
    if visual is None:
        return None
    batch, index = jnp.arange(rows.shape[0])[:, None], jnp.where(rows >= 0, rows, visual.shape[1])
    place = lambda what: jnp.zeros(visual.shape[:2], jnp.int32).at[batch, index].max(what, mode="drop")  # noqa: E731
    segments = place(stream.segments)
    if config.source == "hidden":
        return PVMState(None, None, place(stream.order), segments)
    visual = jnp.where((segments > 0)[..., None], visual, 0)
    remember = lambda slot: PVM(config).apply({"params": slot}, visual, method=PVM.remember)  # noqa: E731
    keys, values = jax.vmap(remember)(params)
    return PVMState(keys, values, place(stream.order), segments)


def append(old: PVMState | None, new: PVMState | None) -> PVMState | None:
    """The memory after another turn: rows are added, none is replaced."""
    if old is None or new is None:
        return old or new
    if new.keys is None:
        raise ConfigError("pvm: with source 'hidden' a later turn cannot bring images of its own")
    join = lambda axis: lambda a, b: jnp.concatenate([a, b], axis)  # noqa: E731
    return PVMState(
        join(2)(old.keys, new.keys),
        join(2)(old.values, new.values),
        join(1)(old.order, new.order),
        join(1)(old.segments, new.segments),
    )


def take(state: PVMState | None, rows: Array) -> PVMState | None:
    """The memory of some rows [W] of the batch."""
    if state is None:
        return None
    keys, values = jax.tree.map(lambda leaf: leaf[:, rows], (state.keys, state.values))
    return PVMState(keys, values, state.order[rows], state.segments[rows])


def keep(state: PVMState, kept: tuple[Array, Array]) -> PVMState:
    """The memory with the keys and values [slots, B, M, K, H] that its branches made of a prompt's hidden states."""
    return dataclasses.replace(state, keys=kept[0], values=kept[1])


def visible(config: PVMConfig, state: PVMState, stream: Stream) -> Array:
    """[B, T, M] bool: which visual rows each token may ask."""
    seen = stream.segments[:, :, None] == state.segments[:, None, :]
    seen &= (state.segments > 0)[:, None, :]
    if config.visibility == "causal":
        seen &= state.order[:, None, :] < stream.order[:, :, None]
    return seen & ~stream.is_visual[:, :, None] if config.silence else seen


def ports(
    config: PVMConfig, params: Any, state: PVMState | None, stream: Stream, dropout: Array | None = None
) -> Ports:
    """PVM as a branch beside the FFN of its layers, for the tokens of `stream`."""
    if state is None:
        return Ports()
    keys = None if dropout is None or not config.dropout else jax.random.split(dropout, len(config.layers))

    def hidden(slot: Any, residual: Array) -> tuple[Array, Array]:
        rows = jnp.take_along_axis(residual, state.order[..., None], axis=1)
        rows = jnp.where((state.segments > 0)[..., None], rows, 0)
        return PVM(config).apply({"params": slot[0]}, rows, method=PVM.remember)

    def act(slot: Any, residual: Array, normed: Array | None) -> Array:
        params, remembered, values, key = slot
        if state.keys is None:
            remembered, values = hidden(slot, residual)
        x = residual if config.query == "residual" else normed

        def some(piece: Any) -> Array:
            seen = visible(config, state, stream.some(piece[1]))
            return PVM(config).apply({"params": params}, piece[0], remembered, values, seen, key)

        # One random mask covers all tokens, so dropped weights need them all at once.
        return row_blocks(some, (x, stream.tokens)) if key is None else some((x, stream.tokens))

    slots = (params, state.keys, state.values, keys)
    return Ports(beside_ffn=(Port(slots, act, config.layers, hidden if state.keys is None else None, config.name),))


def fold(params: Any) -> Any:
    """Parameters for inference with the visual projection folded into the key and value maps (arXiv 2605.00814).

    Halves the cost of `prepare`; exact up to rounding. The product is computed in float32.
    """
    attention, reducer = params["cross_attn"], params["vision_reducer"]["kernel"]
    product = lambda name: jnp.matmul(reducer, attention[name]["kernel"], precision="highest")  # noqa: E731
    folded = {name: {"kernel": product(name)} for name in ("k", "v")}
    return {**{k: v for k, v in params.items() if k != "vision_reducer"}, "cross_attn": {**attention, **folded}}
