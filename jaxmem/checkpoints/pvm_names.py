"""Persistent Visual Memory: the mapping table to the official tensor names ."""

from __future__ import annotations

from typing import Any

from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose

NAME = "pvm"

_LINEAR = [(f"{x}/kernel", f"{x}.weight") for x in ("text_reducer", "vision_reducer", "output_expander")]
_LINEAR += [(f"cross_attn/{x}/kernel", f"cross_attn.{x}_proj.weight") for x in "qkvo"]
_LINEAR += [(f"mlp/{x}/kernel", f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")]
_NORMS = [(f"{x}/scale", f"{x}.weight") for x in ("input_norm", "post_attn_norm")]
_NORMS += [(f"cross_attn/{x}/scale", f"cross_attn.{x}.weight") for x in ("q_norm", "k_norm")]


def table(config: Any) -> Table:
    """The fifteen rules of a PVM; its slots lie in the order of `config.layers`, 0-based decoder indices."""
    block, slots = "model.language_model.layers.{l}.pvm_block", (("l", tuple(config.layers)),)
    linear = [Rule(ours, f"{block}.{theirs}", (Transpose(),), slots) for ours, theirs in _LINEAR]
    norms = [Rule(ours, f"{block}.{theirs}", (), slots) for ours, theirs in _NORMS]
    return (*linear, *norms, Rule("gate_alpha", f"{block}.gate_alpha", (Reshape((1,), ()),), slots))
