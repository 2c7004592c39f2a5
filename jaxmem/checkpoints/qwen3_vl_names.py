"""Qwen3-VL (dense): the mapping table between the official tensor names and our tree."""

from __future__ import annotations

from jaxmem.backbones.config import BackboneConfig, VisionConfig
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose

MODEL_TYPE = "qwen3_vl"

# ours below one layer, theirs below one layer
_ATTENTION = [(f"attention/{x}/kernel", f"self_attn.{x}_proj") for x in "qkvo"]
_FFN = [(f"ffn/{x}/kernel", f"mlp.{x}_proj") for x in ("gate", "up", "down")]
_NORMS = [
    ("attention_norm/scale", "input_layernorm"),
    ("ffn_norm/scale", "post_attention_layernorm"),
    ("attention/q_norm/scale", "self_attn.q_norm"),
    ("attention/k_norm/scale", "self_attn.k_norm"),
]


def table(config: BackboneConfig) -> Table:
    """The rules of a dense Qwen3-VL; a tied one has no `head`."""
    text = "model.language_model"
    rules = [Rule("embed", f"{text}.embed_tokens.weight"), Rule("norm/scale", f"{text}.norm.weight")]
    rules += [] if config.text.tied else [Rule("head", "lm_head.weight")]
    layers = (("i", tuple(range(config.text.layers))),)
    rules += [
        Rule(f"layers/{ours}", f"{text}.layers.{{i}}.{theirs}.weight", (Transpose(),), layers)
        for ours, theirs in _ATTENTION + _FFN
    ]
    rules += [Rule(f"layers/{ours}", f"{text}.layers.{{i}}.{theirs}.weight", (), layers) for ours, theirs in _NORMS]
    return (*rules, *_vision(config.vision))


def repeated(config: BackboneConfig) -> dict[str, str]:
    """Tensors that a folder may hold a second time, and the names they must equal: the head of a tied model."""
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if config.text.tied else {}


def _vision(config: VisionConfig) -> list[Rule]:
    """The rules of the vision tower."""
    patch = (config.channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    flat = (Reshape(patch, (config.patch_dim,)), Transpose())
    rules = [
        Rule("visual/patch_embed/kernel", "model.visual.patch_embed.proj.weight", flat),
        Rule("visual/patch_embed/bias", "model.visual.patch_embed.proj.bias"),
        Rule("visual/position_table", "model.visual.pos_embed.weight"),
    ]
    blocks = (("i", tuple(range(config.depth))),)
    for norm in ("norm1", "norm2"):
        rules += _norm(f"visual/blocks/{norm}", f"model.visual.blocks.{{i}}.{norm}", blocks)
    for ours, theirs in (("attention/qkv", "attn.qkv"), ("attention/proj", "attn.proj")):
        rules += _linear(f"visual/blocks/{ours}", f"model.visual.blocks.{{i}}.{theirs}", blocks)
    for layer in ("fc1", "fc2"):
        rules += _linear(f"visual/blocks/mlp/{layer}", f"model.visual.blocks.{{i}}.mlp.linear_{layer}", blocks)
    rules += _merger("visual/merger", "model.visual.merger", ())
    if config.taps:
        taps = (("i", tuple(range(len(config.taps)))),)
        rules += _merger("visual/deepstack", "model.visual.deepstack_merger_list.{i}", taps)
    return rules


def _merger(ours: str, theirs: str, stack: tuple) -> list[Rule]:
    """A patch merger: a norm and two linear layers."""
    linear = [_linear(f"{ours}/{layer}", f"{theirs}.linear_{layer}", stack) for layer in ("fc1", "fc2")]
    return _norm(f"{ours}/norm", f"{theirs}.norm", stack) + linear[0] + linear[1]


def _linear(ours: str, theirs: str, stack: tuple) -> list[Rule]:
    """A linear layer with bias."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", (Transpose(),), stack),
        Rule(f"{ours}/bias", f"{theirs}.bias", (), stack),
    ]


def _norm(ours: str, theirs: str, stack: tuple) -> list[Rule]:
    """A LayerNorm with scale and bias."""
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", (), stack),
        Rule(f"{ours}/bias", f"{theirs}.bias", (), stack),
    ]
