"""What the mapping tables of the Qwen-VL family share: how tensors are called below two prefixes, and their rules.

A folder calls its tensors by one of the family's layouts; the first is written, every one is read.
"""

from __future__ import annotations

import dataclasses

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose

Stack = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """In front of the names of the decoder and of the vision tower, and the whole name of the head."""

    text: str
    visual: str
    head: str = "lm_head.weight"


NESTED = Layout("model.language_model", "model.visual")
"""As transformers holds the models in memory, and as Qwen3-VL is published."""
FLAT = Layout("model", "visual")
"""As Qwen2-VL and Qwen2.5-VL are published, and as `save_pretrained` writes them."""

# ours below one layer, theirs below one layer
_KERNELS = [(f"attention/{x}/kernel", f"self_attn.{x}_proj.weight") for x in "qkvo"]
_KERNELS += [(f"ffn/{x}/kernel", f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")]
_NORMS = [("attention_norm/scale", "input_layernorm.weight"), ("ffn_norm/scale", "post_attention_layernorm.weight")]
_QK_NORMS = [(f"attention/{x}_norm/scale", f"self_attn.{x}_norm.weight") for x in "qk"]
_BIASES = [(f"attention/{x}/bias", f"self_attn.{x}_proj.bias") for x in "qkv"]


def repeated(config: BackboneConfig, layout: Layout) -> dict[str, str]:
    """Tensors that a folder may hold a second time, and the names they must equal: the head of a tied model."""
    return {layout.head: f"{layout.text}.embed_tokens.weight"} if config.text.tied else {}


def decoder(config: TextConfig, layout: Layout) -> list[Rule]:
    """The rules of a decoder; a tied one has no `head`."""
    text, layers = layout.text, (("i", tuple(range(config.layers))),)
    plain = _NORMS + (_QK_NORMS if config.qk_norm else []) + (_BIASES if config.qkv_bias else [])
    rules = [Rule("embed", f"{text}.embed_tokens.weight"), Rule("norm/scale", f"{text}.norm.weight")]
    rules += [] if config.tied else [Rule("head", layout.head)]
    rules += [
        Rule(f"layers/{ours}", f"{text}.layers.{{i}}.{theirs}", (Transpose(),), layers) for ours, theirs in _KERNELS
    ]
    return rules + [Rule(f"layers/{ours}", f"{text}.layers.{{i}}.{theirs}", (), layers) for ours, theirs in plain]


def tower(config: VisionConfig, layout: Layout, mlp: dict[str, str], merger: dict[str, str]) -> list[Rule]:
    """The rules of a vision tower without DeepStack mergers.

    Args:
      config: sizes.
      layout: prefixes.
      mlp: our names of the linear maps of a block's MLP to theirs.
      merger: our names of the parts of the merger (norm, fc1, fc2) to theirs.
    """
    visual = layout.visual
    patch = (config.channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    flat = (Reshape(patch, (config.patch_dim,)), Transpose())
    rules = [Rule("visual/patch_embed/kernel", f"{visual}.patch_embed.proj.weight", flat)]
    if config.patch_bias:
        rules.append(Rule("visual/patch_embed/bias", f"{visual}.patch_embed.proj.bias"))
    if config.table_side:
        rules.append(Rule("visual/position_table", f"{visual}.pos_embed.weight"))
    blocks = (("i", tuple(range(config.depth))),)
    for name in ("norm1", "norm2"):
        rules += norm(config, f"visual/blocks/{name}", f"{visual}.blocks.{{i}}.{name}", blocks)
    maps = {f"attention/{name}": f"attn.{name}" for name in ("qkv", "proj")}
    maps |= {f"mlp/{ours}": f"mlp.{theirs}" for ours, theirs in mlp.items()}
    for ours, theirs in maps.items():
        rules += linear(f"visual/blocks/{ours}", f"{visual}.blocks.{{i}}.{theirs}", blocks)
    return rules + merging(config, "visual/merger", f"{visual}.merger", merger, ())


def merging(config: VisionConfig, ours: str, theirs: str, names: dict[str, str], stack: Stack) -> list[Rule]:
    """A patch merger, or a stack of them: a norm and two linear maps."""
    first, second = (linear(f"{ours}/{layer}", f"{theirs}.{names[layer]}", stack) for layer in ("fc1", "fc2"))
    return norm(config, f"{ours}/norm", f"{theirs}.{names['norm']}", stack) + first + second


def linear(ours: str, theirs: str, stack: Stack) -> list[Rule]:
    """A linear map with bias."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", (Transpose(),), stack),
        Rule(f"{ours}/bias", f"{theirs}.bias", (), stack),
    ]


def norm(config: VisionConfig, ours: str, theirs: str, stack: Stack) -> list[Rule]:
    """A LayerNorm with scale and bias, or an RMSNorm with a scale alone."""
    rules = [Rule(f"{ours}/scale", f"{theirs}.weight", (), stack)]
    return rules if config.norm == "rms" else [*rules, Rule(f"{ours}/bias", f"{theirs}.bias", (), stack)]


def table(config: BackboneConfig, layout: Layout, mlp: dict[str, str], merger: dict[str, str]) -> Table:
    """Decoder and tower; arguments as for `tower`."""
    return (*decoder(config.text, layout), *tower(config.vision, layout, mlp, merger))
