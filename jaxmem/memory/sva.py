"""The spatial vision aggregator inside the decoder (Cambrian-1, arXiv 2406.16860, section 3.2), as a baseline.

Behind some decoder layers every vision token, joined with a mean of its tile's features, asks the features of its own
region: each level of the tower has keys and values of its own, and all of them share one softmax. What it finds goes
through a norm and an MLP to the residual stream. As published nothing is gated, so a fresh one changes the backbone.

Parameters: norm (of the levels: Cambrian's features leave their own maps normalised too) and blocks, with a leading
axis of layers: the sampler's, and its gate where there is one.
Axis letters: B rows, M visual rows, G tiles (frames) of a row, P patches, K patches of a region, C tower width,
N heads, H head width, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem import config as configs
from jaxmem.backbones import encoder, registry
from jaxmem.backbones.batch import Array, Batch, rows_at
from jaxmem.backbones.config import BackboneConfig, VisionConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.layers import Linear
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.vision import Cells, Visual
from jaxmem.errors import ConfigError
from jaxmem.memory import vision_rows
from jaxmem.memory.resampling import MASKED

SAMPLERS = 10
LEVELS = {24: (13, 18, 23), 26: (15, 20, 26), 27: (15, 20, 26)}
"""Hidden states by depth of the tower: those of Vision Remember, so that both see the same."""


@dataclasses.dataclass(frozen=True)
class SVAConfig:
    """One aggregator. `create` fills what follows from the backbone.

    Attributes:
      width, tower_width: D and C.
      layers: 0-based decoder layers behind which it samples.
      levels: hidden states of the tower, as transformers counts them.
      cells: which patches a visual row stands for.
      tile_patches: patches of a tile; 0 where patches lie in frames of any size (the Qwen-VL family).
      inner, heads: of the sampler; inner = N * H.
      gate: None adds what is sampled as it is, as published; a number is the first value of a gate whose tanh
        multiplies it, and 0 leaves the backbone as it is.
      norm_eps: of the LayerNorms.
    """

    width: int
    tower_width: int
    layers: tuple[int, ...]
    levels: tuple[int, ...]
    cells: Cells
    tile_patches: int = 0
    inner: int = 1024
    heads: int = 16
    gate: float | None = None
    norm_eps: float = 1e-5
    name: str = "sva"

    @property
    def keys(self) -> int:
        """K."""
        return self.cells.ratio**2


def create(backbone: BackboneConfig, **overrides: Any) -> SVAConfig:
    """The aggregator that fits a backbone.

    Args:
      backbone: gives sizes, and the region that a visual row stands for. By default there are ten samplers from layer 0
        on, 3 layers apart where there are 32, else in proportion; levels are Vision Remember's.
      **overrides: fields of SVAConfig.

    Raises:
      ConfigError: an unknown field, or values that do not fit the backbone; the message says what would.
    """
    fields = {field.name for field in dataclasses.fields(SVAConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"sva has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields - {'cells'}))}")
    vision, depth = backbone.vision, backbone.text.layers
    if vision is None:
        raise ConfigError(f"sva needs a vision tower, and {backbone.model_type} is a decoder alone")
    family = isinstance(vision, VisionConfig)
    tower = vision if family else vision.tower
    try:
        region = registry.backbone(backbone.model_type).cells(backbone)
    except ConfigError as error:
        raise ConfigError(f"sva: {error}") from error
    settings: dict[str, Any] = {
        "layers": tuple(range(0, depth, max(1, round(3 * depth / 32))))[:SAMPLERS],
        "levels": LEVELS.get(tower.depth) or tuple(sorted({max(1, round(tower.depth * at / 24)) for at in LEVELS[24]})),
        **overrides,
        "cells": region,
        "tile_patches": 0 if family else vision.tile_patches,
        "width": backbone.text.width,
        "tower_width": tower.width,
    }
    config = configs.build(SVAConfig, settings, "sva")
    _check(config, backbone, tower.depth)
    return config


def _check(config: SVAConfig, backbone: BackboneConfig, depth: int) -> None:
    """Raises ConfigError for settings that do not fit the backbone."""
    c, layers = config, backbone.text.layers
    if c.levels:
        encoder.resolve(c.levels, depth)
    aspect = getattr(backbone.vision, "aspect", "anyres")
    faults = {
        f"layers {c.layers} must be different and within 0..{layers - 1}": (
            not c.layers or len(set(c.layers)) < len(c.layers) or not all(0 <= at < layers for at in c.layers)
        ),
        f"levels {c.levels} must name different hidden states of the tower, at least one": (
            not c.levels or len(set(c.levels)) < len(c.levels)
        ),
        f"inner {c.inner} is not a multiple of {c.heads} heads": c.heads < 1 or c.inner % max(1, c.heads),
        f"vision_aspect_ratio {aspect!r} scales grids of tokens, whose regions are then no whole windows; set it to"
        " 'anyres' in config.json": aspect.startswith("anyres_max"),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("sva: " + "; ".join(wrong))


class Sampler(nn.Module):
    """One layer's sampler (Cambrian-1, section 3.2), without biases; it returns what is added to the tokens."""

    config: SVAConfig

    @nn.compact
    def __call__(self, x: Array, context: Array, own: Array, regions: tuple[Array, ...], mask: Array) -> Array:
        """What is added to the tokens.

        Args:
          x: [B, M, D].
          context: [B, G, C] mean features.
          own: [B, M] int32, which of them is each token's.
          regions: for every level [B, M, K, C].
          mask: [B, M, K] bool, patches that exist; a region without any is seen whole.

        Returns:
          [B, M, D] in the dtype of x.
        """
        c = self.config
        mean = rows_at(Linear(c.inner, name="context")(context.astype(x.dtype)), own)
        query = Linear(c.inner, name="in")(jnp.concatenate([x, mean], axis=-1))
        query = query + Linear(c.inner, name="o")(self._ask(query, regions, mask))
        hidden = Linear(c.inner, name="fc1")(self._normed("norm", query))
        return Linear(c.width, name="fc2")(jax.nn.gelu(hidden, approximate=False))

    def _normed(self, name: str, x: Array, dtype: Any = None) -> Array:
        """LayerNorm in float32."""
        norm = nn.LayerNorm(self.config.norm_eps, use_fast_variance=False, name=name)
        return norm(x).astype(dtype or x.dtype)

    def _ask(self, x: Array, regions: tuple[Array, ...], mask: Array) -> Array:
        """[B, M, N * H] what the queries [B, M, N * H] find in their regions."""
        c = self.config
        heads = lambda y: y.reshape(*y.shape[:-1], c.heads, c.inner // c.heads)  # noqa: E731
        query = heads(Linear(c.inner, name="q")(self._normed("norm_q", x)))
        keys, values = [], []
        for level, region in enumerate(regions):
            place = self.param(f"position_{level}", nn.initializers.normal(1.0), (c.keys, c.tower_width))
            seen = region.astype(x.dtype) + place.astype(x.dtype)
            for name, found in (("k", keys), ("v", values)):
                normed = self._normed(f"norm_{name}_{level}", seen)
                found.append(heads(Linear(c.inner, name=f"{name}_{level}")(normed)))
        key, value = (jnp.concatenate(found, axis=2) for found in (keys, values))
        mask = jnp.tile(mask | ~mask.any(axis=-1, keepdims=True), (1, 1, len(regions)))
        scores = jnp.einsum("bmnh,bmknh->bmnk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, :, None], scores * query.shape[-1] ** -0.5, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bmnk,bmknh->bmnh", weights, value).reshape(x.shape)


def init(key: Array, config: SVAConfig, base: Any = None) -> Any:
    """Fresh float32 parameters: maps N(0, 0.02^2), places N(0, 1) as published, norms 1, the gate as configured."""
    c = config
    flat, ones = jnp.zeros((1, 1, c.tower_width)), jnp.ones((1, 1, c.keys), bool)
    region = jnp.zeros((1, 1, c.keys, c.tower_width))
    shapes = (jnp.zeros((1, 1, c.width)), flat, jnp.zeros((1, 1), jnp.int32), (region,) * len(c.levels), ones)
    one = lambda k: Sampler(c).init(k, *shapes)["params"]  # noqa: E731
    blocks = dict(jax.vmap(one)(jax.random.split(key, len(c.layers))))
    if c.gate is not None:
        blocks["gate"] = jnp.full(len(c.layers), c.gate)
    norms = (len(c.levels), c.tower_width)
    return {"norm": {"scale": jnp.ones(norms), "bias": jnp.zeros(norms)}, "blocks": blocks}


def prompt_ports(config: SVAConfig, params: Any, base: Any, visual: Visual | None, batch: Batch) -> Ports:
    """The port behind the chosen layers, for the tokens of prompts alone.

    Args:
      config: static.
      params: from `init`.
      base: the backbone's weights, which it does not need.
      visual: what the tower gave, with `config.levels`; None for a batch without images.
      batch: the prompts.
    """
    if visual is None:
        return Ports()
    tokens = vision_rows.places(batch, visual.rows.shape[1], config.cells)
    levels = normed(config, params["norm"], visual)
    context, own = means(config, levels, batch, tokens.shape[1])
    packed = tuple(vision_rows.regions(config.cells, level)[0] for level in levels)
    mask = vision_rows.regions(config.cells, (jnp.asarray(batch.patch_segments) > 0)[..., None])[0][..., 0]

    def act(slot: Any, x: Array, _: Array | None) -> Array:
        z = vision_rows.taken(x, tokens)
        sampler = {name: leaf for name, leaf in slot.items() if name != "gate"}
        found: Any = Sampler(config).apply({"params": sampler}, z, context, own, packed, mask)
        if config.gate is not None:
            found = jnp.tanh(slot["gate"]).astype(x.dtype) * found
        return vision_rows.put(x, tokens, z + found)

    return Ports(after_layer=(Port(params["blocks"], act, config.layers),))


def normed(config: SVAConfig, params: Any, visual: Visual) -> list[Array]:
    """[B, P, C] of every level, each behind a LayerNorm of its own; statistics in float32."""
    found = []
    for at, level in enumerate(config.levels):
        x, own = visual.levels[level], {"scale": params["scale"][at], "bias": params["bias"][at]}
        wide: Any = nn.LayerNorm(config.norm_eps, use_fast_variance=False).apply({"params": own}, x)
        found.append(wide.astype(x.dtype))
    return found


def means(config: SVAConfig, levels: list[Array], batch: Batch, count: int) -> tuple[Array, Array]:
    """The mean feature [B, G, C] of every tile (frame), over its patches and the levels, and which is each row's.

    Patches that show nothing of the picture do not count. `count` is M; G follows from the shapes, and is the most
    frames that there may be where they have no size of their own.
    """
    segments = jnp.asarray(batch.patch_segments)
    size = config.tile_patches or config.keys
    tiles = segments.shape[1] // size
    inside = (segments[:, None] == 1 + jnp.arange(tiles)[None, :, None]).astype(jnp.float32)  # [B, G, P]
    mean = sum(level.astype(jnp.float32) for level in levels) / len(levels)
    shares = inside / jnp.maximum(1, inside.sum(-1, keepdims=True))
    mean = jnp.einsum("bgp,bpc->bgc", shares, mean, precision=jax.lax.Precision.HIGHEST)
    own = jnp.maximum(segments.reshape(len(segments), tiles, size).max(axis=-1) - 1, 0)
    return mean, jnp.repeat(own, count // tiles, axis=1)


def prepare(config: SVAConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing: what was sampled lies in the keys and values of a prompt."""


def append(old: None, new: None) -> None:
    """Nothing (`prepare`)."""


def take(state: None, rows: Array) -> None:
    """Nothing (`prepare`)."""


def ports(config: SVAConfig, params: Any, state: None, stream: Stream, dropout: Array | None = None) -> Ports:
    """None: generated tokens sample nothing (`prompt_ports`)."""
    return Ports()
