"""One mesh helper and one table of sharding rules.

A mesh has three axes: `data` (rows of a batch), `fsdp` (rows too, and weights cut to pieces) and `tensor` (heads and
hidden units). Early rules win; what no rule names is replicated because it is small.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.errors import ConfigError

RULES: tuple[tuple[str, P], ...] = (
    (r"^(embed|head)$", P("tensor", "fsdp")),
    (r"layers/attention/[qkv]/kernel", P(None, "fsdp", "tensor")),
    (r"layers/attention/o/kernel", P(None, "tensor", "fsdp")),
    (r"layers/ffn/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/ffn/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/lora_a", P(None, "fsdp", None)),
    (r"layers/.*/lora_b", P(None, None, "fsdp")),
    (r"visual/blocks/(attention/qkv|mlp/fc1)/kernel", P(None, "fsdp", "tensor")),
    (r"visual/blocks/(attention/proj|mlp/fc2)/kernel", P(None, "tensor", "fsdp")),
    (r"visual/merger/fc1/kernel", P("fsdp", "tensor")),
    (r"visual/merger/fc2/kernel", P("tensor", "fsdp")),
    (r"visual/deepstack/fc1/kernel", P(None, "fsdp", "tensor")),
    (r"visual/deepstack/fc2/kernel", P(None, "tensor", "fsdp")),
    # PVM: the one key head of the large sizes cannot be cut, so its maps are cut over the width alone.
    (r"(text_reducer|vision_reducer)/kernel", P(None, "fsdp", None)),
    (r"output_expander/kernel", P(None, None, "fsdp")),
    (r"(pvm|mlp)/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(pvm|mlp)/mlp/down/kernel", P(None, "tensor", "fsdp")),
)
BATCH = P(("data", "fsdp"))


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices with automatic propagation.

    Raises:
      ConfigError: there are fewer devices than the mesh needs, or an axis below 1.
    """
    devices = jax.devices() if devices is None else devices
    count = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1 or count > len(devices):
        raise ConfigError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {count} devices, there are {len(devices)}"
        )
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((data, fsdp, tensor), axes, (AxisType.Auto,) * 3, devices=devices[:count])


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of one leaf: the first rule that its path matches, without axes that do not divide it."""
    rule = next((spec for pattern, spec in RULES if re.search(pattern, path)), P())
    axes = [axis if axis is None or shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(rule)]
    return P(*axes)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedShardings for a tree of weights ({"pvm": ...} for memories), by the table above."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`: every array of a Batch shards on its first axis and on nothing else."""
    return NamedSharding(mesh, BATCH)
