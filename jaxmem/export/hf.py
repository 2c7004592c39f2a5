"""A folder that `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` loads with its memory.

Tensors have the names of transformers' modules in memory: code from a folder gets no renaming while it loads, and a
name that fits nothing leaves its module at random values. The model type is one of its own: a reader that does not run
the folder's code is refused instead of getting the backbone without its memory.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmem.adapters import lora
from jaxmem.api import Model
from jaxmem.checkpoints import comem_names, huggingface
from jaxmem.checkpoints.huggingface import BACKBONE_TABLES, SHARD_SIZE
from jaxmem.checkpoints.identity import memory_identity
from jaxmem.checkpoints.memory_names import TORCH_TABLES
from jaxmem.checkpoints.table import View, view, write_tree
from jaxmem.checkpoints.weights import read_json, write_json, write_weights
from jaxmem.data.control import with_control_tokens
from jaxmem.errors import ConfigError
from jaxmem.export import llava, question

CLASS = "JaxMemForConditionalGeneration"
FAMILIES: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
}
"""What transformers' class names begin with, by model type."""
BESIDE = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of a backbone's folder that belong to what is exported, too."""
_CODE = importlib.resources.files("jaxmem") / "export" / "torch_code"
_STALE = ("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


def write(model: Model, folder: Path, *, dtype: Any = None, max_shard_size: int = SHARD_SIZE) -> None:
    """Writes everything but the proof.

    Args:
      model: a backbone with one memory; or a LLaVA-style one whose projector transformers lacks. LoRA factors of the
        backbone are added into its weights on the way.
      folder: exists and is empty.
      dtype: of all tensors; None keeps the stored ones.
      max_shard_size: bytes per file.

    Raises:
      ConfigError: see `check`.
    """
    check(model)
    config = model.spec.backbone
    names = BACKBONE_TABLES[config.model_type]
    stored = [*write_tree(names.table(config, names.LAYOUTS[-1]), merged(model.base))]
    if not llava.needs_own(config, model.spec.memories):
        stored += llava.unread(config, model.folder, names.LAYOUTS[-1])
    for memory in model.spec.memories:
        stored += write_tree(TORCH_TABLES[memory.name](memory, config), model.memory[memory.name])
    write_weights(folder, cast(stored, dtype), max_shard_size)
    write_json(folder / "config.json", _config(model, dtype))
    write_beside(model, folder)
    write_code(model, folder)


def check(model: Model) -> None:
    """Raises ConfigError for a model that has no form in torch, or needs none."""
    config, memories = model.spec.backbone, model.spec.memories
    if config.model_type not in FAMILIES:
        raise ConfigError(f"export --to=hf: {config.model_type} is a decoder alone; there are {', '.join(FAMILIES)}")
    if len(memories) > 1:
        raise ConfigError(f"export --to=hf: a folder holds one memory; this model has {len(memories)}")
    for memory in memories:
        if memory.name not in TORCH_TABLES:
            raise ConfigError(
                f"export --to=hf: {memory.name} has no torch module; there are {', '.join(sorted(TORCH_TABLES))}"
            )
    if model.spec.comem is not None:
        comem_names.check_exportable(model.spec.comem, config)
    reading = model.spec.vismem or model.spec.comem
    if reading is not None and lora.has_lora(model.base):
        raise ConfigError(
            f"export --to=hf: {reading.name} reads with the backbone alone, without the LoRA factors that would be"
            " added into it; export --to=peft keeps both"
        )
    if not memories and not llava.needs_own(config):
        raise ConfigError("export --to=hf: there is no memory to export; use --to=merged for a plain backbone")


def merged(base: Any) -> Any:
    """The backbone's weights with LoRA factors added, kernel by kernel and layer by layer, when they are read."""

    def add(node: dict[str, Any]) -> View:
        kernel, a, b, scale = (view(node[name]) for name in ("kernel", *lora.LEAVES))
        every = slice(0, a.shape[-1])

        def box(index: tuple[slice, ...]) -> np.ndarray:
            layers, rows, columns = index
            factors = a.box((layers, rows, every)), b.box((layers, every, columns))
            update = scale.box((layers,))[:, None, None] * np.matmul(*(part.astype(np.float32) for part in factors))
            return (kernel.box(index) + update).astype(kernel.dtype)

        return View(kernel.shape, kernel.dtype, box)

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" in node:
            return {name: leaf for name, leaf in node.items() if name not in lora.LEAVES} | {"kernel": add(node)}
        return {name: walk(child) for name, child in node.items()}

    return walk(base)


def cast(tensors: Iterable[tuple[str, View]], dtype: Any) -> list[tuple[str, View]]:
    """Names and tensors in another dtype; None keeps theirs."""
    return [(name, tensor if dtype is None else tensor.cast(dtype)) for name, tensor in tensors]


def _config(model: Model, dtype: Any) -> dict[str, Any]:
    """config.json: the backbone's, and what the folder's code must know."""
    hf = {key: value for key, value in huggingface.read_config(model.folder).items() if key not in _STALE}
    backbone, memories = model.spec.backbone, model.spec.memories
    about: dict[str, Any] = {"format": 1, "backbone": backbone.model_type}
    about["memory"] = next((memory_identity(memory) for memory in memories), None)
    if llava.needs_own(backbone, memories):
        about["tiles"] = llava.section(backbone.vision)
    if any(getattr(memory, "asks", False) for memory in memories):
        about["question"] = question.marks(model.processor)
    return hf | {
        "architectures": [CLASS],
        "auto_map": {
            "AutoConfig": "configuration_jaxmem.JaxMemConfig",
            "AutoModelForImageTextToText": f"modeling_jaxmem.{CLASS}",
        },
        "model_type": model_type(model),
        "jaxmem": about,
        **number_format(model, dtype),
    }


def origin(model: Model, folder: Path | None = None) -> str:
    """What a backbone calls itself on the Hub, else its folder's name; never a path of a machine."""
    folder = folder or model.folder
    named = str(huggingface.read_config(folder).get("_name_or_path") or "")
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else folder.resolve().name


def number_format(model: Model, dtype: Any) -> dict[str, str]:
    """What config.json says of the numbers."""
    return {"dtype": jnp.dtype(model.base["embed"].dtype if dtype is None else dtype).name}


def model_type(model: Model) -> str:
    """Such as "jaxmem_pvm_qwen3_vl"."""
    return "_".join(["jaxmem", *(memory.name for memory in model.spec.memories), model.spec.backbone.model_type])


def write_beside(model: Model, folder: Path) -> None:
    """Tokenizer, templates, image settings and generation settings: the backbone's, with a memory's tokens added."""
    for pattern in BESIDE:
        for file in sorted(model.folder.glob(pattern)):
            if file.is_file():
                shutil.copy(file, folder)
    family, settings = FAMILIES.get(model.spec.backbone.model_type), folder / "preprocessor_config.json"
    if family and settings.is_file():
        named = {"processor_class": f"{family}Processor"}
        write_json(settings, named | read_json(settings))  # the model type, which is the folder's own, says nothing
    if llava.needs_own(model.spec.backbone, model.spec.memories):
        llava.write_processor(folder, model.spec.backbone.model_type)
    if model.spec.vismem is not None:
        with_control_tokens(model.processor.tokenizer).save_pretrained(str(folder))


def write_code(model: Model, folder: Path) -> None:
    """The folder's own Python files: what the backbone is, the configuration, the memory."""
    config, memories = model.spec.backbone, model.spec.memories
    family, module, kind = FAMILIES[config.model_type], "transformers", None
    needed = [f"modeling_{memories[0].name if memories else 'backbone'}"]
    if llava.needs_own(config, memories):
        module, kind = f".{llava.CODE}", llava.CLASSES[config.model_type]
        needed += [llava.CODE, llava.PROCESSING]
    lines = [
        '"""What the memory was trained on, as transformers has it."""',
        "",
        f"from transformers import {family}Config as BackboneConfig",
        f"from {module} import {kind or f'{family}ForConditionalGeneration'} as Backbone",
        "",
        f'MODEL_TYPE = "{model_type(model)}"',
        "",
    ]
    (folder / "backbone_jaxmem.py").write_text("\n".join(lines), encoding="utf-8")
    for name in needed:
        _copy(folder, f"{name}.py", "modeling_jaxmem.py" if name.startswith("modeling_") else f"{name}.py")


def _copy(folder: Path, source: str, target: str) -> None:
    """A file of the folder's code, and those that it imports."""
    text = (_CODE / source).read_text(encoding="utf-8")
    (folder / target).write_text(text, encoding="utf-8")
    for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
        if (_CODE / f"{name}.py").is_file() and not (folder / f"{name}.py").exists():
            _copy(folder, f"{name}.py", f"{name}.py")
