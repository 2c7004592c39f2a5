"""Hugging Face folders to our trees and back, and memories as one file with the official tensor names."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmem.backbones import registry
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import (
    causal_names,
    exported,
    llava_names,
    mlp_names,
    own_names,
    pvm_names,
    qwen2_5_vl_names,
    qwen2_vl_names,
    qwen3_vl_names,
)
from jaxmem.checkpoints.identity import backbone_identity, differences, memory_identity
from jaxmem.checkpoints.table import Table, View, expected, flatten, size, unflatten, write_tree
from jaxmem.checkpoints.weights import (
    INDEX,
    SHARDS,
    SINGLE,
    open_file,
    open_weights,
    progress,
    read_json,
    report,
    staged,
    write_file,
    write_json,
    write_weights,
)
from jaxmem.errors import CheckpointError, ConfigError

BACKBONE_TABLES: dict[str, Any] = {
    **{names.MODEL_TYPE: names for names in (qwen2_vl_names, qwen2_5_vl_names, qwen3_vl_names)},
    **dict.fromkeys(causal_names.MODEL_TYPES, causal_names),
    **dict.fromkeys(llava_names.MODEL_TYPES, llava_names),
}
"""Modules with `table` and `repeated` for each of their `LAYOUTS` of names; the first is written."""
MEMORY_TABLES: dict[str, Callable[[Any], Table]] = {
    **{names.NAME: names.table for names in (pvm_names, mlp_names)},
    **dict.fromkeys(own_names.NAMES, own_names.table),
}
MEMORY_WEIGHTS, MEMORY_CONFIG = "memory.safetensors", "memory.json"
SHARD_SIZE = 5_000_000_000


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder; of one with a memory (`exported`), its backbone's.

    Raises:
      CheckpointError: no such folder or file, or not JSON.
      ConfigError: a model type without a mapping table; the message lists those there are.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(Path(folder) / "config.json")
    if exported.is_exported(config):
        config = exported.backbone_of(config, f"{folder}/config.json")
    _known(config.get("model_type"), BACKBONE_TABLES, f"{folder}/config.json: model_type")
    return config


def _known(name: Any, choices: Mapping[str, Any], where: str) -> Any:
    """`choices[name]`, or a ConfigError that lists the choices."""
    if name not in choices:
        raise ConfigError(f"{where} {name!r} is not supported; supported: {', '.join(sorted(choices))}")
    return choices[name]


def load_backbone(
    folder: str | Path,
    config: BackboneConfig,
    shapes: Any = None,
    *,
    dtype: Any = None,
    sharding: Any = None,
    ignore: str | None = None,
) -> Any:
    """The `base` tree from a folder's safetensors, leaf by leaf, each straight to where it shall live.

    Args:
      folder: with `model.safetensors`, or shards and `model.safetensors.index.json`.
      config: what the folder holds.
      shapes: tree of ShapeDtypeStruct (dtypes are ignored); the backbone's own when None.
      dtype: of the leaves; None keeps what is stored.
      sharding: one jax Sharding for all leaves or a tree (or prefix tree) of them: each device's part is read alone.
        None places whole leaves on the default device.
      ignore: regular expression; tensors whose names match anywhere may be there without being read.

    Returns:
      A nested dict of jax arrays. The head of a tied model may be stored a second time if it equals the embedding.

    Raises:
      CheckpointError: see `open_weights`; tensors named by two layouts; or missing, unexpected or wrongly shaped
        tensors, all in one message.
    """
    names = _known(config.model_type, BACKBONE_TABLES, "model_type")
    shapes = registry.backbone(config.model_type).shapes(config) if shapes is None else shapes
    tensors = open_weights(folder)
    for pattern in filter(None, (ignore, getattr(names, "IGNORED", None))):
        tensors = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
    layout = _layout(folder, tensors, names, config, shapes)
    for name, original in names.repeated(config, layout).items():
        if name in tensors:
            _check_repeated(folder, tensors.pop(name), tensors.get(original), name, original)
    return load_tree(folder, tensors, names.table(config, layout), shapes, dtype=dtype, sharding=sharding)


def _layout(folder: Any, tensors: Mapping[str, View], names: Any, config: BackboneConfig, shapes: Any) -> Any:
    """By which of the family's layouts a folder names its tensors: the first when it holds none of theirs."""
    wanted = {layout: expected(names.table(config, layout), shapes).keys() for layout in names.LAYOUTS}
    best = max(wanted, key=lambda layout: sum(name in wanted[layout] for name in tensors))
    shared = set.intersection(*map(set, wanted.values()))
    left, groups = {name for name in tensors if name not in shared}, {}
    for layout in (best, *wanted):
        title = f"tensors named as {layout.text}.* and {layout.visual}.*"
        found = [name for name in tensors if name in left & wanted[layout]]
        left -= set(found)
        groups |= {title: found} if found else {}
    if len(groups) > 1:
        report(folder, groups, "A folder names all of its tensors by one layout; was it merged from two?")
    return best


def _check_repeated(folder: Any, tensor: View, original: View | None, name: str, source: str) -> None:
    """Raises CheckpointError unless a tensor that is stored twice is twice the same."""
    if original is None or tensor.shape != original.shape or not _equal(tensor, original):
        raise CheckpointError(
            f"{folder}: config.json ties {name} to {source}, but the two differ on disk; "
            "set tie_word_embeddings to false, or remove the stored copy"
        )


def _equal(one: View, two: View, rows: int = 4096) -> bool:
    """Are two matrices equal? They are read a few rows at a time."""
    parts = ((slice(start, start + rows), slice(None)) for start in range(0, one.shape[0], rows))
    return all(np.array_equal(one.read(part), two.read(part)) for part in parts)


def load_tree(
    where: Any, tensors: Mapping[str, View], table: Table, shapes: Any, *, dtype: Any = None, sharding: Any = None
) -> Any:
    """Our tree from their tensors by any mapping table; arguments as in `load_backbone`."""
    _compare(where, tensors, expected(table, shapes))
    if dtype is not None:
        tensors = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    targets = flatten(shapes)
    places = dict.fromkeys(targets) if sharding is None else flatten(jax.tree.broadcast(sharding, shapes))
    leaves = {}
    with progress(f"reading {Path(where).name}", sum(map(size, tensors.values()))) as advance:
        for rule in table:
            source = rule.read(tensors)
            leaves[rule.ours] = _place(source, places[rule.ours])
            advance(size(source))
    return unflatten({path: leaves[path] for path in targets})


def _compare(where: Any, tensors: Mapping[str, View], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one CheckpointError that lists all missing, unexpected and wrongly shaped tensors."""
    both = [(name, tensors[name].shape, shape) for name, shape in wanted.items() if name in tensors]
    report(
        where,
        {
            "missing tensors": [name for name in wanted if name not in tensors],
            "unexpected tensors": [name for name in tensors if name not in wanted],
            "wrongly shaped tensors": [f"{n} {has} (expected {want})" for n, has, want in both if has != want],
        },
        "Do the configuration and the weights belong to the same model?",
    )


def _place(source: View, sharding: Any) -> jax.Array:
    """A leaf on its devices, one piece after the other; the host keeps nothing of it once the runtime has its copy.

    A host reads the pieces of its own devices alone.
    """
    if sharding is None:
        placed = jax.device_put(source.read())
    else:
        holders: dict[tuple, list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(source.shape).items():
            box = tuple(part.indices(size)[:2] for part, size in zip(index, source.shape, strict=True))
            holders.setdefault(box, []).append(device)
        pieces = []
        for box, devices in holders.items():  # devices that hold the same piece share one read
            piece = source.read(slice(*bounds) for bounds in box)
            pieces += [jax.device_put(piece, device) for device in devices]
            jax.block_until_ready(pieces)
            del piece
            gc.collect(0)  # jaxlib drops finished host copies when python collects
        placed = jax.make_array_from_single_device_arrays(source.shape, sharding, pieces)
    jax.block_until_ready(placed)
    gc.collect(0)
    return placed


def save_backbone(
    folder: str | Path,
    base: Any,
    config: BackboneConfig,
    *,
    hf_config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Writes the `base` tree under the official names, one tensor on the host at a time, all files or none.

    Args:
      folder: made when it does not exist.
      base: tree of arrays; where several hosts hold it, all of them call this, and the first one writes.
      config: of the tree.
      hf_config: written as `config.json` when given (what `read_config` returned).
      dtype: of the tensors on disk; None keeps the leaves' own.
      max_shard_size: bytes per file; more makes several files and `model.safetensors.index.json`.
      overwrite: replace weights that the folder already holds.

    Raises:
      CheckpointError: the folder holds weights.
      ValueError: the tree is not the one that `config` describes.
    """
    folder, names = Path(folder), _known(config.model_type, BACKBONE_TABLES, "model_type")
    if not overwrite and any(path for pattern in (SINGLE, INDEX, SHARDS) for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder}: holds weights already; choose another folder or allow overwriting")
    tensors = _tensors(names.table(config), base, dtype)
    with staged(folder, (INDEX, SINGLE, SHARDS)) as stage:
        write_weights(stage, tensors, max_shard_size)
        if hf_config is not None:
            write_json(stage / "config.json", hf_config)


def _tensors(table: Table, tree: Any, dtype: Any) -> list[tuple[str, View]]:
    """Names and unread tensors of a tree."""
    return [(name, tensor if dtype is None else tensor.cast(dtype)) for name, tensor in write_tree(table, tree)]


def save_memory(folder: str | Path, params: Any, config: Any, backbone: BackboneConfig) -> None:
    """Writes a memory under its official names to `memory.safetensors`, and its settings to `memory.json`.

    Args:
      folder: made when it does not exist; an older memory in it is replaced.
      params: tree of one memory.
      config: the memory's frozen dataclass with its field `name`.
      backbone: what the memory was trained on.
    """
    table = _known(config.name, MEMORY_TABLES, "memory")(config)
    tensors = _tensors(table, params, None)
    about = {"format": 1, "memory": config.name, "config": memory_identity(config)}
    with staged(Path(folder), (MEMORY_CONFIG, MEMORY_WEIGHTS)) as stage:
        write_file(stage / MEMORY_WEIGHTS, tensors)
        write_json(stage / MEMORY_CONFIG, about | {"backbone": backbone_identity(backbone)})


def read_memory_config(folder: str | Path, backbone: BackboneConfig | None = None) -> tuple[str, dict[str, Any]]:
    """Name and settings of the memory in a folder (JSON values: tuples are lists).

    Raises:
      CheckpointError: no or a damaged `memory.json`, or a memory made for another backbone than `backbone`.
    """
    path = Path(folder) / MEMORY_CONFIG
    about = read_json(path)
    if absent := [key for key in ("memory", "config", "backbone") if key not in about]:
        raise CheckpointError(f"{path}: has no {', '.join(absent)}; was it written by jaxmem?")
    if backbone is not None:
        other = differences(about["backbone"], backbone_identity(backbone))
        report(path, {"made for another backbone": other}, "Load the backbone that it was trained on.")
    return about["memory"], about["config"]


def load_memory(
    folder: str | Path, config: Any, backbone: BackboneConfig, shapes: Any, *, dtype: Any = None, sharding: Any = None
) -> Any:
    """The parameters of a memory from `memory.safetensors`.

    Args:
      folder: with `memory.safetensors` and `memory.json`.
      config: the memory to load; switches without influence on tensors (visibility, ...) may differ from the stored.
      backbone: what it shall run on.
      shapes: tree of ShapeDtypeStruct, as `jax.eval_shape` of the memory's `init` gives.
      dtype, sharding: as in `load_backbone`.

    Raises:
      CheckpointError: another memory, another backbone, or tensors that do not fit.
    """
    name, _ = read_memory_config(folder, backbone)
    if name != config.name:
        raise CheckpointError(f"{folder}: holds the memory {name!r}, asked for {config.name!r}")
    path = Path(folder) / MEMORY_WEIGHTS
    table = _known(name, MEMORY_TABLES, f"{folder}: memory")(config)
    return load_tree(path, open_file(path), table, shapes, dtype=dtype, sharding=sharding)
