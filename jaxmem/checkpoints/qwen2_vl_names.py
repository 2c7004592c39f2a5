"""Qwen2-VL: the mapping table between the official tensor names and our tree."""

from __future__ import annotations

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import qwen_names
from jaxmem.checkpoints.qwen_names import FLAT, NESTED, Layout, repeated
from jaxmem.checkpoints.table import Table

__all__ = ["LAYOUTS", "MERGER", "MODEL_TYPE", "repeated", "table"]

MODEL_TYPE = "qwen2_vl"
LAYOUTS = (FLAT, NESTED)
MERGER = {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"}


def table(config: BackboneConfig, layout: Layout = FLAT) -> Table:
    """The rules of a Qwen2-VL; a tied one has no `head`."""
    return qwen_names.table(config, layout, {"fc1": "fc1", "fc2": "fc2"}, MERGER)
