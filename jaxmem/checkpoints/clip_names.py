"""CLIP and SigLIP: the mapping table between the official tensor names and our tree.

A folder with a vision tower alone calls its tensors `vision_model.*`, or leaves that prefix out (what releases 5 of
transformers save of a tower without a projection); both are read.
"""

from __future__ import annotations

from jaxmem.backbones.clip_config import ClipConfig
from jaxmem.backbones.encoder import EncoderConfig
from jaxmem.backbones.vit import CHANNELS, ViTConfig
from jaxmem.checkpoints.qwen_names import Stack, linear
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose

VISION, TEXT = "vision_model.", "text_model."
_LINEAR = {f"attention/{name}": f"self_attn.{name}_proj" for name in "qkv"}
_LINEAR |= {"attention/o": "self_attn.out_proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}


def table(config: ClipConfig, prefix: str = VISION) -> Table:
    """The rules of a whole model or of a vision tower alone; `prefix` stands in front of the vision tower's names."""
    rules = (*tower(config.vision, "visual/", prefix), *_pooling(config, prefix))
    if config.text is None:
        return rules
    rules += (
        Rule("text/embed", f"{TEXT}embeddings.token_embedding.weight"),
        Rule("text/position_table", f"{TEXT}embeddings.position_embedding.weight"),
        *_blocks(config.text, "text/", TEXT),
        *_norm("text/norm", f"{TEXT}final_layer_norm"),
        Rule("logit_scale", "logit_scale"),
    )
    if config.family == "siglip":
        return (*rules, *linear("text/projection", f"{TEXT}head", ()), Rule("logit_bias", "logit_bias"))
    return (*rules, Rule("text/projection/kernel", "text_projection.weight", (Transpose(),)))


def tower(config: ViTConfig, ours: str, theirs: str) -> Table:
    """The rules of a vision tower without its pooling: what a LLaVA-style backbone holds of it.

    Args:
      config: sizes.
      ours: in front of our paths, such as "visual/".
      theirs: in front of their names, such as "vision_tower.vision_model.".
    """
    taps = (CHANNELS, config.patch_size, config.patch_size)
    patch = f"{theirs}embeddings.patch_embedding"
    rules = [
        Rule(f"{ours}patch_embed/kernel", f"{patch}.weight", (Reshape(taps, (config.patch_dim,)), Transpose())),
        Rule(f"{ours}position_table", f"{theirs}embeddings.position_embedding.weight"),
        *_blocks(config, ours, theirs),
    ]
    if config.patch_bias:
        rules.append(Rule(f"{ours}patch_embed/bias", f"{patch}.bias"))
    if config.class_token:
        rules.append(Rule(f"{ours}class_embed", f"{theirs}embeddings.class_embedding"))
    if config.pre_norm:
        rules += _norm(f"{ours}pre_norm", f"{theirs}pre_layrnorm")
    return tuple(rules)


def _blocks(config: EncoderConfig, ours: str, theirs: str) -> Table:
    """The stacked blocks of a tower."""
    ours, theirs, stack = f"{ours}blocks/", f"{theirs}encoder.layers.{{i}}.", (("i", tuple(range(config.depth))),)
    maps = [rule for mine, its in _LINEAR.items() for rule in linear(ours + mine, theirs + its, stack)]
    return (*maps, *(rule for mine, its in _NORMS.items() for rule in _norm(ours + mine, theirs + its, stack)))


def _norm(ours: str, theirs: str, stack: Stack = ()) -> Table:
    """A LayerNorm."""
    return Rule(f"{ours}/scale", f"{theirs}.weight", (), stack), Rule(f"{ours}/bias", f"{theirs}.bias", (), stack)


def _pooling(config: ClipConfig, prefix: str) -> Table:
    """What makes one vector of an image's last hidden state."""
    width, head = config.vision.width, f"{prefix}head"
    rules = [*_norm("pool/norm", f"{prefix}post_layernorm")]
    if config.projection:
        rules.append(Rule("pool/projection/kernel", "visual_projection.weight", (Transpose(),)))
    if config.pool != "attention":
        return tuple(rules)
    rules += [
        Rule("pool/head/probe", f"{head}.probe", (Reshape((1, 1, width), (width,)),)),
        Rule("pool/head/qkv/kernel", f"{head}.attention.in_proj_weight", (Transpose(),)),
        Rule("pool/head/qkv/bias", f"{head}.attention.in_proj_bias"),
        *linear("pool/head/o", f"{head}.attention.out_proj", ()),
        *_norm("pool/head/norm", f"{head}.layernorm"),
    ]
    return (*rules, *(rule for fc in ("fc1", "fc2") for rule in linear(f"pool/head/mlp/{fc}", f"{head}.mlp.{fc}", ())))
