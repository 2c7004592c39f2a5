"""Qwen3-VL (dense): the mapping table between the official tensor names and our tree."""

from __future__ import annotations

from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import qwen_names
from jaxmem.checkpoints.qwen_names import NESTED, Layout, repeated
from jaxmem.checkpoints.table import Table

__all__ = ["LAYOUTS", "MODEL_TYPE", "repeated", "table"]

MODEL_TYPE = "qwen3_vl"
LAYOUTS = (NESTED,)
_MLP = {"fc1": "linear_fc1", "fc2": "linear_fc2"}
_MERGER = {"norm": "norm", **_MLP}


def table(config: BackboneConfig, layout: Layout = NESTED) -> Table:
    """The rules of a dense Qwen3-VL; a tied one has no `head`."""
    rules, taps = qwen_names.table(config, layout, _MLP, _MERGER), tuple(range(len(config.vision.taps)))
    if not taps:
        return rules
    theirs = f"{layout.visual}.deepstack_merger_list.{{i}}"
    return (*rules, *qwen_names.merging(config.vision, "visual/deepstack", theirs, _MERGER, (("i", taps),)))
