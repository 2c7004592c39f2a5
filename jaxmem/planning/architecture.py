"""What a configuration trains, before any of it is there: the backbone by its folder or name, and the memory."""

from __future__ import annotations

from pathlib import Path

from jaxmem import api
from jaxmem.backbones import registry
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.published import PUBLISHED
from jaxmem.checkpoints import huggingface
from jaxmem.config import suggestion
from jaxmem.errors import ConfigError
from jaxmem.memory.registry import memory as memory_module
from jaxmem.model import Spec
from jaxmem.training.settings import TrainConfig


def backbone_of(config: TrainConfig) -> BackboneConfig:
    """The architecture of a configuration's backbone, from its folder or, before it is there, by its name.

    Raises:
      ConfigError: there is no such folder, and the name is none of the published ones.
    """
    return _architecture(config.backbone or api.TINY, "config.backbone")


def _architecture(given: str | Path, where: str) -> BackboneConfig:
    folder = Path(given)
    if folder.is_dir():
        return registry.config_from_hf(huggingface.read_config(folder))
    if folder.name in PUBLISHED:
        return PUBLISHED[folder.name]
    near = suggestion(folder.name, PUBLISHED)
    raise ConfigError(f"{where}: no folder {str(given)!r}, and it is no name that can be planned{near}")


def spec_of(config: TrainConfig, backbone: BackboneConfig) -> Spec:
    """What a configuration computes: a memory that is still to be trained is planned as the published PVM."""
    if config.memory_folder is not None and Path(config.memory_folder).is_dir():
        name, settings = huggingface.read_memory_config(config.memory_folder, backbone)
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    elif config.memory is None and config.memory_folder is None:
        return Spec(backbone)
    else:
        settings = dict(config.memory or {"name": "pvm"})
        name = settings.pop("name")
    if config.encoder and name == "comem":
        settings["encoder"] = _architecture(config.encoder, "config.encoder")
    return Spec(backbone, (memory_module(name).create(backbone, **settings),))
