"""Decoders without a vision tower: Qwen2 and Qwen2.5, Qwen3, and Llama and Mistral, which compute alike.

They are the targets of CoMEM's transfer, and the language models of LLaVA-style backbones. Their positions are one
number per token: the three axes of a batch's positions are equal, so that M-RoPE with one section is their rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import qwen
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, require
from jaxmem.backbones.ports import Ports
from jaxmem.backbones.qwen import embed, rotary_angles
from jaxmem.backbones.vision import Cells, Visual
from jaxmem.errors import ConfigError

__all__ = [
    "FAMILIES",
    "cells",
    "config_from_hf",
    "embed",
    "init",
    "own_ports",
    "rotary_angles",
    "see",
    "shapes",
    "text_config",
]

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"qkv_bias": True, "qk_norm": False, "max_positions": 32_768, "norm_eps": 1e-6},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "max_positions": 32_768, "norm_eps": 1e-6},
    "llama": {"qkv_bias": False, "qk_norm": False, "max_positions": 2_048, "norm_eps": 1e-6},
    "mistral": {"qkv_bias": False, "qk_norm": False, "max_positions": 32_768, "norm_eps": 1e-6},
}
"""By `model_type`: how queries and keys are made, and what a config.json leaves out."""


def config_from_hf(hf: Mapping[str, Any]) -> BackboneConfig:
    """Reads the `config.json` of a decoder alone.

    Raises:
      ConfigError: a required key is missing, or a setting that is not computed.
    """
    text = text_config(hf, "config.json", bool(hf.get("tie_word_embeddings", False)))
    return BackboneConfig(str(hf["model_type"]), text)


def text_config(text: Mapping[str, Any], where: str, tied: bool) -> TextConfig:
    """The decoder that a section of `config.json` describes.

    Args:
      text: the section, with its `model_type`.
      where: its name in errors.
      tied: one table for embedding and head.

    Raises:
      ConfigError: another family, a required key is missing, or a setting that is not computed.
    """
    kind = text.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{where}: decoders of model_type {kind!r} are not supported; supported: {', '.join(FAMILIES)}"
        )
    family, rope = FAMILIES[kind], qwen.rope_settings(text)
    heads = require(text, "num_attention_heads", where)
    half = (text.get("head_dim") or require(text, "hidden_size", where) // heads) // 2
    config = qwen.text_config(
        {"rms_norm_eps": family["norm_eps"], "rope_theta": 10_000.0, **text},
        where,
        tied,
        (half, 0, 0),
        family["max_positions"],
        rope_interleaved=False,
        qk_norm=family["qk_norm"],
        qkv_bias=family["qkv_bias"],
    )
    _check(config, text, where, rope.get("rope_type", rope.get("type", "default")))
    return config


def _check(config: TextConfig, text: Mapping[str, Any], where: str, rope: str) -> None:
    """Refuses what would be computed wrongly, by key."""
    kind, window = text["model_type"], text.get("sliding_window")
    windowed = text.get("use_sliding_window", kind == "mistral") and window is not None
    layers = set(text.get("layer_types") or ()) - {"full_attention"}
    faults = {
        f"{where} hidden_act: only 'silu' is implemented": text.get("hidden_act", "silu") != "silu",
        f"{where} rope_type {rope!r}: only 'default' is implemented": rope != "default",
        f"{where} sliding_window {window}: only full attention is implemented": windowed or layers,
        f"{where} attention_bias: not implemented for {kind}": kind != "qwen2" and text.get("attention_bias", False),
        f"{where} mlp_bias: not implemented": text.get("mlp_bias", False),
        f"{config.heads} heads are not a multiple of {config.kv_heads} key heads": config.heads % config.kv_heads,
    }
    qwen.refuse(faults)


def init(key: Array, config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """Random weights in the layout of `base`: linear maps and tables N(0, 0.02^2), biases 0, norms 1."""
    base = qwen.init_decoder(jax.random.split(key, 3), config.text)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base)


def shapes(config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of `base` as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, dtype))


def see(
    config: BackboneConfig, base: Any, batch: Batch, *, remat: bool = False, levels: tuple[int, ...] = ()
) -> Visual | None:
    """There is nothing to see with: None. Raises ConfigError for a batch with patches."""
    if batch.patches.shape[1]:
        raise ConfigError(f"the batch has images, and {config.model_type} is a decoder without a vision tower")
    return None


def cells(config: BackboneConfig) -> Cells:
    """Raises ConfigError: no visual row stands for anything."""
    raise ConfigError(f"{config.model_type} is a decoder without a vision tower; use a backbone that sees")


def own_ports(visual: Visual | None, batch: Batch) -> Ports:
    """None."""
    return Ports()
