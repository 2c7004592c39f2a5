"""`jaxmem train`: from a configuration to a trained memory in a folder."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmem import api, transfer
from jaxmem import config as configs
from jaxmem.adapters import lora
from jaxmem.checkpoints import huggingface
from jaxmem.checkpoints.identity import run_identity, weights_fingerprint
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.checkpoints.weights import INDEX as WEIGHT_INDEX
from jaxmem.data import records
from jaxmem.data.pipeline import Pipeline, Rejections, Rows
from jaxmem.distributed import flags, hosts
from jaxmem.distributed.mesh import current, make_mesh
from jaxmem.errors import ConfigError
from jaxmem.training import descent, grpo_job, loop, record, seeds, sft, stages, trees
from jaxmem.training.descent import TrainState
from jaxmem.training.encoding import encoders, open_source
from jaxmem.training.loop import Job
from jaxmem.training.placing import level, place, share_of
from jaxmem.training.settings import DataConfig, MeshConfig, TrainConfig
from jaxmem.training.signals import Signals
from jaxmem.training.stages import ADAPTER, BACKBONE, MEMORY
from jaxmem.training.trees import Tree

CHECKPOINTS = "checkpoints"
EXPERIMENTS = {
    "digit_boards": "jaxmem.analysis.digit_boards",
    "digit_vismem": "jaxmem.analysis.digit_vismem",
    "digit_facts": "jaxmem.analysis.digit_facts",
}
"""Modules with `open_experiment(section) -> object` with `before(model, folder)` and `after(model, folder, config)`;
one with `summary(folders) -> str` has something to say of several seeds."""
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
    start(config)
    if config.seeds:
        seeds.each(config, in_stages)
        hosts.once("the report over the seeds", lambda: _report_seeds(config))
        return 0
    result = in_stages(config)
    if not hosts.first():
        return 0
    for name in ("loss", "accuracy", "reward", "eval/loss", "eval/accuracy", "eval/reward"):
        if name in result.metrics:
            print(f"{name:14s} {result.metrics[name]:.4f}")
    print(f"{result.steps} steps; results are in {result.output}")
    return 0


def in_stages(config: TrainConfig) -> Result:
    """`train`, or every stage of the configuration one after the other; the result of the last."""
    return train(config) if config.stages is None else stages.each(config, train)[-1]


def _report_seeds(config: TrainConfig) -> None:
    own = {name for name, changes in (config.stages or {}).items() if "output" not in changes}  # one run per seed
    for stage in sorted(own or ("",)):
        for spread in seeds.spreads(config.output, config.seeds, stage):
            print(f"{stage}: {spread}" if stage else spread)
    for one in stages.plan(config) if config.stages else [config]:
        _summarise_seeds(config, one)
    if config.stages is None and config.grpo is not None:
        _report("seeds", config.output, config.seeds)
    print(f"results are in {config.output}")


def _summarise_seeds(config: TrainConfig, one: TrainConfig) -> None:
    """What an experiment says of all seeds of a run, or of one of its stages, if it says something."""
    if one.experiment is None:
        return
    module = importlib.import_module(configs.choose(EXPERIMENTS, one.experiment["name"], "experiment"))
    if hasattr(module, "summary"):
        stage = Path(one.output).relative_to(config.output)
        print(module.summary([Path(config.output) / f"seed_{seed}" / stage for seed in config.seeds]))


def start(config: TrainConfig) -> None:
    """What must happen before the first use of a device: compiler flags, the compile cache, and joining the hosts."""
    flags.apply(config.xla_flags, config.xla_extra_flags)
    if config.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).absolute()))
    hosts.start(config.hosts)


def train(config: TrainConfig | Mapping[str, Any]) -> Result:
    """Trains by a configuration; the same call again goes on where an earlier one stopped.

    With several hosts all of them make the same call; the first writes what is not a checkpoint.

    Args:
      config: a TrainConfig, or a mapping (or ConfigDict) with its keys.

    Returns:
      Result. `output/memory` holds the memory for `Model.restore`, `output/adapter` LoRA factors in PEFT's format for
      `Model.restore_lora`; where backbone weights trained, `output/backbone` holds them under their official names.

    Raises:
      ConfigError, DataError, CheckpointError, NonFiniteError, Interrupted, HostError: each says what to do.
    """
    if not isinstance(config, TrainConfig):
        config = configs.build(TrainConfig, config, "config")
    if config.seeds or config.stages:
        raise ConfigError(
            "train makes one run; for config.seeds and config.stages use jaxmem.training.seeds.each and"
            " jaxmem.training.stages.each, or `jaxmem train`"
        )
    began = time.monotonic()
    start(config)
    with hosts.together(), Signals(wait=False):
        hosts.agree("configuration", record.flat(config))
        hosts.agree("code", record.versions() | {"source": record.source_fingerprint()})
        return _train(config.resolved(jax.device_count()), began)


def _train(config: TrainConfig, began: float) -> Result:
    """`train` on this host, of a resolved configuration; `began` is when it was asked for (time.monotonic)."""
    experiment = open_experiment(config.experiment)
    source = open_source(config.data, config.loop.batch_size)
    held_out = None if config.evaluation is None else open_source(config.evaluation, config.loop.batch_size)
    mesh, folder = _mesh(config.mesh), Path(config.output)
    with current(mesh):
        model = load_model(config, mesh)
        with grpo_job.open_rewards(config, model, source) as rewards:
            if config.grpo is None:
                job, state = prepare(config, model, source, held_out, mesh)
            else:
                job, state = grpo_job.prepare(config, model, source, rewards, held_out, mesh)
            identity = _identity(config, model, source, job.steps)
            hosts.once("the output folder", lambda: record.claim(folder, identity, config))
            record.require_shared(folder)
            if experiment is not None:
                _alone("the experiment before training", model, lambda local: experiment.before(local, folder))
            about = config.loop
            with CheckpointStore(
                folder / CHECKPOINTS, identity, keep=about.keep, keep_best=about.keep_best, every=about.checkpoint_every
            ) as store:
                state, metrics = loop.run(dataclasses.replace(job, began=began), state, store, folder)
        model = _trained(model, trees.merge(state.trainable, job.frozen))
        _save(model, folder, state.trainable)
    if config.grpo is not None:
        hosts.once("the report", lambda: _report("run", folder))
    if experiment is not None:
        settings = dataclasses.asdict(config)
        _alone("the experiment after training", model, lambda local: experiment.after(local, folder, settings))
    return Result(model, metrics, job.steps, folder)


def _alone(what: str, model: api.Model, measure: Callable[[api.Model], Any]) -> None:
    """Measures on the first host, with weights that lie there, while the others wait."""
    if hosts.count() == 1:
        measure(model)
        return
    whole = hosts.fetch((model.base, model.memory))
    with current(make_mesh(devices=jax.local_devices()[:1])):
        base, memory = jax.tree.map(jnp.asarray, whole)
        local = dataclasses.replace(model, base=base, memory=memory)
        hosts.once(what, lambda: measure(local) and None)


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
    rejected = record.of_host(Path(config.output) / "rejected.jsonl")
    data = pipeline(config, config.data, model, source, rejected, mesh)
    steps = config.loop.total_steps(data.steps_per_epoch)
    dtype = jax.tree.leaves(model.base)[0].dtype
    forward = sft.model_forward(model.spec, trainable, remat=config.remat, base_dtype=dtype)
    report = functools.partial(sft.gates, model.spec)
    step = sft.make_train_step(
        forward,
        config.optimizer,
        steps,
        trainable,
        report=report,
        chunk=config.loss_chunk,
        dtype=dtype,
        donate=config.donate,
    )
    state = descent.init_state(config.optimizer, trainable, config.seed)
    evaluate = None
    if held_out is not None and config.evaluation is not None:
        rejected = record.of_host(rejected.with_name("rejected_evaluation.jsonl"))
        rows = pipeline(config, config.evaluation, model, held_out, rejected, mesh)
        evaluate = _evaluation(sft.make_eval_step(forward, config.loss_chunk), frozen, rows, mesh)
    step = loop.supervised(step, frozen, config.loop, config.seed, mesh)
    return Job(config.loop, steps, step, frozen, data, evaluate, mesh), state


def load_model(config: TrainConfig, mesh: Mesh | None) -> api.Model:
    """The backbone with its memory, on the mesh."""
    folder = Path(config.backbone) if config.backbone else api.TINY
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    encoder = config.encoder or None
    model = api.load(folder, config.dtype, memory=config.memory_folder, encoder=encoder, mesh=mesh, **limits)
    if config.memory_folder is None and config.memory is not None:
        settings = dict(config.memory)
        model = model.attach(settings.pop("name"), key=jax.random.key(config.seed), **settings)
    if config.adapter_folder is not None:
        model = model.restore_lora(config.adapter_folder)
    if config.lora is not None:
        model = model.attach_lora(key=jax.random.fold_in(jax.random.key(config.seed), 1), **config.lora)
    if config.encoder:
        trained, _ = trees.split({"base": model.base, "memory": model.memory}, config.trainable)
        transfer.check_run(model.spec, trained)
    return model


def pipeline(
    config: TrainConfig, data: DataConfig, model: api.Model, source: Sequence[Any], rejected: Path, mesh: Mesh | None
) -> Pipeline:
    """The batches of a dataset, encoded by the model's processor; of several hosts each encodes its own rows."""
    training = data is config.data
    rows, parts = config.loop.batch_size, config.loop.accumulate
    rows, parts = (rows, parts) if training else (rows // parts, 1)
    encode, assemble = encoders(data, model.processor, model.spec)
    return Pipeline(
        source=source,
        encode=encode,
        assemble=assemble,
        batch_size=rows,
        shuffle=training and data.shuffle and data.source == "jsonl",
        seed=config.seed,
        rejections=Rejections(len(source), data.max_rejected_fraction, rejected),
        threads=data.threads,
        prefetch=data.prefetch,
        share=share_of(mesh, rows, parts),
    )


def _evaluation(
    step: Callable[..., Any], frozen: Tree, data: Pipeline, mesh: Mesh | None
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"eval/loss", "eval/accuracy", "eval/tokens"} over the whole evaluation set."""

    def on_devices(rows: Rows) -> Any:
        batch = place(level(rows.batch, "a batch of the evaluation"), 1, mesh, data.batch_size)
        return jax.tree.map(lambda leaf: leaf[0], batch)

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = (on_devices(rows) for rows in data.epoch())
        return {f"eval/{k}": v for k, v in sft.evaluate(step, state.trainable, frozen, batches).items()}

    return evaluate


def _mesh(config: MeshConfig) -> Mesh | None:
    """None for a single device: then nothing is placed anywhere but there."""
    sizes = dataclasses.asdict(config)
    return None if set(sizes.values()) == {1} and hosts.count() == 1 else make_mesh(**sizes)


def _identity(config: TrainConfig, model: api.Model, source: Sequence[Any], steps: int) -> dict[str, Any]:
    """What may not change between two starts of one run. How it is cut into microbatches, placed, shown, evaluated
    and checkpointed may."""
    return run_identity(model.spec.backbone, model.spec.memories) | {
        "weights": weights_fingerprint(model.folder),
        "lora": None if config.lora is None else dict(config.lora),
        "memory_folder": config.memory_folder,
        "adapter_folder": config.adapter_folder,
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
        **({} if model.encoder_folder is None else {"encoder": weights_fingerprint(model.encoder_folder)}),
    }


def _trained(model: api.Model, tree: Tree) -> api.Model:
    """The model with new weights; the backbone's in the dtype they had."""
    base = jax.tree.map(lambda new, old: new.astype(old.dtype), tree["base"], model.base)
    memory = {config.name: {} for config in model.spec.memories} | tree.get("memory", {})  # some have no parameters
    return dataclasses.replace(model, base=base, memory=memory)


def _save(model: api.Model, folder: Path, trained: Tree) -> None:
    """Writes memory, LoRA factors and, where it trained, the backbone with the tokenizer and image settings it had."""
    if model.spec.memories:
        model.save(folder / MEMORY)
    if lora.has_lora(model.base):
        model.save_lora(folder / ADAPTER)
    if any(not path.endswith(lora.LEAVES) for path, _ in trees.leaves(trained.get("base", {}))):
        hf_config = huggingface.read_config(model.folder)
        target = folder / BACKBONE
        base = {name: part for name, part in lora.strip(model.base).items() if name != "encoder"}
        huggingface.save_backbone(target, base, model.spec.backbone, hf_config=hf_config, overwrite=True)
        for path in model.folder.iterdir() if hosts.first() else ():
            beside = path.suffix in (".json", ".jinja", ".txt") and path.name not in ("config.json", WEIGHT_INDEX)
            if beside and path.is_file():
                shutil.copy2(path, target / path.name)
