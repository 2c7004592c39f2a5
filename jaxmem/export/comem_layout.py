"""What CoMEM's layouts share: where a folder of its paper's code keeps which tensors, the Q-Former, what is noted.

- An adapter folder has the encoder's LoRA factors as PEFT saves them. The Q-Former stands among them (a training
  checkpoint of the released code), in a file of its own (as written here), or in a pickled `non_lora_state_dict.bin`.
- A merged folder has whole models: the encoder with its factors folded in (`visual.*`, `model.*`, `lm_head.*`), the
  model that answers (`model_inf.*`) and the Q-Former (`knowledge_processor.*`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.api import Model
from jaxmem.backbones.config import BackboneConfig
from jaxmem.checkpoints import comem_names, peft
from jaxmem.checkpoints.huggingface import load_tree
from jaxmem.checkpoints.identity import backbone_identity, differences, memory_identity
from jaxmem.checkpoints.table import View
from jaxmem.checkpoints.weights import INDEX, SINGLE, open_file, open_weights, read_json, report
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.export.pickles import open_pickle
from jaxmem.memory import comem
from jaxmem.memory.comem import CoMEMConfig

Q_FORMER, ABOUT = "knowledge_processor.safetensors", "comem.json"
PICKLED, NON_LORA = "adapter_model.bin", "non_lora_state_dict.bin"
PEFT, INFERENCE, OWN = "base_model.model.", "model_inf.", f"{comem_names.Q_FORMER}."
"""In front of names: of what PEFT wraps, of the model that answers, of the Q-Former."""
HEADS = 16
"""Of the Q-Former in the paper's code; its tensors do not tell."""
_TRAINED, _UNTRAINED = "modules_to_save.default.", "original_module."
_TURNS = "<|im_start|>user\n{images}SUFFIX<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
_DERIVED = ("kernels", "width", "target_width", "encoder", "name")


def reader_of(model: Model) -> tuple[CoMEMConfig, BackboneConfig]:
    """A model's CoMEM, and the backbone that reads items; ConfigError where the layouts have no place for it."""
    config = model.spec.comem
    if config is None:
        raise ConfigError("export --to=original: the model has no CoMEM; attach or restore one")
    if config.target_width != config.width:
        raise ConfigError(
            f"export --to=original: behind this CoMEM's Q-Former stands a map from width {config.width} to"
            f" {config.target_width}, which the paper's code does not have"
        )
    return config, config.encoder or model.spec.backbone


def about(config: CoMEMConfig, backbone: BackboneConfig, dtype: Any) -> dict[str, Any]:
    """The content of `comem.json`: how an item is written, the order of items, the switches, sizes, the number format.

    Args:
      config: of the CoMEM.
      backbone: that reads items.
      dtype: of the tensors beside it.
    """
    return {
        "format": 1,
        "dtype": jnp.dtype(dtype).name,
        "template": _TURNS.replace("SUFFIX", config.suffix),
        "backbone": backbone_identity(backbone),
        "settings": {name: value for name, value in memory_identity(config).items() if name not in _DERIVED},
    }


def noted(folder: Path, backbone: BackboneConfig) -> dict[str, Any]:
    """The settings in a folder's `comem.json`, none without it; CheckpointError where it is of another backbone."""
    path = folder / ABOUT
    if not path.is_file():
        return {}
    content = read_json(path)
    other = differences(content.get("backbone", {}), backbone_identity(backbone))
    report(path, {"made for another backbone": other}, "Load the backbone that it was trained on.")
    settings = content.get("settings", {})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def adapter(folder: Path, allow: bool) -> dict[str, View]:
    """The tensors of a folder's adapter, without PEFT's prefix; none without one."""
    if not (folder / peft.CONFIG).is_file():
        return {}
    file = folder / peft.WEIGHTS
    tensors = open_file(file) if file.is_file() else open_pickle(folder / PICKLED, allow)
    return {name.removeprefix(PEFT).replace(".default.weight", ".weight"): t for name, t in tensors.items()}


def merged(folder: Path, allow: bool) -> dict[str, View]:
    """The tensors of a folder's whole models; none without them."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return open_weights(folder)
    files = sorted(folder.glob("pytorch_model*.bin"))
    return {name: tensor for file in files for name, tensor in open_pickle(file, allow).items()}


def own(folder: Path, sources: Sequence[Mapping[str, View]], allow: bool) -> dict[str, View]:
    """The tensors of a folder's Q-Former, by their bare names.

    Where a module was saved beside its untrained original, the trained copy is taken.

    Args:
      folder: with a file of the Q-Former alone, perhaps.
      sources: tensors that it may be among, in the order in which they are looked through; then come pickles.
      allow: open them.

    Raises:
      CheckpointError: there is no trained Q-Former.
    """
    if (folder / Q_FORMER).is_file():
        return open_file(folder / Q_FORMER)
    untrained = False
    for tensors in _in_turn(folder, sources, allow):
        named = {name.rpartition(OWN)[2]: tensor for name, tensor in tensors.items() if OWN in name}
        trained = {name.removeprefix(_TRAINED): t for name, t in named.items() if name.startswith(_TRAINED)}
        plain = {name: t for name, t in named.items() if not name.startswith((_TRAINED, _UNTRAINED))}
        if trained or plain:
            return trained or plain
        untrained = untrained or bool(named)
    held = f"the untrained copy of a Q-Former alone ({_UNTRAINED}*)" if untrained else f"no Q-Former ({OWN}*)"
    raise CheckpointError(
        f"{folder}: holds {held}, and a random one remembers nothing. The script of the released code that merges"
        f" vision-language models loses it: take the training checkpoint, with {peft.WEIGHTS} and {NON_LORA}"
    )


def _in_turn(folder: Path, sources: Sequence[Mapping[str, View]], allow: bool) -> Iterator[Mapping[str, View]]:
    """Where a Q-Former may be; the pickle is opened when it is nowhere else."""
    yield from sources
    if (folder / NON_LORA).is_file():
        yield open_pickle(folder / NON_LORA, allow)


def sizes(folder: Path, tensors: Mapping[str, View]) -> dict[str, Any]:
    """What a Q-Former's tensors say of the settings; how many passes share a block, and heads, they do not."""
    shared = "layers.0.to_q.weight" in tensors
    block = "layers" if shared else "layers.0"
    wanted = {"latents": 3, f"{block}.0.to_q.weight": 2, f"{block}.1.1.weight": 2}
    odd = [name for name, axes in wanted.items() if name not in tensors or len(tensors[name].shape) != axes]
    report(folder, {"missing tensors, or of another form": odd}, "Is it a whole Q-Former of the paper's code?")
    (_, latents, _), (inner, width), (hidden, _) = (tensors[name].shape for name in wanted)
    found = {"latents": latents, "heads": HEADS, "head_dim": max(1, inner // HEADS), "ff_mult": hidden // max(1, width)}
    if not shared:
        found["depth"] = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    return found | {"shared": shared}


def create(folder: Path, backbone: BackboneConfig, settings: Mapping[str, Any]) -> CoMEMConfig:
    """The CoMEM that a folder holds; CheckpointError where it cannot belong to the backbone."""
    try:
        return comem.create(backbone, **settings)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: cannot be used on {backbone.model_type}: {error}") from error


def shapes(config: CoMEMConfig, part: str) -> dict[str, Any]:
    """{part: the shapes of its parameters}, "q_former" or "encoder"."""
    return {part: jax.eval_shape(lambda: comem.init(jax.random.key(0), config)).get(part, {})}


def q_former(folder: Path, tensors: Mapping[str, View], config: CoMEMConfig) -> dict[str, Any]:
    """{"q_former": float32 parameters}; CheckpointError for missing, unexpected and wrongly shaped tensors."""
    table = comem_names.q_former(config.q_former)
    return load_tree(folder, tensors, table, shapes(config, "q_former"), dtype=jnp.dtype("float32"))
