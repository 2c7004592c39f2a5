"""VisMem in the layouts of its paper's own code, both ways.

That code saves `main.pt`: a pickle of {"vismem_state": a state dict of memory and backbone, "config": settings}.
`vismem.safetensors` holds what belongs to the memory alone under the same names. See `vismem_layout` for the names.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.adapters import lora
from jaxmem.api import Model
from jaxmem.backbones import registry
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import peft
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE, load_tree
from jaxmem.checkpoints.identity import memory_identity
from jaxmem.checkpoints.table import View
from jaxmem.checkpoints.vismem_names import ADAPTERS, parted
from jaxmem.checkpoints.weights import SINGLE, open_file, read_json, report, write_file, write_json
from jaxmem.data.control import with_control_tokens
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import hf
from jaxmem.export import vismem_layout as layout
from jaxmem.export.pickles import PICKLES, open_pickle
from jaxmem.export.vismem_layout import BASE, STYLES
from jaxmem.memory import vismem
from jaxmem.memory.vismem import VisMemConfig

MAIN, SLIM, SETTINGS = "main.pt", "vismem.safetensors", "vismem.json"
_STATE = "vismem_state"
_OF_BACKBONE = ("width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "tied", "vision_start", "vision_end")
"""Settings that follow from the backbone."""


def write(
    model: Model,
    folder: Path,
    *,
    prefix_style: str = "nested",
    dtype: Any = None,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes all that the paper's code and PEFT read.

    These are `main.pt`; `vismem.safetensors`, and its settings in `vismem.json`; PEFT's folders `short_former` and
    `long_former`; and the tokenizer with the control tokens. In `main.pt` the control tokens' rows have the number
    format of the backbone. While it is written, its tensors also lie in a file beside it, from which torch maps them.

    Args:
      model: a Qwen-VL with a VisMem and without LoRA factors of its own.
      folder: exists and is empty.
      prefix_style: "nested", or "flat" for transformers before 4.52.
      dtype: of the tensors in `main.pt` and `vismem.safetensors`; None keeps the stored ones.
      max_shard_size: without influence; that code reads no parts.

    Raises:
      ConfigError: another backbone or memory, settings without a place in this layout, or no torch.
    """
    config, (torch, load_file) = _check(model, prefix_style), _torch()
    backbone, params, style = model.spec.backbone, model.memory[config.name], STYLES[prefix_style]
    whole = layout.once(config, backbone, model.base, params, style)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        write_file(Path(aside) / SINGLE, hf.cast(whole.items(), dtype))
        mapped = load_file(Path(aside) / SINGLE)
        state = {name: mapped[name] for name in whole}
        if config.tied:
            state[f"{BASE}{style.head}"] = state[f"{BASE}{style.text}.embed_tokens.weight"]
        torch.save({_STATE: layout.twice(state), "config": _yaml(config)}, folder / MAIN)
        del mapped, state
    write_file(folder / SLIM, hf.cast(layout.slim(config, backbone, params, style).items(), dtype))
    write_json(folder / SETTINGS, memory_identity(config))
    for name, base in formers(model, config).items():
        peft.save_adapter(folder / name, base, backbone, hf.origin(model))
    with_control_tokens(model.processor.tokenizer).save_pretrained(str(folder))


def _check(model: Model, prefix_style: str) -> VisMemConfig:
    """The model's VisMem; ConfigError where the paper's code has no such model."""
    backbone, memories = model.spec.backbone, model.spec.memories
    config = memories[0] if len(memories) == 1 else None
    if not isinstance(config, VisMemConfig):
        held = " and ".join(memory.name for memory in memories) or "no memory"
        raise ConfigError(f"export --to=original: there is a layout for one VisMem, the model has {held}")
    if prefix_style not in STYLES:
        raise ConfigError(f"export --to=original: prefix_style {prefix_style!r} is none of {', '.join(STYLES)}")
    if STYLES[prefix_style] not in BACKBONE_TABLES[backbone.model_type].LAYOUTS:
        raise ConfigError(f"export --to=original: a {backbone.model_type} has no names in the style {prefix_style!r}")
    if lora.has_lora(model.base):
        raise ConfigError("export --to=original: the backbone has LoRA factors of its own; export it without them")
    if config.out_norm:
        raise ConfigError("export --to=original: the paper's code has no out_norm; use --to=hf")
    return config


def _torch() -> tuple[Any, Any]:
    """The module, which alone writes its format, and what maps a file of safetensors for it."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError("export --to=original: main.pt is written by torch; pip install 'jaxmem[torch]'") from error
    return torch, load_file


def _yaml(config: VisMemConfig) -> dict[str, Any]:
    """What the paper's code notes of a memory's settings."""
    builder = {"num_layers": config.builder_layers, "num_heads": config.builder_heads, "ff_mult": config.builder_ff}
    return {
        "vismem": {
            "query_len": config.queries,
            "short_mem_len": config.short,
            "long_mem_len": config.long,
            "query_builder": {**builder, "dropout": 0.0},
            "lora": {"r": config.rank, "alpha": config.alpha, "dropout": 0.0},
            "max_prompt_hidden": config.text_cap,
        }
    }


def formers(model: Model, config: VisMemConfig) -> dict[str, Any]:
    """By the folder of its adapter: the backbone's weights with the factors of one memory type beside them."""
    plain = lora.strip(model.base)
    return {
        name: lora.place(_factors(config, model.memory[config.name][kind]), plain) for kind, name in ADAPTERS.items()
    }


def _factors(config: VisMemConfig, tree: Any) -> dict[str, dict[str, Any]]:
    """A former's factors by the paths of their kernels, as `lora.place` takes them."""
    scale = jnp.full(config.depth, config.alpha / config.rank, jnp.float32)
    return {
        f"layers/{group}/{kernel}": {**leaves, "lora_scale": scale}
        for group, kernels in tree["layers"].items()
        for kernel, leaves in kernels.items()
    }


def read(
    source: str | Path, backbone: BackboneConfig, base: Any = None, *, allow_pickle: bool = False, **settings: Any
) -> tuple[VisMemConfig, Any]:
    """A VisMem from `main.pt` or `vismem.safetensors`, in the names of any release of transformers.

    Args:
      source: either file, or a folder with the second or the first.
      backbone: that it belongs to.
      base: its weights: the backbone in a `main.pt` must be the same. Rows of its tables that were trained along, which
        have no place here, are counted in a warning.
      allow_pickle: open pickled files (tensors alone are read).
      **settings: of VisMemConfig, for what tensors do not show, such as `alpha`. What is not given stands in
        `vismem.json` beside the file, or else is that of the preset "official"; a lone `vismem.safetensors` needs
        `vocab`.

    Returns:
      Its settings, and float32 parameters.

    Raises:
      CheckpointError: no VisMem there; formers that are no adapters; names of one tensor with different numbers;
        missing, unexpected or wrongly shaped tensors; another backbone; a pickle that may not be opened.
    """
    path, tensors = _open(Path(source), allow_pickle)
    tensors = layout.named_once(path, tensors)
    style = layout.style_of(path, tensors, backbone)
    embed, head = f"{BASE}{style.text}.embed_tokens.weight", f"{BASE}{style.head}"
    config = _config(path, backbone, tensors, tensors.get(embed), settings)
    if any(name.startswith(BASE) and ".lora_" not in name for name in tensors):
        known = registry.backbone(backbone.model_type).shapes(backbone) if base is None else lora.strip(base)
        wanted = layout.once(config, backbone, known, _shapes(config), style)
        if config.tied and head not in tensors:
            del wanted[head]
        _compare(path, tensors, wanted)
        if config.tied and head in tensors and not layout.equal(tensors[head], tensors[embed]):
            raise CheckpointError(f"{path}: the backbone ties {head} to {embed}, but the two differ")
        if base is not None:
            _check_backbone(path, tensors, wanted, config, (embed,) if config.tied else (embed, head))
        tensors["mem_embed"] = layout.last_rows(tensors[embed])
        tensors |= {} if config.tied else {"mem_unembed": layout.last_rows(tensors[head])}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(BASE) or ".lora_" in name}
    _compare(path, tensors, layout.slim(config, backbone, _shapes(config), style))
    table = layout.table(config, backbone, style)
    return config, load_tree(path, parted(tensors), table, _shapes(config), dtype=jnp.dtype("float32"))


def _open(source: Path, allow_pickle: bool) -> tuple[Path, dict[str, View]]:
    """The file, and its tensors."""
    path = source
    if source.is_dir():
        there = [source / name for name in (SLIM, MAIN) if (source / name).is_file()]
        if not there:
            raise CheckpointError(f"{source}: holds neither {SLIM} nor {MAIN} (released code saves epoch0/{MAIN})")
        path = there[0]
    if path.suffix not in PICKLES:
        return path, open_file(path)
    found, prefix = open_pickle(path, allow_pickle, nested=True), f"{_STATE}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    return path, inside or found


def _config(
    path: Path, backbone: BackboneConfig, tensors: Mapping[str, View], embed: View | None, settings: dict[str, Any]
) -> VisMemConfig:
    """Sizes by shapes, the rest as `read` says."""
    noted = path.parent / SETTINGS
    found: dict[str, Any] = read_json(noted) if noted.is_file() else {"preset": "official"}
    found = {key: value for key, value in found.items() if key not in _OF_BACKBONE} | layout.sizes(path, tensors)
    found |= ({} if embed is None else {"vocab": embed.shape[0] - 4}) | settings
    if "vocab" not in found:
        raise CheckpointError(f"{path}: does not show how many tokens there are; pass vocab=len(tokenizer)")
    try:
        return vismem.create(backbone, **found)
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be used: {error}") from error


def _shapes(config: VisMemConfig) -> Any:
    return jax.eval_shape(lambda: vismem.init(jax.random.key(0), config))


def _compare(path: Path, tensors: Mapping[str, View], wanted: Mapping[str, View]) -> None:
    """Raises one CheckpointError that lists all missing, unexpected and wrongly shaped tensors."""
    shapes = {name: (tensors[name].shape, view.shape) for name, view in wanted.items() if name in tensors}
    report(
        path,
        {
            "missing tensors": [name for name in wanted if name not in tensors],
            "unexpected tensors": [name for name in tensors if name not in wanted],
            "wrongly shaped tensors": [
                f"{n} {has} (expected {want})" for n, (has, want) in shapes.items() if has != want
            ],
        },
        "Do the backbone and the memory belong together?",
    )


def _check_backbone(
    path: Path, tensors: Mapping[str, View], wanted: Mapping[str, View], config: VisMemConfig, tables: tuple[str, ...]
) -> None:
    """Raises CheckpointError for another backbone; warns of rows of its `tables` that were trained along."""
    own = [name for name in wanted if name.startswith(BASE) and ".lora_" not in name]
    fixed = [name for name in own if not name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    differing = [name for name in fixed if not layout.equal(tensors[name], wanted[name])]
    report(path, {"tensors of another backbone": differing}, "Load the backbone that it was trained on.")
    for name in tables:
        if count := layout.differing_rows(tensors[name], wanted[name], config.vocab):
            warnings.warn(
                f"{path}: {count} of {config.vocab} rows of {name} are not the backbone's: they were trained along (by"
                " weight decay, in the released code); the backbone's are used",
                stacklevel=3,
            )
