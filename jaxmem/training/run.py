"""`jaxmem train`: from a configuration to a trained memory in a folder."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmem import api
from jaxmem import config as configs
from jaxmem.adapters import lora
from jaxmem.backbones import registry
from jaxmem.checkpoints import huggingface
from jaxmem.checkpoints.identity import run_identity
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.checkpoints.weights import INDEX as WEIGHT_INDEX
from jaxmem.data import records
from jaxmem.data.pipeline import Pipeline, Rejections
from jaxmem.distributed.mesh import batch_sharding, make_mesh, shardings
from jaxmem.errors import ConfigError
from jaxmem.training import descent, grpo_job, loop, record, seeds, sft, trees
from jaxmem.training.descent import TrainState
from jaxmem.training.encoding import encoders, open_source
from jaxmem.training.loop import Job
from jaxmem.training.settings import DataConfig, MeshConfig, TrainConfig
from jaxmem.training.trees import Tree

CHECKPOINTS, MEMORY, ADAPTER, BACKBONE = "checkpoints", "memory", "adapter", "backbone"
EXPERIMENTS = {"digit_boards": "jaxmem.analysis.digit_boards"}
"""Modules with `open_experiment(section) -> object` with `before(model, folder)` and `after(model, folder, config)`."""
REPORTS = {"run": "jaxmem.analysis.grpo_report:write", "seeds": "jaxmem.analysis.grpo_seeds:write"}
"""What writes `report.html` of a GRPO run (folder), and over several (folder, seeds); it returns the path."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` leaves.

    Attributes:
      model: with the trained weights.
      metrics: of the last step and the last evaluation.
      steps: optimizer steps of the whole run.
      output: the run's directory.
    """

    model: api.Model
    metrics: dict[str, float]
    steps: int
    output: Path


def main(config: Any) -> int:
    """The command `jaxmem train`: trains, prints the last metrics and where the results are; returns the exit code."""
    config = configs.build(TrainConfig, config, "config")
    if config.seeds:
        seeds.each(config, train)
        for spread in seeds.spreads(config.output, config.seeds):
            print(spread)
        if config.grpo is not None:
            _report("seeds", config.output, config.seeds)
        print(f"results are in {config.output}")
        return 0
    result = train(config)
    for name in ("loss", "accuracy", "reward", "eval/loss", "eval/accuracy", "eval/reward"):
        if name in result.metrics:
            print(f"{name:14s} {result.metrics[name]:.4f}")
    print(f"{result.steps} steps; results are in {result.output}")
    return 0


def train(config: TrainConfig | Mapping[str, Any]) -> Result:
    """Trains by a configuration; the same call again goes on where an earlier one stopped.

    Args:
      config: a TrainConfig, or a mapping (or ConfigDict) with its keys.

    Returns:
      Result. `output/memory` holds the memory for `Model.restore`, `output/adapter` LoRA factors in PEFT's format for
      `Model.restore_lora`; where backbone weights trained, `output/backbone` holds them under their official names.

    Raises:
      ConfigError, DataError, CheckpointError, NonFiniteError, Interrupted: each says what to do.
    """
    if not isinstance(config, TrainConfig):
        config = configs.build(TrainConfig, config, "config")
    if config.seeds:
        raise ConfigError("train makes one run; for config.seeds use jaxmem.training.seeds.each, or `jaxmem train`")
    experiment = open_experiment(config.experiment)
    source = open_source(config.data, config.loop.batch_size)
    held_out = None if config.evaluation is None else open_source(config.evaluation, config.loop.batch_size)
    mesh = _mesh(config.mesh)
    model = load_model(config, mesh)
    folder = Path(config.output)
    with grpo_job.open_rewards(config, model, source) as rewards:
        if rewards is None:
            job, state = prepare(config, model, source, held_out, mesh)
        else:
            job, state = grpo_job.prepare(config, model, source, rewards, held_out, mesh)
        identity = _identity(config, model, source, job.steps)
        record.claim(config.output, identity, config)
        if experiment is not None:
            experiment.before(model, folder)
        every, keep = config.loop.checkpoint_every, config.loop.keep
        with CheckpointStore(folder / CHECKPOINTS, identity, keep=keep, every=every) as store:
            state, metrics = loop.run(job, state, store, folder)
    model = _trained(model, trees.merge(state.trainable, job.frozen))
    _save(model, folder, state.trainable)
    if config.grpo is not None:
        _report("run", folder)
    if experiment is not None:
        experiment.after(model, folder, dataclasses.asdict(config))
    return Result(model, metrics, job.steps, folder)


def _report(kind: str, *arguments: Any) -> None:
    """Writes one of `REPORTS` and says where."""
    module, _, function = REPORTS[kind].partition(":")
    print(f"report: {getattr(importlib.import_module(module), function)(*arguments)}")


def open_experiment(section: Mapping[str, Any] | None) -> Any:
    """The measurements around a run, or None; ConfigError for an unknown name or setting."""
    if section is None:
        return None
    module = configs.choose(EXPERIMENTS, section["name"], "experiment")
    return importlib.import_module(module).open_experiment(section)


def prepare(
    config: TrainConfig,
    model: api.Model,
    source: Sequence[Any],
    held_out: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Job, TrainState]:
    """Everything that the loop drives, and the state in front of the first step.

    Args:
      config: the run.
      model: with its memories attached, its weights where they shall stay.
      source: training records.
      held_out: evaluation records.
      mesh: of the weights; None is the default device.
    """
    trainable, frozen = trees.split({"base": model.base, "memory": model.memory}, config.trainable)
    rejected = Path(config.output) / "rejected.jsonl"
    data = pipeline(config, config.data, model, source, rejected)
    steps = config.loop.total_steps(data.steps_per_epoch)
    dtype = jax.tree.leaves(model.base)[0].dtype
    forward = sft.model_forward(model.spec, trainable, remat=config.remat, base_dtype=dtype)
    report = functools.partial(sft.gates, model.spec)
    step = sft.make_train_step(forward, config.optimizer, steps, trainable, report=report, chunk=config.loss_chunk)
    state = descent.init_state(config.optimizer, trainable, config.seed)
    evaluate = None
    if held_out is not None and config.evaluation is not None:
        rows = pipeline(config, config.evaluation, model, held_out, rejected.with_name("rejected_evaluation.jsonl"))
        evaluate = _evaluation(sft.make_eval_step(forward, config.loss_chunk), frozen, rows, mesh)
    step = loop.supervised(step, frozen, config.loop, config.seed, mesh)
    return Job(config.loop, steps, step, frozen, data, evaluate, mesh), state


def load_model(config: TrainConfig, mesh: Mesh | None) -> api.Model:
    """The backbone with its memory, on the mesh."""
    folder = Path(config.backbone) if config.backbone else api.TINY
    places = None
    if mesh is not None:
        backbone = registry.config_from_hf(huggingface.read_config(folder))
        places = shardings(mesh, registry.backbone(backbone.model_type).shapes(backbone))
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    model = api.load(folder, config.dtype, memory=config.memory_folder, sharding=places, **limits)
    if config.memory_folder is None and config.memory is not None:
        settings = dict(config.memory)
        model = model.attach(settings.pop("name"), key=jax.random.key(config.seed), **settings)
    if config.lora is not None:
        model = model.attach_lora(key=jax.random.fold_in(jax.random.key(config.seed), 1), **config.lora)
    if mesh is not None:
        base, memory = (jax.device_put(tree, shardings(mesh, tree)) for tree in (model.base, model.memory))
        model = dataclasses.replace(model, base=base, memory=memory)
    return model


def pipeline(
    config: TrainConfig, data: DataConfig, model: api.Model, source: Sequence[Any], rejected: Path
) -> Pipeline:
    """The batches of a dataset, encoded by the model's processor."""
    training = data is config.data
    encode, assemble = encoders(data, model.processor, model.spec.backbone)
    return Pipeline(
        source=source,
        encode=encode,
        assemble=assemble,
        batch_size=config.loop.batch_size if training else config.loop.batch_size // config.loop.accumulate,
        shuffle=training and data.shuffle and data.source != "boards",
        seed=config.seed,
        rejections=Rejections(len(source), data.max_rejected_fraction, rejected),
        threads=data.threads,
        prefetch=data.prefetch,
    )


def _evaluation(
    step: Callable[..., Any], frozen: Tree, data: Pipeline, mesh: Mesh | None
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"eval/loss", "eval/accuracy", "eval/tokens"} over the whole evaluation set."""
    sharding = None if mesh is None else batch_sharding(mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = (loop.put(rows.batch, sharding) for rows in data.epoch())
        return {f"eval/{k}": v for k, v in sft.evaluate(step, state.trainable, frozen, batches).items()}

    return evaluate


def _mesh(config: MeshConfig) -> Mesh | None:
    """None for a single device: then nothing is placed anywhere but there."""
    sizes = dataclasses.asdict(config)
    return None if set(sizes.values()) == {1} else make_mesh(**sizes)


def _identity(config: TrainConfig, model: api.Model, source: Sequence[Any], steps: int) -> dict[str, Any]:
    """What may not change between two starts of one run. How it is cut into microbatches, placed, shown, evaluated
    and checkpointed may."""
    return run_identity(model.spec.backbone, model.spec.memories) | {
        "weights": record.weights_fingerprint(model.folder),
        "lora": None if config.lora is None else dict(config.lora),
        "memory_folder": config.memory_folder,
        "dataset": records.fingerprint(source),
        "optimizer": dataclasses.asdict(config.optimizer),
        "trainable": config.trainable,
        "dtype": str(jax.tree.leaves(model.base)[0].dtype),
        "seed": config.seed,
        "steps": steps,
        "batch_size": config.loop.batch_size,
        "p_block": config.loop.p_block,
        "grpo": None if config.grpo is None else grpo_job.identity(config.grpo),
        "shuffle": config.data.shuffle,
        "max_rejected_fraction": config.data.max_rejected_fraction,
        "pixels": [config.min_pixels, config.max_pixels],
    }


def _trained(model: api.Model, tree: Tree) -> api.Model:
    """The model with new weights; the backbone's in the dtype they had."""
    base = jax.tree.map(lambda new, old: new.astype(old.dtype), tree["base"], model.base)
    return dataclasses.replace(model, base=base, memory=tree.get("memory", {}))


def _save(model: api.Model, folder: Path, trained: Tree) -> None:
    """Writes memory, LoRA factors and, where it trained, the backbone with the tokenizer and image settings it had."""
    if model.spec.memories:
        model.save(folder / MEMORY)
    if lora.has_lora(model.base):
        model.save_lora(folder / ADAPTER)
    if any(not path.endswith(lora.LEAVES) for path, _ in trees.leaves(trained.get("base", {}))):
        hf_config = huggingface.read_config(model.folder)
        target = folder / BACKBONE
        base = lora.strip(model.base)
        huggingface.save_backbone(target, base, model.spec.backbone, hf_config=hf_config, overwrite=True)
        for path in model.folder.iterdir():
            beside = path.suffix in (".json", ".jinja", ".txt") and path.name not in ("config.json", WEIGHT_INDEX)
            if beside and path.is_file():
                shutil.copy2(path, target / path.name)
