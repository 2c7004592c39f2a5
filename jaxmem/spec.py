"""What is computed, without weights: a backbone and its memories as one hashable value."""

from __future__ import annotations

import dataclasses

from jaxmem.backbones.config import BackboneConfig
from jaxmem.memory import fastv
from jaxmem.memory.comem import CoMEMConfig
from jaxmem.memory.deepstack import DeepStackConfig
from jaxmem.memory.fastv import FastVConfig
from jaxmem.memory.mlp_branch import MLPConfig
from jaxmem.memory.pvm import PVMConfig
from jaxmem.memory.sva import SVAConfig
from jaxmem.memory.vision_remember import VisionRememberConfig
from jaxmem.memory.vismem import VisMemConfig

LookingConfig = VisionRememberConfig | DeepStackConfig | SVAConfig
MemoryConfig = PVMConfig | MLPConfig | VisMemConfig | CoMEMConfig | LookingConfig | FastVConfig


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is computed, without weights: hashable, a static argument of every compiled program."""

    backbone: BackboneConfig
    memories: tuple[MemoryConfig, ...] = ()

    def __post_init__(self) -> None:
        """Refuses memories that do not go together (ConfigError)."""
        fastv.among(self.memories)

    @property
    def first_port_layer(self) -> int:
        """The lowest decoder layer that a memory acts on: below it no gradient of a memory flows."""
        return min((layer for config in self.memories for layer in config.layers), default=0)

    @property
    def vismem(self) -> VisMemConfig | None:
        """The memory that the model calls while it generates, if there is one."""
        return next((config for config in self.memories if isinstance(config, VisMemConfig)), None)

    @property
    def comem(self) -> CoMEMConfig | None:
        """The memory that encodes knowledge items, if there is one."""
        return next((config for config in self.memories if isinstance(config, CoMEMConfig)), None)

    @property
    def looking(self) -> tuple[LookingConfig, ...]:
        """The memories that look at the tower's features again while prompts are read (`prompt_ports`)."""
        return tuple(config for config in self.memories if isinstance(config, LookingConfig))

    @property
    def levels(self) -> tuple[int, ...]:
        """The tower's hidden states that they look at; `Visual.levels` holds them by these numbers."""
        return tuple(sorted({level for config in self.looking for level in config.levels}))

    @property
    def vocab(self) -> int:
        """Tokens that can be sampled: the backbone's rows, or the tokenizer's and VisMem's four."""
        return self.backbone.text.vocab if self.vismem is None else self.vismem.vocab + 4
