"""What exported folders of LLaVA-style backbones have beside those of others: classes of their own, where needed.

transformers' classes have LLaVA's own projector and its own ways of tiling alone; `torch_code/llava_jaxmem.py` has the
others. Folders that need it say in config.json's section `jaxmem`, under "tiles", what it must know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.llava_config import NEXT, ONEVISION, TileVision
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.checkpoints.table import View, view
from jaxmem.checkpoints.weights import open_weights, read_json, write_json
from jaxmem.spec import MemoryConfig

CODE = "llava_jaxmem"
"""The module of the folder that has the classes."""
CLASSES: Mapping[str, str] = {NEXT: "CompressedLlavaNext", ONEVISION: "CompressedLlavaOnevision"}
"""By the backbone's model type."""
_LAST = "post_layernorm."
PROCESSING = "processing_jaxmem"
"""The module that has the processors, whose prompts have as many placeholders as images have tokens."""
PROCESSORS: Mapping[str, str] = {NEXT: "JaxMemNextProcessor", ONEVISION: "JaxMemOnevisionProcessor"}
"""By the backbone's model type."""


def needs_own(config: BackboneConfig, memories: tuple[MemoryConfig, ...] = ()) -> bool:
    """Does a backbone need `CLASSES` in torch: for its projector or its tiling, or for a memory that looks at tiles?"""
    if config.model_type not in CLASSES:
        return False
    vision: TileVision = config.vision
    usual = vision.aspect == "anyres" if config.model_type == NEXT else vision.aspect.startswith("anyres_max_")
    return not usual or vision.projector.name != "mlp" or any(memory.name == "vision_remember" for memory in memories)


def section(vision: TileVision) -> dict[str, Any]:
    """What config.json says under "tiles"; JSON values."""
    return {
        "aspect": vision.aspect,
        "feature_layers": list(vision.feature_layers),
        "side": vision.tower.side,
        "grid": vision.projector.grid,
        "tokens": vision.projector.tokens,
        "projector": projector_section(vision.projector),
    }


def projector_section(config: ProjectorConfig) -> dict[str, Any]:
    """All settings of a projector, the published ones filled in."""
    return dataclasses.asdict(config) | {"levels": list(config.levels)}


def unread(config: BackboneConfig, folder: Path, layout: Any) -> list[tuple[str, View]]:
    """Tensors that transformers' tower has and that nothing reads, so that they are not missing there.

    They follow the tower's last block. A folder's own are kept; where it has none, they are ones and zeros.

    Args:
      config: of the backbone.
      folder: that it came from.
      layout: of the names to write.
    """
    if config.model_type not in CLASSES:
        return []
    stored = {name.rpartition("post_layernorm.")[2]: one for name, one in open_weights(folder).items() if _LAST in name}
    plain = {"weight": np.ones, "bias": np.zeros}
    width = config.vision.tower.width
    return [
        (f"{layout.visual}{_LAST}{leaf}", stored.get(leaf) or view(fill(width, np.float32)))
        for leaf, fill in plain.items()
    ]


def write_processor(folder: Path, model_type: str) -> None:
    """Makes `AutoProcessor` read a folder by the class of `PROCESSORS`: adds it to processor_config.json."""
    file, name = folder / "processor_config.json", PROCESSORS[model_type]
    stated = read_json(file) if file.is_file() else {}
    own = {"processor_class": name, "auto_map": {"AutoProcessor": f"{PROCESSING}.{name}"}}
    write_json(file, stated | own)
