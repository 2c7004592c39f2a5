"""Folders of PEFT adapters: what was trained of a backbone's kernels and tokens, beside a memory's own weights.

    adapter_config.json, adapter_model.safetensors   the LoRA factors of the model that answers
    encoder/                                          CoMEM: those of the encoder, and the Q-Former beside them
    short_former/, long_former/                       VisMem: those of the formers
    control_tokens/                                   VisMem: rows of the four tokens, as trainable tokens
    memory.safetensors                                everything else, under the names of `--to=hf` without "memory."

Every one of these folders loads by `PeftModel.from_pretrained(base, folder)`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.adapters import lora
from jaxmem.api import Model
from jaxmem.checkpoints import peft
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE
from jaxmem.checkpoints.memory_names import TORCH_TABLES
from jaxmem.checkpoints.table import View, view, write_tree
from jaxmem.checkpoints.weights import open_file, write_file, write_json
from jaxmem.errors import ConfigError
from jaxmem.export import hf, original_comem, original_vismem, prompts
from jaxmem.export.prove import KEYS, Proof, reload
from jaxmem.memory import comem, vismem
from jaxmem.memory.vismem import VisMemConfig

CONTROL_TOKENS, ENCODER, MEMORY = "control_tokens", "encoder", "memory.safetensors"
_OWN = "memory."


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes the adapters; factors are float32 whatever `dtype` says, which is the memory's.

    Raises:
      ConfigError: a model with neither factors nor a memory, or a memory that has no form in torch.
    """
    memories = model.spec.memories
    if not memories and not lora.has_lora(model.base):
        raise ConfigError("export --to=peft: the model has neither LoRA factors nor a memory")
    if odd := [memory.name for memory in memories if memory.name not in TORCH_TABLES]:
        raise ConfigError(f"export --to=peft: {', '.join(odd)} has no torch module")
    for name, adapted in adapters(model).items():
        if name == ENCODER:
            (folder / name).mkdir()
            original_comem.write(model, folder / name, dtype=dtype)
        else:
            peft.save_adapter(folder / name, adapted.base, model.spec.backbone, hf.origin(model))
    if memories:
        write_file(folder / MEMORY, hf.cast(_own(model), dtype))
    if model.spec.vismem is not None:
        _write_control_tokens(folder / CONTROL_TOKENS, model, model.spec.vismem)
    hf.write_beside(model, folder)


def adapters(model: Model) -> dict[str, Model]:
    """By folder ("" is the outer one): the backbone as it computes with one adapter."""
    bare, found = model.without_memory(), {}
    with_base = lambda base: dataclasses.replace(bare, base=base)  # noqa: E731
    if lora.has_lora(bare.base):
        found[""] = bare
    if (config := model.spec.vismem) is not None:
        found |= {name: with_base(base) for name, base in original_vismem.formers(model, config).items()}
    if (config := model.spec.comem) is not None and config.kernels:
        found[ENCODER] = with_base(comem.weights(config, model.base, model.memory[config.name]))
    return found


def _own(model: Model) -> list[tuple[str, View]]:
    """Names and tensors of the memory that are no adapter's."""
    found: list[tuple[str, View]] = []
    for memory in model.spec.memories:
        tensors = write_tree(TORCH_TABLES[memory.name](memory, model.spec.backbone), model.memory[memory.name])
        found += [(name.removeprefix(_OWN), tensor) for name, tensor in tensors if ".lora_" not in name]
    return found


def _write_control_tokens(folder: Path, model: Model, config: VisMemConfig) -> None:
    """The rows of the control tokens as an adapter of PEFT's trainable tokens, which keeps rows whole."""
    names = BACKBONE_TABLES[model.spec.backbone.model_type]
    rules = names.table(model.spec.backbone, names.LAYOUTS[-1])
    modules = {rule.ours: rule.theirs.removesuffix(".weight") for rule in rules if rule.ours in ("embed", "head")}
    rows = {"embed": "embed"} | ({} if config.tied else {"head": "unembed"})
    stored = model.memory[config.name]["rows"]
    folder.mkdir()
    write_file(
        folder / peft.WEIGHTS,
        [
            (f"base_model.model.{modules[ours]}.trainable_tokens_delta", view(vismem.table(stored[name])))
            for ours, name in rows.items()
        ],
    )
    about = {"peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "inference_mode": True, "init_weights": True}
    about |= {"token_indices": list(range(config.vocab, config.vocab + 4)), "base_model_name_or_path": hf.origin(model)}
    write_json(folder / peft.CONFIG, about | {"target_modules": [modules[ours].rpartition(".")[2] for ours in rows]})


def prove(model: Model, folder: Path) -> Proof:
    """PEFT loads every adapter onto the backbone, which then says what it says here with the same factors; the memory's
    own tensors are read again and compared."""
    keys: dict[str, list[str]] = {key: [] for key in KEYS}
    asked: dict[str, dict[str, float]] = {}
    for name, adapted in adapters(model).items():
        with tempfile.TemporaryDirectory() as reference:
            prompts.reference(adapted, Path(reference))
            report = reload("jaxmem.export.reload", str(model.folder), reference, str(folder / name))
        keys = {key: [*keys[key], *(f"{name}/{one}" for one in report[key])] for key in KEYS}
        own = name or "adapter"
        asked |= {f"{prompt.partition('/')[0]}/{own}": found for prompt, found in report["prompts"].items()}
    if model.spec.vismem is not None:
        report = reload("jaxmem.export.reload", str(model.folder), "", str(folder / CONTROL_TOKENS))
        keys = {key: [*keys[key], *(f"{CONTROL_TOKENS}/{one}" for one in report[key])] for key in KEYS}
    if model.spec.memories:
        stored, own = open_file(folder / MEMORY), dict(_own(model))
        equal = lambda name: name in stored and np.array_equal(stored[name].read(), own[name].read())  # noqa: E731
        keys["changed"] = sorted({name for name in own if not equal(name)} | (stored.keys() - own.keys()))
    return Proof(keys, asked)
