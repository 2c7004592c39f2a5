"""PVM in the layout of its paper's own code, both ways: a Qwen3-VL folder with a `pvm_block` in some decoder layers.

A folder holds fifteen tensors per layer among the backbone's, all under the names of the modules in memory (that code
renames nothing while it loads), torch's (out, in) order in linear maps. Sizes other than the latent width follow from
the backbone; in `config.json` stand `pvm_layers` and `pvm_hidden_size`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.api import Model
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import huggingface, pvm_names
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE, load_tree
from jaxmem.checkpoints.table import View, write_tree
from jaxmem.checkpoints.weights import read_json, report, write_json, write_weights
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import hf
from jaxmem.export.pickles import open_state
from jaxmem.memory import pvm
from jaxmem.memory.pvm import PVMConfig

TENSORS = r"\.pvm_block\."
"""What names of a memory's tensors have in them, in a folder that holds a backbone, too."""
_NAME = re.compile(r"^(?P<before>.*)layers\.(?P<layer>\d+)\.pvm_block\.(?P<tensor>.+)$")
_PREFIX = "model.language_model."
_FREE = ("layers", "latent", "visibility", "dropout", "gate", "initialiser")
"""Settings that the layout can hold, or that change nothing of a trained PVM."""


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes backbone and memory. LoRA factors of the backbone are added into its weights on the way.

    The paper's code lets text see all images of its row, those behind it too: `visibility` "all". A model with "causal"
    visibility is written as well, and `pvm_visibility` notes it for `read`; where all images stand in front, the two
    differ in the few tokens before the first one.

    Args:
      model: a Qwen3-VL with a PVM as published.
      folder: exists and is empty.
      dtype: of all tensors; None keeps the stored ones.
      max_shard_size: bytes per file.

    Raises:
      ConfigError: another backbone or memory, or settings that the paper's code does not have.
    """
    config = _check(model)
    backbone, stored = model.spec.backbone, huggingface.read_config(model.folder)
    names = BACKBONE_TABLES[backbone.model_type]
    tensors = [*write_tree(names.table(backbone, names.LAYOUTS[-1]), hf.merged(model.base))]
    tensors += write_tree(pvm_names.table(config), model.memory[config.name])
    about = {"pvm_layers": list(config.layers), "pvm_hidden_size": config.latent}
    about |= {"pvm_visibility": config.visibility}
    write_weights(folder, hf.cast(tensors, dtype), max_shard_size)
    text = stored.get("text_config", {}) | about
    write_json(folder / "config.json", stored | about | {"text_config": text} | hf.number_format(model, dtype))
    hf.write_beside(model, folder)


def _check(model: Model) -> PVMConfig:
    """The model's PVM; ConfigError where the paper's code has no such model."""
    backbone, memories = model.spec.backbone, model.spec.memories
    if backbone.model_type != "qwen3_vl":
        raise ConfigError(
            f"export --to=original: the code of PVM's paper knows Qwen3-VL, not {backbone.model_type}; use --to=hf"
        )
    if len(memories) != 1 or not isinstance(memories[0], PVMConfig):
        held = " and ".join(memory.name for memory in memories) or "no memory"
        raise ConfigError(f"export --to=original: there is a layout for one PVM, the model has {held}")
    config = memories[0]
    published = pvm.create(backbone, layers=config.layers, latent=config.latent)
    odd = [
        f"{field.name} is {getattr(config, field.name)!r}, not {getattr(published, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in _FREE and getattr(config, field.name) != getattr(published, field.name)
    ]
    if odd:
        raise ConfigError(f"export --to=original: not as in PVM's paper: {'; '.join(odd)}; use --to=hf")
    return config


def read(
    source: str | Path, backbone: BackboneConfig, *, visibility: str | None = None, allow_pickle: bool = False
) -> tuple[PVMConfig, Any]:
    """A PVM from a state dict in the original layout.

    Args:
      source: a safetensors or pickled file, or a folder of them; with a PVM alone, or among a backbone's tensors, which
        are not read.
      backbone: that it belongs to, of any family.
      visibility: None takes what `config.json` beside the tensors notes, else "all", as the paper's code has it.
      allow_pickle: open pickled files (tensors alone are read).

    Returns:
      Its settings, layers and sizes found by the tensors' names and shapes; and float32 parameters.

    Raises:
      CheckpointError: no PVM there; missing, unexpected or wrongly shaped tensors; layers that the backbone lacks; a
        file that cannot be opened, or a pickled one that may not.
    """
    source = Path(source)
    tensors = _named(source, open_state(source, allow_pickle))
    layers = tuple(sorted({int(_NAME.match(name)["layer"]) for name in tensors}))  # pyrefly: ignore
    depth = backbone.text.layers
    absent = [str(layer) for layer in layers if layer >= depth]
    report(source, {f"layers that a decoder of {depth} lacks": absent}, "Is it the backbone that it was trained on?")
    try:
        config = pvm.create(
            backbone, layers=layers, visibility=visibility or _noted(source) or "all", **_sizes(source, tensors)
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: cannot be used: {error}") from error
    shapes = jax.eval_shape(lambda: pvm.init(jax.random.key(0), config))
    return config, load_tree(source, tensors, pvm_names.table(config), shapes, dtype=jnp.dtype("float32"))


def _named(source: Path, tensors: Mapping[str, View]) -> dict[str, View]:
    """The tensors of the PVM under their official names, whatever stands in front of `layers`."""
    own = {name: _NAME.match(name) for name in tensors if "pvm" in name}
    found = {name: match for name, match in own.items() if match}
    if not own:
        raise CheckpointError(f"{source}: holds no PVM: no tensor is named like {_PREFIX}layers.8.pvm_block.gate_alpha")
    fronts = sorted({match["before"] for match in found.values()})
    report(
        source,
        {
            "unexpected tensors": [name for name in own if name not in found],
            "different names in front of layers": fronts if len(fronts) > 1 else [],
        },
        "Expected the tensors of one PVM.",
    )
    return {f"{_PREFIX}layers.{m['layer']}.pvm_block.{m['tensor']}": tensors[name] for name, m in found.items()}


def _sizes(source: Path, tensors: Mapping[str, View]) -> dict[str, int]:
    """The sizes of a PVM, as the first layer that has a tensor shows them."""

    def rows(tensor: str) -> int:
        shapes = [view.shape for name, view in tensors.items() if name.endswith(f".pvm_block.{tensor}.weight")]
        if not shapes or not shapes[0]:
            missing = [f"pvm_block.{tensor}.weight"]
            report(source, {"missing tensors, or of no shape, in all layers": missing}, "Is the PVM complete?")
        return max(1, shapes[0][0])

    head_dim = rows("cross_attn.q_norm")
    return {
        "latent": rows("text_reducer"),
        "head_dim": head_dim,
        "kv_heads": max(1, rows("cross_attn.k_proj") // head_dim),
        "mlp_width": rows("mlp.gate_proj"),
    }


def _noted(source: Path) -> str | None:
    """The visibility in a `config.json` beside the tensors."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    return read_json(file).get("pvm_visibility") if file.is_file() else None
