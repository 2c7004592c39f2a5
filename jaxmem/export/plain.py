"""A plain Hugging Face folder: a backbone that trained, or one with its LoRA factors folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmem.api import Model
from jaxmem.backbones.llava_config import PROJECTOR
from jaxmem.checkpoints import huggingface
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE
from jaxmem.checkpoints.table import write_tree
from jaxmem.checkpoints.weights import write_json, write_weights
from jaxmem.errors import ConfigError
from jaxmem.export import hf, llava


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes everything but the proof, under the names that the backbone is published with.

    Raises:
      ConfigError: a model with a memory, or with a projector that transformers lacks.
    """
    config, stored = model.spec.backbone, huggingface.read_config(model.folder)
    if model.spec.memories:
        names = " and ".join(memory.name for memory in model.spec.memories)
        raise ConfigError(f"export --to=merged: a plain folder has no place for {names}; use --to=hf or --to=original")
    if PROJECTOR in stored:
        name = stored[PROJECTOR].get("name")
        raise ConfigError(f"export --to=merged: transformers has no projector {name!r}; use --to=hf, with its code")
    names = BACKBONE_TABLES[config.model_type]
    tensors = [*write_tree(names.table(config), hf.merged(model.base))]
    tensors += llava.unread(config, model.folder, names.LAYOUTS[0])
    write_weights(folder, hf.cast(tensors, dtype), max_shard_size)
    write_json(folder / "config.json", stored | hf.number_format(model, dtype))
    hf.write_beside(model, folder)
