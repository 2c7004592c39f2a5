"""CoMEM in the layouts of its paper's own code, both ways: what is trained as an adapter folder, or whole models.

`write` and `read` know adapter folders (see `comem_layout`); `read` takes a merged folder too and finds the factors in
it. `write_merged` and `read_merged` keep whole models as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.api import Model
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import comem_names, peft
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE, load_tree
from jaxmem.checkpoints.table import Table, View, expected, write_tree
from jaxmem.checkpoints.weights import SINGLE, read_json, report, write_file, write_json
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export import comem_layout as layout
from jaxmem.export import comem_merged, hf
from jaxmem.export.comem_layout import INFERENCE, OWN, PEFT
from jaxmem.export.comem_merged import read_merged, write_merged
from jaxmem.memory import comem
from jaxmem.memory.comem import CoMEMConfig

__all__ = ["read", "read_merged", "write", "write_merged"]


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes an adapter folder: what is trained, and no backbone.

    The adapter fits the backbone that reads items as transformers holds it in memory. Its targets are one pattern of
    whole names: by suffixes, as released, it would act in every copy of the backbone.

    Args:
      model: with a CoMEM.
      folder: exists and is empty.
      dtype: of all tensors; None keeps the stored ones.
      max_shard_size: without influence; neither PEFT nor the paper's code reads these files in parts.

    Raises:
      ConfigError: no CoMEM, or one with a map behind its Q-Former, which the layout has no name for.
    """
    config, backbone = layout.reader_of(model)
    params = model.memory[config.name]
    if config.kernels:
        table = comem_names.encoder(config, backbone, PEFT)
        write_file(folder / peft.WEIGHTS, hf.cast(write_tree(table, {"encoder": params["encoder"]}), dtype))
        origin = hf.origin(model, model.encoder_folder)
        write_json(folder / peft.CONFIG, _settings(config, table) | {"base_model_name_or_path": origin})
    own = write_tree(comem_names.q_former(config.q_former), {"q_former": params["q_former"]})
    write_file(folder / layout.Q_FORMER, hf.cast(own, dtype))
    kind = params["q_former"]["latents"].dtype if dtype is None else dtype
    write_json(folder / layout.ABOUT, layout.about(config, backbone, kind))


def _settings(config: CoMEMConfig, table: Table) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    stems = {rule.theirs.removeprefix(PEFT).rpartition(".lora_")[0] for rule in table}
    return peft._PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": "|".join(re.escape(stem).replace(r"\{i\}", r"\d+") for stem in sorted(stems)),
    }


def read(
    source: str | Path,
    backbone: BackboneConfig,
    base: Any,
    *,
    keep_model_inf_delta: bool = False,
    allow_pickle: bool = False,
    **settings: Any,
) -> tuple[CoMEMConfig, Any]:
    """A CoMEM from an adapter folder or a merged one.

    Args:
      source: the folder.
      backbone, base: the model that reads items, and its weights before training.
      keep_model_inf_delta: keep what the released code trained, unmeant, in the model that answers. Refused: that model
        has no factors here; `read_merged` takes a merged one as it is.
      allow_pickle: open pickled files (tensors alone are read).
      **settings: of CoMEMConfig, for what a released folder does not say: depth, heads; of a merged one rank, alpha.

    Returns:
      Its settings, and float32 parameters.

    Raises:
      CheckpointError: no folder; no Q-Former there, or an untrained one; no encoder, or one that does not fit the
        backbone; a pickle that may not be opened.
      ConfigError: `keep_model_inf_delta`.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if keep_model_inf_delta:
        raise ConfigError(
            f"{folder}: keep_model_inf_delta: the model that answers cannot have factors of its own beside a CoMEM;"
            " leave it out (a warning says how much it would change), or read a merged folder by read_merged"
        )
    adapter, merged = layout.adapter(folder, allow_pickle), layout.merged(folder, allow_pickle)
    own = layout.own(folder, [adapter, merged], allow_pickle)
    given = layout.sizes(folder, own) | layout.noted(folder, backbone) | settings
    if adapter:
        given = {"parts": _parts(backbone, adapter)} | given | _factors_are(folder)
    elif given.get("rank", 16) and not merged:
        raise CheckpointError(
            f"{folder}: holds a Q-Former, and of the encoder neither factors ({peft.WEIGHTS}) nor weights ({SINGLE});"
            " if it is the backbone itself, say rank=0"
        )
    config = layout.create(folder, backbone, given)
    params = layout.q_former(folder, own, config)
    if adapter:
        params |= _factors(folder, adapter, config, backbone)
        _warn_of_trained(folder, adapter, config)
    elif config.rank:
        params |= comem_merged.recovered(folder, merged, config, backbone, base)
    return config, params


def _factors_are(folder: Path) -> dict[str, Any]:
    """Rank, alpha and dropout of an adapter; CheckpointError when it is more than plain LoRA and a saved Q-Former."""
    path = folder / peft.CONFIG
    config, plain = read_json(path), {key: value for key, value in peft._PLAIN.items() if key != "modules_to_save"}
    odd = [f"{key} = {config[key]!r}" for key, value in plain.items() if config.get(key) and config[key] != value]
    odd += [f"peft_type = {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    odd += [f"{key} is missing" for key in ("r", "lora_alpha") if key not in config]
    report(path, {"settings that are not plain LoRA": odd}, "Merge this adapter in torch, and read the merged folder.")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return {"rank": rank, "alpha": alpha, "dropout": float(config.get("lora_dropout", 0.0))}


def _tables(config: CoMEMConfig, backbone: BackboneConfig) -> list[Table]:
    """The rules of an encoder's factors, as modules are called in memory now and in other releases."""
    layouts = reversed(BACKBONE_TABLES[backbone.model_type].LAYOUTS)
    return [comem_names.encoder(config, backbone, "", one) for one in layouts]


def _parts(backbone: BackboneConfig, tensors: Mapping[str, View]) -> tuple[str, ...]:
    """Those of the backbone's parts that have factors in an adapter; what the backbone lacks is not missed."""

    def held(part: str) -> bool:
        config = comem.create(backbone, parts=(part,))
        shapes = layout.shapes(config, "encoder")
        wanted = [name for table in _tables(config, backbone) for name in expected(table, shapes)]
        return not wanted or any(name in tensors for name in wanted)

    return tuple(part for part in comem.PARTS if held(part))


def _factors(
    folder: Path, tensors: Mapping[str, View], config: CoMEMConfig, backbone: BackboneConfig
) -> dict[str, Any]:
    """{"encoder": float32 factors}."""
    shapes = layout.shapes(config, "encoder")
    table = max(_tables(config, backbone), key=lambda one: sum(name in tensors for name in expected(one, shapes)))
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(INFERENCE) and OWN not in name}
    return load_tree(folder, own, table, shapes, dtype=jnp.dtype("float32"))


def _warn_of_trained(folder: Path, tensors: Mapping[str, View], config: CoMEMConfig) -> None:
    """Warns of factors in the model that answers: the released code trains some, unmeant."""
    ups = [name for name in tensors if name.startswith(INFERENCE) and name.endswith(".lora_B.weight")]
    if not ups:
        return
    wide = lambda name: tensors[name].read().astype(np.float32)  # noqa: E731
    most = max(float(np.abs(wide(up) @ wide(up.replace(".lora_B.", ".lora_A."))).max()) for up in ups)
    what = f"{sum(name.startswith(INFERENCE) for name in tensors)} tensors of factors"
    comem_merged.warn_of_left_out(folder, what, most * config.alpha / config.rank)
