"""One mesh helper and two tables of sharding rules: for weights by their paths, for activations by their names.

A mesh has four axes: `data` (rows of a batch), `fsdp` (rows too, and weights cut to pieces), `sequence` (tokens of a
long row, completions of a group, and weights again) and `tensor` (heads and hidden units). Rules name axes generously:
an axis that does not divide a dimension leaves it whole. Optimizer moments and gradients follow their weights, since
their paths end alike.

What stays whole on every device, because it is small: norms, biases and gates (below 0.7 MB a leaf at 8B), the maps to
PVM's one key head (0.8 MB), step counters and random keys.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")
"""Axes that share the rows of a batch."""
PIECES = ("fsdp", "sequence")
"""Axes over which weights are cut to pieces."""

RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)(embed|head)$", P("tensor", PIECES)),
    (r"layers/.*/(q|k|v|gate|up)/kernel", P(None, PIECES, "tensor")),
    (r"layers/.*/(o|down)/kernel", P(None, "tensor", PIECES)),
    (r"layers/.*/lora_a", P(None, PIECES, None)),
    (r"layers/.*/lora_b", P(None, None, PIECES)),
    (r"visual/patch_embed/kernel", P(None, ("tensor", *PIECES))),  # 1,176 pixels of a patch: not by 16
    (r"visual/position_table", P(None, PIECES)),
    (r"visual/(blocks|deepstack)/.*(qkv|q|k|v|fc1|gate|up)/kernel", P(None, PIECES, "tensor")),
    (r"visual/(blocks|deepstack)/.*(proj|o|fc2|down)/kernel", P(None, "tensor", PIECES)),
    (r"visual/merger/fc1/kernel", P(PIECES, "tensor")),
    (r"visual/merger/fc2/kernel", P("tensor", PIECES)),
    (r"visual/(blocks|deepstack)/.*lora_a", P(None, PIECES, None)),
    (r"visual/(blocks|deepstack)/.*lora_b", P(None, None, PIECES)),
    (r"visual/merger/.*lora_a", P(PIECES, None)),
    (r"visual/merger/.*lora_b", P(None, PIECES)),
    # LLaVA-style projectors: stacked blocks first.
    (r"projector/(blocks|pairs)/.*(q|k|v|qkv|fc1|conv1)/kernel", P(None, PIECES, "tensor")),
    (r"projector/(blocks|pairs)/.*(o|fc2|conv3)/kernel", P(None, "tensor", PIECES)),
    (r"projector/.*(q|k|v|qkv|fc1|conv1|proj_in)/kernel", P(PIECES, "tensor")),
    (r"projector/.*(o|fc2|conv3|proj_out)/kernel", P("tensor", PIECES)),
    # Vision Remember, and what it is compared with.
    (r"vision_remember/fusion/kernel", P(PIECES, "tensor")),
    (r"(vision_remember|sva)/blocks/.*(q|k|v|fc1|proj_in|proj_context)/kernel", P(None, PIECES, "tensor")),
    (r"(vision_remember|sva)/blocks/.*(o|fc2)/kernel", P(None, "tensor", PIECES)),
    # CoMEM: keys and values lie in one kernel, whose columns the devices of `tensor` cannot share by heads.
    (r"q_former/block/(q|fc1)/kernel", P(PIECES, "tensor")),
    (r"q_former/block/kv/kernel", P(PIECES, None)),
    (r"q_former/block/(o|fc2)/kernel", P("tensor", PIECES)),
    (r"q_former/blocks/(q|fc1)/kernel", P(None, PIECES, "tensor")),
    (r"q_former/blocks/kv/kernel", P(None, PIECES, None)),
    (r"q_former/blocks/(o|fc2)/kernel", P(None, "tensor", PIECES)),
    (r"q_former/proj_(in|out)/kernel", P(PIECES, "tensor")),
    (r"query_builder/layers/.*fc1/kernel", P(None, PIECES, "tensor")),
    (r"query_builder/layers/.*fc2/kernel", P(None, "tensor", PIECES)),
    (r"query_builder/pos_emb", P(None, PIECES)),
    # PVM: the one key head of the large sizes cannot be cut, so its maps are cut over the width alone.
    (r"(text_reducer|vision_reducer)/kernel", P(None, PIECES, None)),
    (r"output_expander/kernel", P(None, None, PIECES)),
    (r"cross_attn/(q|o)/kernel", P(None, PIECES, None)),
    (r"(pvm|mlp)/mlp/(gate|up)/kernel", P(None, PIECES, "tensor")),
    (r"(pvm|mlp)/mlp/down/kernel", P(None, "tensor", PIECES)),
)
"""Weights: the first pattern that a path matches decides. Leading axes are layers or slots and stay whole."""

ACTIVATIONS: Mapping[str, P] = {
    "residual": P(ROWS, ("sequence", "tensor"), None),  # [B, T, D] between layers
    "patches": P(ROWS, "sequence", None),  # [B, P, W] in the vision tower
    "visual": P(ROWS, None, None),  # [B, M, D] merged rows, asked by every token of the row
    "queries": P(ROWS, "sequence", "tensor", None),  # [B, T, N, H]
    "keys": P(ROWS, None, "tensor", None),  # [B, S, K, H]: every query of a row may ask every key
    "branch_queries": P(ROWS, "sequence", None, "tensor", None),  # [B, G, Q, N, H]
    "branch_keys": P(ROWS, "sequence", "tensor", None, None),  # [B, G, K, U, H], also the cache of continuations
    "kept_keys": P(ROWS, "sequence", "tensor", None),  # [B, T, K, H] of a prompt, until a layer of continuations asks
    "trunk_keys": P(ROWS, "tensor", None, None),  # [B, K, S, H], also the cache of prompts
    # The loss: the devices that share a row have a part of the vocabulary each, for the chunk [B, C, D] of all of them.
    "head": P(("sequence", "tensor"), None),
    "chunk": P(ROWS, None, None),
    "logits": P(ROWS, None, ("sequence", "tensor")),
    "next_logits": P(None, "tensor"),  # [B * G, V] of one generated token each, as they are computed
    "token": P(None, None, PIECES),  # [B, G, D] one generated token each: weights stay where they are
    "scores": P((*ROWS, "sequence"), None),  # [B * G, V] the same, as they are drawn from
    "members": P(ROWS, "sequence", None, None),  # [B, G, C, D] states of continuations
    "prefixes": P(None, None, ROWS, None, "tensor", None),  # [2, L, B, Y, K, H] what VisMem's formers keep of images
}
"""Activations, by the names that the forward passes use in `constrain`."""


_MEMBERS = contextvars.ContextVar("members", default=False)


def make_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of data x fsdp x sequence x tensor devices with automatic propagation.

    Args:
      data, fsdp, sequence, tensor: sizes; one of them may be -1 and takes all devices that the others leave.
      devices: all of jax's when None. With several hosts the mesh must use every device.

    Raises:
      ConfigError: sizes that do not fit the devices; the message says which would.
    """
    devices = jax.devices() if devices is None else devices
    sizes = complete({"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}, len(devices))
    used = math.prod(sizes.values())
    if used < len(devices) and any(device.process_index for device in devices):
        raise ConfigError(f"{_words(sizes)} uses {used} of the {len(devices)} devices of all hosts; set mesh.fsdp=-1")
    # Axes may take a part of a torus axis, such as 8 x 2 of a 4 x 4 torus.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:used], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def complete(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes with -1 replaced by what the other axes leave.

    Raises:
      ConfigError: more than one -1, a size below 1, or sizes that need more devices or do not divide them.
    """
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ConfigError(f"{_words(sizes)}: sizes are at least 1, and one of them may be -1 (the rest of the devices)")
    if fixed > devices or (free and devices % fixed):
        raise ConfigError(
            f"{_words(sizes)} needs {'a multiple of ' if free else ''}{fixed} devices, there are {devices}"
        )
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def _words(sizes: Mapping[str, int]) -> str:
    return "a mesh of " + " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_heads(text: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError when the mesh's `tensor` axis does not divide the heads of a decoder's TextConfig."""
    tensor = mesh.shape["tensor"]
    for what, heads in (("key heads", text.kv_heads), ("heads", text.heads)):
        if heads % tensor:
            fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ConfigError(f"mesh.tensor = {tensor} does not divide the decoder's {heads} {what}; use {fitting}")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The partition of one weight: the first rule that its path matches, without axes that do not divide it."""
    return _fitted(next((spec for pattern, spec in RULES if re.search(pattern, path)), P()), shape, mesh)


def _fitted(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec without axes that do not divide their dimension; of several axes the first ones that do stay."""

    def fit(axes: Any, size: int) -> Any:
        named = (axes,) if isinstance(axes, str) else tuple(axes or ())
        names = tuple(name for name in named if mesh.shape[name] > 1)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names if len(names) > 1 else names[0] if names else None

    return P(*(fit(axes, size) for axes, size in zip(spec, shape, strict=False)))


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """NamedShardings for a tree of weights, optimizer state or gradients, by the table above."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_shardings(mesh: Mesh | AbstractMesh, batch: Any, leading: int = 0) -> Any:
    """NamedShardings for a Batch, or another tree with rows: rows over `data` and `fsdp`, pixels over `sequence` too.

    Args:
      mesh: the mesh.
      batch: leaves [..., B, ...], of any dataclass; what is called `patches` holds the pixels, [..., B, P, C].
      leading: axes in front of B.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        pixels = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2] == "patches"
        spec = P(*[None] * leading, ROWS, *(["sequence"] if pixels else []))
        return NamedSharding(mesh, _fitted(spec, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(place, batch)


def current(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a mesh the current one for a block; nothing without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def ambient() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` made current, if it is one of ours and has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def ways(*axes: str) -> int:
    """Devices along some axes of the current mesh; 1 without one."""
    mesh = ambient()
    if _MEMBERS.get():
        axes = _of_members(axes) or ()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def activation_sharding(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], name: str) -> NamedSharding:
    """Where `ACTIVATIONS[name]` wants an array of some shape."""
    return NamedSharding(mesh, _fitted(ACTIVATIONS[name], shape, mesh))


def constrain(x: Any, name: str) -> Any:
    """An activation where `ACTIVATIONS[name]` wants it on the current mesh; unchanged without a mesh."""
    if (mesh := ambient()) is None:
        return x
    spec = ACTIVATIONS[name]
    spec = P(*map(_of_members, spec)) if _MEMBERS.get() else spec
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fitted(spec, x.shape, mesh)))


@contextlib.contextmanager
def members_as_rows() -> Iterator[None]:
    """In this block the rows [B * G] of a batch are members of groups: `sequence` shares them, not their tokens."""
    token = _MEMBERS.set(True)
    try:
        yield
    finally:
        _MEMBERS.reset(token)


def _of_members(axes: Any) -> Any:
    """One dimension's entry of `ACTIVATIONS`, for `members_as_rows`."""
    if axes == ROWS:
        return (*ROWS, "sequence")
    rest = tuple(name for name in ((axes,) if isinstance(axes, str) else axes or ()) if name != "sequence")
    return rest or None


def constrain_weights(tree: Any) -> Any:
    """Weights, gradients or optimizer state where `RULES` want them on the current mesh; unchanged without a mesh."""
    if (mesh := ambient()) is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))
