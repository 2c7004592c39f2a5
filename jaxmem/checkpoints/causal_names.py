"""Decoders without a vision tower: the mapping table between the official tensor names and our tree."""

from __future__ import annotations

from jaxmem.backbones.causal_lm import FAMILIES
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import qwen_names
from jaxmem.checkpoints.qwen_names import FLAT, Layout, repeated
from jaxmem.checkpoints.table import Table

__all__ = ["LAYOUTS", "MODEL_TYPES", "repeated", "table"]

MODEL_TYPES = tuple(FAMILIES)
LAYOUTS = (FLAT,)


def table(config: BackboneConfig, layout: Layout = FLAT) -> Table:
    """The rules of a decoder; a tied one has no `head`."""
    return tuple(qwen_names.decoder(config.text, layout))
