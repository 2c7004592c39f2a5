"""The MLP branch, PVM's control: tensor names after the pattern of PVM's."""

from __future__ import annotations

from typing import Any

from jaxmem.checkpoints.table import Reshape, Rule, Table, Transpose

NAME = "mlp"

_LINEAR = [(f"{x}/kernel", f"{x}.weight") for x in ("text_reducer", "output_expander")]
_LINEAR += [(f"mlp/{x}/kernel", f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")]


def table(config: Any) -> Table:
    """The seven rules of the branch; its slots lie in the order of `config.layers`."""
    block, slots = "model.language_model.layers.{l}.mlp_branch", (("l", tuple(config.layers)),)
    linear = [Rule(ours, f"{block}.{theirs}", (Transpose(),), slots) for ours, theirs in _LINEAR]
    norm = Rule("input_norm/scale", f"{block}.input_norm.weight", (), slots)
    return (*linear, norm, Rule("gate_alpha", f"{block}.gate_alpha", (Reshape((1,), ()),), slots))
