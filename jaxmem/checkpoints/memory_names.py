"""Mapping tables between our memories and the modules of an exported folder, by the memory's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import comem_names, mlp_names, pvm_names, vision_remember_names, vismem_names
from jaxmem.checkpoints.table import Table

TORCH_TABLES: dict[str, Callable[[Any, BackboneConfig], Table]] = {
    "pvm": lambda config, backbone: pvm_names.table(config),
    "mlp": lambda config, backbone: mlp_names.table(config),
    "vismem": vismem_names.table,
    "comem": comem_names.table,
    "vision_remember": vision_remember_names.table,
}
