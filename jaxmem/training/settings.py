"""The configuration of a training run as frozen dataclasses: what `configs/*.py` fill in, key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxmem.backbones.decoder import REMAT
from jaxmem.config import choose
from jaxmem.data.batching import Buckets
from jaxmem.data.boards import BoardDataset
from jaxmem.data.facts import FactDataset
from jaxmem.distributed.flags import PRESETS
from jaxmem.distributed.hosts import HostsConfig
from jaxmem.distributed.mesh import complete
from jaxmem.errors import ConfigError
from jaxmem.training.grpo_settings import GRPOConfig
from jaxmem.training.loop import LoopConfig
from jaxmem.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they are encoded.

    Attributes:
      source: "jsonl" reads `path`; "boards" composes digit boards, "facts" questions about items of digits and words.
      path: file with one {"messages": [...]} per line; image paths in it are relative to its folder.
      items: where the "items" of a record go: to CoMEM's "memory", into the "prompt" as text and images (retrieval-
        augmented generation), or nowhere ("none").
      item_turns: in the prompt each is a user turn of its own; otherwise they open the question's.
      facts: of the source "facts"; its `group` like that of boards.
      newline: supervise the line break behind each answer too, as CoMEM's recipe does.
      boards: of the source "boards"; when their `group` is 1 it becomes the batch size, so that all boards of a batch
        have one length.
      shuffle: a new order for every epoch (boards are random already and keep theirs).
      buckets: lengths that batches may have.
      max_rejected_fraction: share of the dataset whose rows may be unusable before the run stops.
      threads: that encode ahead; 0 encodes in the loop.
      prefetch: encoded batches that may wait.
    """

    source: Literal["jsonl", "boards", "facts"] = "jsonl"
    path: str = ""
    items: Literal["memory", "prompt", "none"] = "memory"
    item_turns: bool = True
    facts: FactDataset = FactDataset()
    newline: bool = False
    boards: BoardDataset = BoardDataset()
    shuffle: bool = True
    buckets: Buckets = Buckets()
    max_rejected_fraction: float = 0.0
    threads: int = 2
    prefetch: int = 8

    def __post_init__(self) -> None:
        if self.source == "jsonl" and not self.path:
            raise ConfigError('data.path is empty; name a file with one {"messages": [...]} per line')
        if not 0 <= self.max_rejected_fraction <= 1:
            raise ConfigError(f"data.max_rejected_fraction is a share, got {self.max_rejected_fraction}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices, by axes (jaxmem.distributed.mesh); one of the sizes may be -1: all devices that the others leave.

    Attributes:
      data: rows of a batch, on copies of the weights.
      fsdp: rows too, and weights cut to pieces.
      sequence: tokens of a row and completions of a group, and weights cut to further pieces.
      tensor: heads and hidden units.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are those of PVM's first stage (arXiv 2605.00814).

    Attributes:
      output: directory of checkpoints, metrics and the trained memory.
      data: what it trains on.
      evaluation: what it is evaluated on; None evaluates on nothing.
      backbone: Hugging Face folder; empty is the embedded tiny backbone.
      encoder: Hugging Face folder of a model that reads knowledge items and prompts for the backbone, which may then be
        a decoder alone (CoMEM's transfer); its weights stay as they are. Empty: the backbone reads for itself.
      memory: {"name": "pvm", ...} with settings of that memory; None trains without one.
      lora: settings of `LoRAConfig`, {"rank": 8, ...}: factors beside the decoder's kernels, which train where
        `trainable` names them ("base/**/lora_a", "base/**/lora_b"); None adds none.
      memory_folder: a folder with a trained memory to go on from, instead of `memory`.
      adapter_folder: a PEFT folder with LoRA factors to go on from, instead of `lora`.
      trainable: path patterns of what trains over {"base", "memory"}: "memory", or e.g. ("**", "!base/visual").
      dtype: of the backbone's weights and of the arithmetic; what trains is kept in float32. None keeps what is stored.
      grpo: how completions are sampled, judged and learnt from; None is supervised fine-tuning.
      seed: of the memory's weights, the data's order, the blindfolds, dropout and sampling.
      seeds: several seeds make one run each, in `output/seed_N`, and a table of mean and spread over them.
      stages: {name: values that it replaces}: several runs in `output/<name>`, in the order of the names, each from the
        memory and the LoRA factors that the one before it left; None makes one run.
      optimizer: AdamW and its schedule.
      loop: steps, batches, evaluations, checkpoints.
      mesh: devices.
      hosts: how several hosts find one another and wait.
      remat: what of a decoder layer is recomputed in the backward pass: "full" (or True), "dots" keeps the results of
        matrix products with weights, "none" (or False) keeps everything.
      donate: a step writes the new state into the memory of the old one.
      compile_cache: folder of compiled programs, for later starts and other hosts; trust it like code. None leaves it
        to JAX_COMPILATION_CACHE_DIR.
      xla_flags: preset of compiler flags, of `jaxmem.distributed.flags.PRESETS`; what the environment says wins.
      xla_extra_flags: further flags, "--xla_name=value".
      loss_chunk: positions whose logits exist at once, on each of the mesh's data x fsdp ways.
      min_pixels, max_pixels: replace the folders' limits per image.
      experiment: {"name": "digit_boards", ...}, measurements before and after the training; None makes none.
    """

    output: str
    data: DataConfig
    evaluation: DataConfig | None = None
    backbone: str = ""
    encoder: str = ""
    memory: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"name": "pvm"})
    lora: Mapping[str, Any] | None = None
    memory_folder: str | None = None
    adapter_folder: str | None = None
    trainable: str | tuple[str, ...] = "memory"
    dtype: str | None = None
    grpo: GRPOConfig | None = None
    seed: int = 42
    seeds: tuple[int, ...] = ()
    stages: Mapping[str, Mapping[str, Any]] | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    remat: bool | str = True
    donate: bool = True
    compile_cache: str | None = None
    xla_flags: str = "default"
    xla_extra_flags: tuple[str, ...] = ()
    loss_chunk: int = 2048
    min_pixels: int | None = None
    max_pixels: int | None = None
    experiment: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and "name" not in self.memory:
            raise ConfigError('memory has no key "name"; write for example {"name": "pvm", "layers": (8, 16, 24)}')
        if self.experiment is not None and "name" not in self.experiment:
            raise ConfigError('experiment has no key "name"; write for example {"name": "digit_boards"}')
        if self.lora is not None and self.adapter_folder is not None:
            raise ConfigError("lora makes fresh factors, adapter_folder goes on from old ones; set one of them to None")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds {self.seeds} names one twice; every seed is a run of its own")
        choose(PRESETS, self.xla_flags, "preset xla_flags")
        if self.remat not in REMAT:
            raise ConfigError(f"remat {self.remat!r} is none of {', '.join(map(repr, REMAT))}")
        if self.loop.accumulate and -1 not in dataclasses.astuple(self.mesh):
            self._check_rows()

    def resolved(self, devices: int) -> TrainConfig:
        """The run on so many devices: mesh sizes of -1 and `loop.accumulate` of 0 (one row per device) become numbers.

        Raises:
          ConfigError: mesh, rows and devices do not divide one another.
        """
        mesh = MeshConfig(**complete(dataclasses.asdict(self.mesh), devices))
        rows = self.loop.batch_size // (1 if self.grpo is None else self.grpo.minibatches)
        accumulate = self.loop.accumulate or max(1, rows // (mesh.data * mesh.fsdp))
        return dataclasses.replace(self, mesh=mesh, loop=dataclasses.replace(self.loop, accumulate=accumulate))

    def _check_rows(self) -> None:
        """Rows must divide into minibatches, microbatches and devices; groups into the sequence axis."""
        ways = self.mesh.data * self.mesh.fsdp
        updates = 1 if self.grpo is None else self.grpo.minibatches
        if self.loop.batch_size % (updates * self.loop.accumulate):
            raise ConfigError(
                f"loop.batch_size {self.loop.batch_size} cannot be dealt to grpo.minibatches {updates} x"
                f" loop.accumulate {self.loop.accumulate}"
            )
        rows = self.loop.batch_size // self.loop.accumulate // updates
        if ways < 1 or rows % ways:
            raise ConfigError(
                f"{rows} rows per microbatch cannot be shared by mesh data x fsdp = {ways} devices: loop.batch_size"
                f" {self.loop.batch_size} / loop.accumulate {self.loop.accumulate} must be a multiple of {ways}"
            )
        if self.grpo is not None and self.grpo.group % self.mesh.sequence:
            raise ConfigError(
                f"grpo.group {self.grpo.group} cannot be dealt to mesh.sequence = {self.mesh.sequence} devices; use a"
                " divisor of the group"
            )


def config_dict(config: TrainConfig) -> ConfigDict:
    """The configuration with every key spelt out: a file that returns it lets `--config.key` set any of them."""
    return ConfigDict(dataclasses.asdict(config))
