"""LoRA factors as a folder of PEFT's format, which torch users load with `PeftModel.from_pretrained`, and back.

Our lora_a [L, I, R] is one `lora_A.weight` [R, I] per layer, lora_b [L, R, O] one `lora_B.weight` [O, R]; layers with
scale 0 are not written. Names follow from the backbone's own mapping table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.adapters import lora
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, load_tree
from jaxmem.checkpoints.table import Rule, Table, Transpose, flatten, unflatten, write_tree
from jaxmem.checkpoints.weights import open_file, read_json, report, staged, write_file, write_json
from jaxmem.errors import CheckpointError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOWER = r".*\b(visual|vision_tower)\..*"
"""A tower has modules of the same names, such as Qwen2.5-VL's gate_proj."""
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_PLAIN = {  # settings of PEFT that change what is computed, and the value that leaves plain LoRA
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
}


def save_adapter(folder: str | Path, base: Any, backbone: BackboneConfig, origin: str = "") -> None:
    """Writes the factors in `base` to `adapter_model.safetensors`, and their settings to `adapter_config.json`.

    Args:
      folder: made when it does not exist; an older adapter in it is replaced.
      base: backbone weights with factors.
      backbone: their sizes.
      origin: where the backbone came from, for `base_model_name_or_path`.

    Raises:
      CheckpointError: `base` has no factors.
    """
    factors = lora.factors(base)
    if not factors:
        raise CheckpointError(f"{folder}: the backbone has no LoRA factors to save; attach them first")
    one = next(iter(factors.values()))
    layers = np.flatnonzero(np.asarray(one["lora_scale"]))
    rank, scale = one["lora_a"].shape[-1], float(one["lora_scale"][layers[0]])
    tree = {path: {name: factor[name][layers] for name in _FACTORS} for path, factor in factors.items()}
    config = _config(backbone, factors, layers.tolist(), rank, scale * rank) | {"base_model_name_or_path": origin}
    with staged(Path(folder), (CONFIG, WEIGHTS)) as stage:
        write_file(stage / WEIGHTS, write_tree(_table(_stems(backbone), factors, layers.tolist()), unflatten(tree)))
        write_json(stage / CONFIG, config)


def load_adapter(folder: str | Path, base: Any, backbone: BackboneConfig) -> Any:
    """`base` with the factors of a PEFT folder beside its kernels, in float32.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      base: backbone weights without factors.
      backbone: their sizes.

    Raises:
      CheckpointError: no or a damaged adapter, one that is more than plain LoRA on the decoder's kernels, or tensors
        that do not fit.
    """
    where = Path(folder) / WEIGHTS
    rank, scale = _read(Path(folder) / CONFIG)
    tensors, depth = open_file(where), backbone.text.layers
    layouts = BACKBONE_TABLES[backbone.model_type].LAYOUTS
    stems = max((_stems(backbone, layout) for layout in reversed(layouts)), key=lambda some: _hits(some, tensors))
    has = lambda stem, layer: f"{stem.format(i=layer)}.lora_A.weight" in tensors  # noqa: E731
    held = {path: [layer for layer in range(depth) if has(stem, layer)] for path, stem in stems.items()}
    paths, layers = [path for path in held if held[path]], sorted(set().union(*held.values()))
    kernels = flatten(base)
    shapes = unflatten({path: _shapes(kernels[f"{path}/kernel"].shape, len(layers), rank) for path in paths})
    stored = load_tree(where, tensors, _table(stems, paths, layers), shapes, dtype=jnp.dtype("float32"))
    index = jnp.asarray(layers, jnp.int32)
    spread = {name: jnp.zeros((depth, *leaf.shape[1:])).at[index].set(leaf) for name, leaf in flatten(stored).items()}
    scales = {"lora_scale": jnp.zeros(depth).at[index].set(scale)}
    return lora.place({path: {name: spread[f"{path}/{name}"] for name in _FACTORS} | scales for path in paths}, base)


def _shapes(kernel: tuple[int, ...], layers: int, rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    _, inputs, outputs = kernel
    sizes = {"lora_a": (layers, inputs, rank), "lora_b": (layers, rank, outputs)}
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def _stems(backbone: BackboneConfig, layout: Any = None) -> dict[str, str]:
    """PEFT's name of every decoder kernel, "{i}" for the layer, by the path of the Linear.

    PEFT names modules as torch holds them: in the family's last layout, and in older releases in its first.
    """
    names = BACKBONE_TABLES[backbone.model_type]
    rules = names.table(backbone, layout or names.LAYOUTS[-1])
    return {
        rule.ours.removesuffix("/kernel"): f"base_model.model.{rule.theirs.removesuffix('.weight')}"
        for rule in rules
        if rule.ours.startswith("layers/") and rule.ours.endswith("/kernel")
    }


def _hits(stems: Mapping[str, str], tensors: Mapping[str, Any]) -> int:
    """How many tensors start with a stem's constant part."""
    starts = tuple({stem.partition("{i}")[0] for stem in stems.values()})
    return sum(name.startswith(starts) for name in tensors)


def _table(stems: Mapping[str, str], paths: Iterable[str], layers: Sequence[int]) -> Table:
    """The rules of the factors at `paths` in `layers`."""
    stack = (("i", tuple(layers)),)
    return tuple(
        Rule(f"{path}/{ours}", f"{stems[path]}.{theirs}.weight", (Transpose(),), stack)
        for path in paths
        for ours, theirs in _FACTORS.items()
    )


def _config(
    backbone: BackboneConfig, paths: Iterable[str], layers: Sequence[int], rank: int, alpha: float
) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    stems, everywhere = _stems(backbone), len(layers) == backbone.text.layers
    return _PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": [stems[path].rpartition(".")[2] for path in paths],
        "exclude_modules": None if backbone.vision is None else _TOWER,
        "layers_to_transform": None if everywhere else list(layers),
    }


def _read(path: Path) -> tuple[int, float]:
    """Rank and scale of `adapter_config.json`; CheckpointError when it asks for more than plain LoRA."""
    config = read_json(path)
    odd = [f"{key} = {config[key]!r}" for key, plain in _PLAIN.items() if config.get(key) and config[key] != plain]
    odd += [f"peft_type = {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    odd += [f"{key} is missing" for key in ("r", "lora_alpha") if key not in config]
    report(path, {"settings that are not plain LoRA": odd}, "Merge this adapter in torch and load the whole model.")
    rank = int(config["r"])
    return rank, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
