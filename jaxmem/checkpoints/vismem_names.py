"""VisMem: the mapping table to the tensor names of its paper's own code.

Names are those of the released code where one leaf of ours is one tensor of theirs. Where theirs is made of several
leaves, the table names the parts, as an exported folder holds them, and `fused` and `parted` lead to theirs and back:

    ...self_attn.{q,k,v}_proj.weight   [D, D] each   in_proj_weight [3D, D]
    mem_embed.{invoke,end}             [2, D] each   mem_embed [4, D], in the order of the control tokens

Axis letters: D model width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES
from jaxmem.checkpoints.table import Box, Reshape, Rule, Table, Transpose, View
from jaxmem.memory.vismem import TYPES, VisMemConfig

ADAPTERS = {name: f"{name}_former" for name in TYPES}
"""What the released code calls the adapters of a short and of a long memory."""
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_FUSED = re.compile(
    r"^(?P<front>.*)(?:query_builder\.(?P<layer>.+)\.(?P<qkv>[qkv])_proj\.(?P<leaf>weight|bias)"
    r"|(?P<rows>mem_(?:un)?embed)\.(?P<row>invoke|end))$"
)
_PARTS = {"q": 0, "k": 1, "v": 2, "invoke": 0, "end": 1}


def table(config: VisMemConfig, backbone: BackboneConfig, prefix: str = "memory.", decoder: str | None = None) -> Table:
    """The rules of a VisMem.

    Args:
      config: of the memory.
      backbone: whose modules the adapters lie beside.
      prefix: in front of all names.
      decoder: in front of the adapters' names from "layers." on; None is `prefix`.
    """
    rules = [_slots(config, prefix, kind) for kind in TYPES] + _query_builder(config, f"{prefix}query_builder.")
    names, stack = _modules(backbone), (("i", tuple(range(config.depth))),)
    for kind, targets in (("short", config.short_targets), ("long", config.long_targets)):
        for target in targets:
            path, module = names[target]
            stem = f"{prefix if decoder is None else decoder}{module}"
            rules += [
                Rule(f"{kind}/{path}/{ours}", f"{stem}.{theirs}.{ADAPTERS[kind]}.weight", (Transpose(),), stack)
                for ours, theirs in _FACTORS.items()
            ]
    tables = ("embed",) if config.tied else ("embed", "unembed")
    rules += [Rule(f"rows/{side}/{row}", f"{prefix}mem_{side}.{row}") for side in tables for row in ("invoke", "end")]
    return (*rules, Rule("out_scale", f"{prefix}out_scale")) if config.out_norm else tuple(rules)


def _slots(config: VisMemConfig, prefix: str, kind: str) -> Rule:
    size = config.sizes[TYPES.index(kind)]
    shape = (size, config.width)
    return Rule(f"slots_{kind}", f"{prefix}m_init_{kind}", (Reshape((1, *shape), shape),))


def _query_builder(config: VisMemConfig, prefix: str) -> list[Rule]:
    ours, theirs = "query_builder", f"{prefix}encoder.layers.{{n}}"
    stack = (("n", tuple(range(config.builder_layers))),)
    positions = (config.builder_length, config.width)
    rules = [
        Rule(f"{ours}/q_init", f"{prefix}q_init"),
        Rule(f"{ours}/pos_emb", f"{prefix}pos_emb", (Reshape((1, *positions), positions),)),
    ]
    linear = {f"attention/{name}": f"self_attn.{name}_proj" for name in "qkv"}
    linear |= {"attention/o": "self_attn.out_proj", "ffn/fc1": "linear1", "ffn/fc2": "linear2"}
    for one, two in linear.items():
        rules.append(Rule(f"{ours}/layers/{one}/kernel", f"{theirs}.{two}.weight", (Transpose(),), stack))
        rules.append(Rule(f"{ours}/layers/{one}/bias", f"{theirs}.{two}.bias", (), stack))
    for one, two in {"scale": "weight", "bias": "bias"}.items():
        rules += [Rule(f"{ours}/layers/{n}/{one}", f"{theirs}.{n}.{two}", (), stack) for n in ("norm1", "norm2")]
        rules.append(Rule(f"{ours}/norm/{one}", f"{prefix}ln.{two}"))
    return rules


def _modules(backbone: BackboneConfig) -> dict[str, tuple[str, str]]:
    """{"q": ("layers/attention/q", "layers.{i}.self_attn.q_proj")} of all kernels of the decoder."""
    names = BACKBONE_TABLES[backbone.model_type]
    found = {}
    for rule in names.table(backbone, names.LAYOUTS[-1]):
        if rule.ours.startswith("layers/") and rule.ours.endswith("/kernel"):
            path, module = rule.ours.removesuffix("/kernel"), rule.theirs.removesuffix(".weight")
            found[path.rpartition("/")[2]] = path, module[module.index("layers.{i}") :]
    return found


def fused(tensors: Mapping[str, View]) -> dict[str, View]:
    """The tensors of `table` under the names of the released code: parts are put together, the rest stays."""
    groups: dict[str, list[View]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _part(item[0])):
        groups.setdefault(_whole(name), []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else _joined(name, parts) for name, parts in groups.items()}


def parted(tensors: Mapping[str, View]) -> dict[str, View]:
    """The inverse of `fused`."""
    found: dict[str, View] = {}
    for name, tensor in tensors.items():
        if match := re.match(r"^(.*query_builder\..+)\.in_proj_(weight|bias)$", name):
            found |= {f"{match[1]}.{part}_proj.{match[2]}": _taken(name, tensor, 3, part) for part in "qkv"}
        elif re.search(r"(^|\.)mem_(un)?embed$", name):
            found |= {f"{name}.{part}": _taken(name, tensor, 2, part) for part in ("invoke", "end")}
        else:
            found[name] = tensor
    return found


def _whole(name: str) -> str:
    """The name of the tensor that a part belongs to; of a whole tensor its own."""
    if not (match := _FUSED.match(name)):
        return name
    if match["rows"]:
        return f"{match['front']}{match['rows']}"
    return f"{match['front']}query_builder.{match['layer']}.in_proj_{match['leaf']}"


def _part(name: str) -> int:
    """The place of a part."""
    match = _FUSED.match(name)
    return _PARTS[match["qkv"] or match["row"]] if match else 0


def _axis(name: str) -> int:
    """Maps stand one behind the other; of control tokens, each type's invocation and end."""
    return 0 if "query_builder." in name else 1


def _joined(name: str, parts: list[View]) -> View:
    """Parts [n, ...] as one tensor [len(parts) * n, ...]."""
    (rows, *rest), axis = parts[0].shape, _axis(name)

    def box(index: Box) -> np.ndarray:
        return np.stack([part.read() for part in parts], axis=axis).reshape(-1, *rest)[index]

    return View((len(parts) * rows, *rest), parts[0].dtype, box)


def _taken(name: str, tensor: View, count: int, part: str) -> View:
    """The part of a tensor [count * n, ...]."""
    (rows, *rest), axis = tensor.shape, _axis(name)
    shape = (count, rows // count) if axis == 0 else (rows // count, count)

    def box(index: Box) -> np.ndarray:
        return np.take(tensor.read().reshape(*shape, *rest), _PARTS[part], axis=axis)[index]

    return View((rows // count, *rest), tensor.dtype, box)
