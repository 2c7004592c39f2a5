"""DeepStack (arXiv 2406.04334) on a LLaVA-style backbone, as a baseline: what projected tokens leave out is added.

A token stands for r x r patches of the tower. They are r^2 strided samples of the tower's map, each of which the
backbone's own projector maps patch by patch; sample k, the patch (k // r, k % r) of every token's cell, is added to the
visual tokens in front of decoder layer start + k * interval. Newlines and text stay as they are. There are no
parameters, and generated tokens cost nothing.

Axis letters: B rows, T tokens, M visual rows, L tiles of a row, N' tokens of a tile, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem import config as configs
from jaxmem.backbones import cells as windows
from jaxmem.backbones import projectors, registry
from jaxmem.backbones.batch import Array, Batch, visual_at
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.vision import Cells, Visual
from jaxmem.errors import ConfigError

MAPPED = ("mlp", "avgpool", "ldpv2")
"""Projectors that have a two-layer MLP of patches."""


@dataclasses.dataclass(frozen=True)
class DeepStackConfig:
    """What is added where. `create` fills what follows from the backbone.

    Attributes:
      levels: hidden states of the tower that the projector reads, joined on the channels.
      cells: which patches a visual row stands for.
      mlp: the projector's two-layer MLP, as a projector of its own.
      start: the decoder layer, counted from 0, in front of which the first sample is added; at least 1, since what
        enters layer 0 are the tokens themselves.
      interval: layers between two samples.
      together: samples that are added in front of the same layer; 0 in `create`: as many as a short decoder makes
        necessary.
    """

    levels: tuple[int, ...]
    cells: Cells
    mlp: ProjectorConfig
    start: int = 1
    interval: int = 1
    together: int = 1
    name: str = "deepstack"

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based decoder layers behind which samples are added, in the order of the samples."""
        count = -(-(self.cells.ratio**2) // self.together)
        return tuple(self.start - 1 + place * self.interval for place in range(count))


def create(backbone: BackboneConfig, **overrides: Any) -> DeepStackConfig:
    """The DeepStack that fits a backbone.

    Args:
      backbone: LLaVA-style, with a projector that has a two-layer MLP of patches and cells of them.
      **overrides: start, interval and together.

    Raises:
      ConfigError: an unknown setting, a backbone without such a projector, or layers that it does not have.
    """
    fields = {field.name for field in dataclasses.fields(DeepStackConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"deepstack has no setting {', '.join(unknown)}; it has interval, start, together")
    projector = getattr(backbone.vision, "projector", None)
    if projector is None or projector.name not in MAPPED:
        found = backbone.model_type if projector is None else f"the projector {projector.name!r}"
        raise ConfigError(
            f"deepstack adds patches that the projector's two-layer MLP maps one by one, and {found} has no such MLP;"
            f" use a LLaVA-style backbone with one of the projectors {', '.join(MAPPED)}"
        )
    try:
        region = registry.backbone(backbone.model_type).cells(backbone)
    except ConfigError as error:
        raise ConfigError(f"deepstack: {error}") from error
    plain = {"name": "mlp", "levels": (), "queries": 0, "ratio": 1}
    settings: dict[str, Any] = {
        **overrides,
        "levels": tuple(backbone.vision.feature_layers),
        "cells": region,
        "mlp": dataclasses.replace(projector, **plain),
    }
    if settings.get("together") == 0:
        start, step = settings.get("start", 1), settings.get("interval", 1)
        room = max(1, (backbone.text.layers - 1 - start) // max(1, step) + 1)
        settings["together"] = -(-(region.ratio**2) // room)
    config = configs.build(DeepStackConfig, settings, "deepstack")
    _check(config, backbone.text.layers)
    return config


def _check(config: DeepStackConfig, depth: int) -> None:
    """Raises ConfigError for layers that are not there."""
    count = len(config.layers) if config.together > 0 else 0
    last = config.start + (count - 1) * config.interval
    faults = {
        f"start {config.start} must be at least 1: what enters layer 0 are the visual tokens themselves": (
            config.start < 1
        ),
        f"interval {config.interval} must be at least 1": config.interval < 1,
        f"together {config.together} must be at least 0": config.together < 1,
        f"{config.cells.ratio**2} samples need the layers {config.start} to {last} in steps of {config.interval}, and"
        f" the decoder has {depth}, 0 to {depth - 1}; lower start or interval, raise together, or use a projector with"
        " a smaller ratio": last >= depth,
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("deepstack: " + "; ".join(wrong))


def init(key: Array, config: DeepStackConfig, base: Any = None) -> dict[str, Any]:
    """No parameters."""
    return {}


def prompt_ports(config: DeepStackConfig, params: Any, base: Any, visual: Visual | None, batch: Batch) -> Ports:
    """The port that adds the samples, for the tokens of prompts alone.

    Args:
      config: static.
      params: none.
      base: the backbone's weights, whose projector maps the samples.
      visual: what the tower gave, with `config.levels`; None for a batch without images.
      batch: the prompts.
    """
    if visual is None:
        return Ports()
    found, groups = samples(config, base, visual), len(config.layers)
    found = jnp.pad(found, ((0, groups * config.together - len(found)), (0, 0), (0, 0), (0, 0)))
    found = found.reshape(groups, config.together, *found.shape[1:]).sum(axis=1)
    shown = (jnp.asarray(batch.visual_rows) >= config.cells.first)[..., None]

    def add(sample: Array, x: Array, normed: Array | None) -> Array:
        return x + jnp.where(shown, visual_at(sample, batch), 0).astype(x.dtype)

    return Ports(after_layer=(Port(found, add, config.layers),))


def samples(config: DeepStackConfig, base: Any, visual: Visual) -> Array:
    """[r^2, B, M, D] what is added to each visual row: zeros for newlines, and where a cell has no such patch."""
    features = jnp.concatenate([visual.levels[level] for level in config.levels], axis=-1)
    rows, side = len(features), config.cells.side
    tiles = features.reshape(-1, side**2, features.shape[-1])
    mapped = projectors.project(config.mlp, {"mlp": base["projector"]["mlp"]}, tiles)
    packed, _ = windows.pack(mapped, side, config.cells.ratio)  # [B L, N', r^2, D]
    each = jnp.moveaxis(packed, 2, 0).reshape(config.cells.ratio**2, rows, -1, packed.shape[-1])
    return jnp.pad(each, ((0, 0), (0, 0), (config.cells.first, 0), (0, 0)))


def prepare(config: DeepStackConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing: what was added lies in the keys and values of a prompt."""


def append(old: None, new: None) -> None:
    """Nothing (`prepare`)."""


def take(state: None, rows: Array) -> None:
    """Nothing (`prepare`)."""


def ports(config: DeepStackConfig, params: Any, state: None, stream: Stream, dropout: jax.Array | None = None) -> Ports:
    """None: generated tokens get nothing (`prompt_ports`)."""
    return Ports()
