"""What the Qwen-VL family shares: weights, embedding and positions by configuration, and reading of `config.json`.

A backbone is these functions over one parameter tree `base`:
embed [V, D], layers (stacked), norm, head [V, D] (absent when tied), visual (`vision.init`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.backbones import vision
from jaxmem.backbones.batch import Array, Batch, rows_at, visual_at
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig, require
from jaxmem.backbones.decoder import DecoderLayer
from jaxmem.backbones.layers import attend
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.rope import angles, interleaved_axes, sectioned_axes
from jaxmem.backbones.vision import Cells, Visual
from jaxmem.errors import ConfigError

_TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token")


def token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that join the towers, by their names in `BackboneConfig`. Raises ConfigError where one is missing."""
    return {key: require(hf, f"{key}_id", "config.json") for key in _TOKENS}


def rope_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder's section says of its rotary embedding, in the old and the new spelling."""
    return {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}


def text_config(
    text: Mapping[str, Any], where: str, tied: bool, section: tuple[int, int, int], max_positions: int, **family: Any
) -> TextConfig:
    """The decoder that a section of `config.json` describes.

    Args:
      text: the section.
      where: its name in errors.
      tied: one table for embedding and head.
      section: the family's `mrope_section`, for files that do not state it.
      max_positions: likewise.
      **family: fields of TextConfig that no file states.
    """
    need = lambda key: require(text, key, where)  # noqa: E731
    rope: dict[str, Any] = {"mrope_section": section, **rope_settings(text)}
    width, heads = need("hidden_size"), need("num_attention_heads")
    return TextConfig(
        layers=need("num_hidden_layers"),
        width=width,
        mlp_width=need("intermediate_size"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or width // heads,
        vocab=need("vocab_size"),
        norm_eps=need("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta") or need("rope_theta")),
        rope_section=tuple(rope["mrope_section"]),
        max_positions=text.get("max_position_embeddings", max_positions),
        tied=tied,
        **family,
    )


def vision_shape(seen: Mapping[str, Any], need: Any, patch_size: int) -> dict[str, Any]:
    """The fields of VisionConfig that all members spell alike; `need` reads what must be stated."""
    return {
        "depth": need("depth"),
        "heads": need("num_heads"),
        "patch_size": seen.get("patch_size", patch_size),
        "temporal_patch_size": seen.get("temporal_patch_size", 2),
        "merge_size": seen.get("spatial_merge_size", 2),
        "channels": seen.get("in_channels", seen.get("in_chans", 3)),
        "rope_theta": float((seen.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
    }


def refuse(faults: Mapping[str, Any]) -> None:
    """Raises one ConfigError with every message whose fault is true."""
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("config.json: " + "; ".join(wrong))


def common_faults(t: TextConfig, v: VisionConfig, text: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """What no member computes, by message: for `refuse`."""
    act = {"gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "silu"}[v.mlp]
    return {
        "text hidden_act: only 'silu' is implemented": text.get("hidden_act", "silu") != "silu",
        f"vision_config.hidden_act: only {act!r} is implemented": seen.get("hidden_act", act) != act,
        f"mrope_section {t.rope_section} must sum to head_dim / 2 = {t.head_dim // 2}": (
            len(t.rope_section) != 3 or sum(t.rope_section) != t.head_dim // 2
        ),
        f"{t.heads} heads are not a multiple of {t.kv_heads} key heads": t.heads % t.kv_heads,
        f"vision width {v.width} is not a multiple of 4 x {v.heads} heads": v.width % (4 * v.heads),
    }


def init(key: Array, config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """Random weights in the layout of `base`: linear maps and tables N(0, 0.02^2), biases 0, norms 1."""
    *keys, vision_key = jax.random.split(key, 4)
    base = init_decoder(keys, config.text) | {"visual": vision.init(vision_key, config.vision)}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base)


def init_decoder(keys: Any, t: TextConfig) -> dict[str, Any]:
    """The float32 weights of `init` without a vision tower; `keys` are three."""
    embed_key, head_key, layer_key = keys
    x, angle, mask = jnp.zeros((1, 1, t.width)), jnp.zeros((1, 1, t.head_dim // 2)), jnp.ones((1, 1, 1), bool)
    arguments = (x, angle, lambda q, k, v: (attend(q, k, v, mask), None), lambda ffn, residual, normed: (ffn, {}))
    layer = lambda k: DecoderLayer(t).init(k, *arguments)["params"]  # noqa: E731
    base = {
        "embed": 0.02 * jax.random.normal(embed_key, (t.vocab, t.width)),
        "layers": jax.vmap(layer)(jax.random.split(layer_key, t.layers)),
        "norm": {"scale": jnp.ones(t.width)},
    }
    if not t.tied:
        base["head"] = 0.02 * jax.random.normal(head_key, (t.vocab, t.width))
    return base


def shapes(config: BackboneConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of `base` as ShapeDtypeStructs: nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, dtype))


def see(
    config: BackboneConfig, base: Any, batch: Batch, *, remat: bool = False, levels: tuple[int, ...] = ()
) -> Visual | None:
    """The images of every row through the vision tower (`vision.see`); None for a batch whose patch axis is empty."""
    if not batch.patches.shape[1]:
        return None
    return vision.see(config.vision, base["visual"], batch, remat=remat, levels=levels)


def cells(config: BackboneConfig) -> Cells:
    """Each visual row stands for merge^2 neighbours on the patch axis."""
    return Cells(side=0, ratio=config.vision.merge_size)


def embed(base: Any, batch: Batch, visual: Visual | None) -> Array:
    """[B, T, D]: token embeddings, with visual rows in the place of the placeholders."""
    x = base["embed"][jnp.asarray(batch.tokens)]
    return x if visual is None else jnp.where(batch.is_visual[..., None], visual_at(visual.rows, batch), x)


def own_ports(visual: Visual | None, batch: Batch) -> Ports:
    """DeepStack: feature i is added to the visual positions after decoder layer i. None without taps."""
    if visual is None or not visual.deepstack.shape[0]:
        return Ports()

    def add(features: Array, residual: Array, normed: Array | None) -> Array:
        return residual + jnp.where(batch.is_visual[..., None], rows_at(features, batch.visual_rows), 0)

    return Ports(after_layer=(Port(visual.deepstack, add, tuple(range(visual.deepstack.shape[0]))),))


def rotary_angles(config: BackboneConfig, positions: Array) -> Array:
    """[B, 3, T] positions -> [B, T, head_dim/2] radians of M-RoPE."""
    t = config.text
    axes = interleaved_axes(t.rope_section) if t.rope_interleaved else sectioned_axes(t.rope_section)
    return angles(positions, axes, t.rope_theta)
