"""CoMEM: the mapping table between its tensors in torch and our tree.

The Q-Former has the names of the paper's own code (`knowledge_processor`): torch's (out, in) order in linear maps, keys
and values of one map (`to_kv`, keys first), one leading axis in front of the latents. The encoder's LoRA factors stand
at the names of the modules that they update, as transformers holds the backbone in memory.
"""

from __future__ import annotations

from typing import Any

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES
from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose
from jaxmem.errors import ConfigError
from jaxmem.memory.comem import CoMEMConfig
from jaxmem.memory.q_former import QFormerConfig

Q_FORMER, ENCODER, ADAPTER = "knowledge_processor", "encoder", "adapter"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Backbones that the code of an exported folder knows."""
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_LINEAR, _NORM = {"kernel": "weight", "bias": "bias"}, {"scale": "weight", "bias": "bias"}
# ours in a block, theirs of a pass: 0 looks at the item, 1 is the feed-forward branch
_NORMS = {"norm_item": "0.norm1", "norm_latents": "0.norm2", "norm_ffn": "1.0"}
_MAPS = {"q": "0.to_q", "kv": "0.to_kv", "o": "0.to_out", "fc1": "1.1", "fc2": "1.3"}


def table(config: CoMEMConfig, backbone: BackboneConfig, prefix: str = "memory.") -> Table:
    """One rule per leaf of `comem.init`.

    Args:
      config: of the memory.
      backbone: whose modules the encoder's factors update.
      prefix: in front of every name; the default is the memory's place in an exported folder.
    """
    rules = [*q_former(config.q_former, f"{prefix}{Q_FORMER}."), *encoder(config, backbone, f"{prefix}{ENCODER}.")]
    if config.target_width != config.width:
        rules.append(Rule("adapter/kernel", f"{prefix}{ADAPTER}.weight", (Transpose(),)))
    return tuple(rules)


def q_former(config: QFormerConfig, prefix: str = "") -> Table:
    """The rules of the Q-Former below `q_former/`: 18 tensors where all passes share one block."""
    ours, theirs, stack = "q_former/block", f"{prefix}layers", ()
    if not config.shared:
        ours, theirs, stack = "q_former/blocks", f"{prefix}layers.{{i}}", (("i", tuple(range(config.depth))),)
    latents = (config.latents, config.width)
    rules = [Rule("q_former/latents", f"{prefix}latents", (Reshape((1, *latents), latents),))]
    for end, leaves in {"proj_in": _LINEAR, "proj_out": _LINEAR, "norm_out": _NORM}.items():
        rules += [_rule(f"q_former/{end}/{leaf}", f"{prefix}{end}.{name}") for leaf, name in leaves.items()]
    for norm, name in _NORMS.items():
        rules += [_rule(f"{ours}/{norm}/{leaf}", f"{theirs}.{name}.{tail}", stack) for leaf, tail in _NORM.items()]
    rules += [_rule(f"{ours}/{one}/kernel", f"{theirs}.{name}.weight", stack) for one, name in _MAPS.items()]
    return tuple(rules)


def _rule(ours: str, theirs: str, stack: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Rule:
    """A rule that swaps the axes of kernels, and of nothing else."""
    return Rule(ours, theirs, (Transpose(),) if ours.endswith("kernel") else (), stack)


def encoder(config: CoMEMConfig, backbone: BackboneConfig, prefix: str = "", layout: Any = None) -> Table:
    """The rules of the factors below `encoder/`.

    Args:
      config: says which kernels have factors.
      backbone: that they belong to.
      prefix: in front of the modules' names.
      layout: of the backbone's family; None is how transformers holds it in memory.
    """
    names = BACKBONE_TABLES[backbone.model_type]
    kernels = {rule.ours: rule for rule in names.table(backbone, layout or names.LAYOUTS[-1])}
    found = [(path, kernels[f"{path}/kernel"]) for path, _ in config.kernels]
    return tuple(
        Rule(
            f"encoder/{path}/{ours}",
            f"{prefix}{rule.theirs.removesuffix('.weight')}.{theirs}.weight",
            (Transpose(),),
            rule.stack,
        )
        for path, rule in found
        for ours, theirs in _FACTORS.items()
    )


def check_exportable(config: CoMEMConfig, backbone: BackboneConfig | None = None) -> None:
    """Raises ConfigError for a CoMEM that an exported folder cannot hold, or a backbone that its code does not know."""
    if config.encoder is not None:
        raise ConfigError(
            f"comem: {config.encoder.model_type} reads the items beside the model that answers, and an exported folder"
            " holds one backbone: export --to=original writes the encoder's adapter and the Q-Former"
        )
    if backbone is not None and backbone.model_type not in FAMILIES:
        raise ConfigError(
            f"comem: an exported folder reads items on {', '.join(FAMILIES)}, not on {backbone.model_type}: export"
            " --to=original writes the adapter and the Q-Former"
        )
