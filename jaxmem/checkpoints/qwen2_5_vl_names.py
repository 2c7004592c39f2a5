"""Qwen2.5-VL: the mapping table between the official tensor names and our tree."""

from __future__ import annotations

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import qwen_names
from jaxmem.checkpoints.qwen2_vl_names import LAYOUTS, MERGER
from jaxmem.checkpoints.qwen_names import FLAT, Layout, repeated
from jaxmem.checkpoints.table import Table

__all__ = ["LAYOUTS", "MODEL_TYPE", "repeated", "table"]

MODEL_TYPE = "qwen2_5_vl"


def table(config: BackboneConfig, layout: Layout = FLAT) -> Table:
    """The rules of a Qwen2.5-VL; a tied one has no `head`."""
    return qwen_names.table(config, layout, {name: f"{name}_proj" for name in ("gate", "up", "down")}, MERGER)
