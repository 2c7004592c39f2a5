"""A GRPO run from its configuration: what the loop drives, and the state in front of the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmem.api import Model
from jaxmem.data.pipeline import Pipeline, Rejections
from jaxmem.data.records import name_of
from jaxmem.distributed import hosts
from jaxmem.errors import ConfigError, DataError
from jaxmem.training import descent, grpo, grpo_run, record, sft, trees
from jaxmem.training.descent import TrainState
from jaxmem.training.encoding import chats
from jaxmem.training.grpo_settings import GRPOConfig
from jaxmem.training.loop import Job
from jaxmem.training.playing import Player
from jaxmem.training.prompts import batch_of, encoder
from jaxmem.training.rewards.runner import RewardRunner
from jaxmem.training.settings import DataConfig, TrainConfig
from jaxmem.training.vismem_stages import Stage, open_stage
from jaxmem.training.warm_up import WarmUp

_TRIED = 100  # records among which one must be usable for the self-test of the rewards


def open_rewards(
    config: TrainConfig, model: Model, source: Sequence[Any]
) -> contextlib.AbstractContextManager[RewardRunner | None]:
    """The judges of a GRPO run, tested on the dataset's first usable record; nothing for any other run.

    They sit on the first host, which judges for all.

    Raises:
      ConfigError: a reward function fails its self-test or needs a column that the dataset lacks.
    """
    if config.grpo is None or not hosts.first():
        return contextlib.nullcontext()
    encode, faults = encoder(model.processor, chat=chats(config.data, model.processor, model.spec)), []
    for index in range(min(len(source), _TRIED)):
        try:
            first = encode(source[index])
        except Exception as error:  # whether too many are unusable is the pipeline's question
            faults.append(f"{name_of(source, index)}: {error}")
            continue
        return RewardRunner(config.grpo.rewards, first.columns, first.messages)
    raise DataError(f"none of the first {len(faults)} records is a prompt; the first fault: {faults[0]}")


def prompts_pipeline(
    config: TrainConfig, data: DataConfig, model: Model, source: Sequence[Any], rejected: Path
) -> Pipeline:
    """The prompts of a dataset, in batches of `loop.batch_size`."""
    training = data is config.data
    answers = config.grpo is not None and config.grpo.vismem is not None
    return Pipeline(
        source=source,
        encode=encoder(model.processor, answers, chats(data, model.processor, model.spec)),
        assemble=lambda prompts: batch_of(prompts, data.buckets, model.processor.pad_token),
        batch_size=config.loop.batch_size,
        shuffle=training and data.shuffle and data.source != "boards",
        seed=config.seed,
        rejections=Rejections(len(source), data.max_rejected_fraction, rejected),
        threads=data.threads,
        prefetch=data.prefetch,
        supervised=False,
    )


def prepare(
    config: TrainConfig,
    model: Model,
    source: Sequence[Any],
    rewards: RewardRunner | None,
    held_out: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Job, TrainState]:
    """Everything that the loop drives; arguments as for `run.prepare`, with the judges started (None on
    hosts other than the first)."""
    method = config.grpo
    if method is None:
        raise ConfigError("the configuration has no section grpo")
    if method.vismem is not None and method.vismem.stage == "warm_up":  # learns from references, whatever the policy
        method = dataclasses.replace(
            method, old_logprobs="rollout", loss=dataclasses.replace(method.loss, kl_weight=0.0)
        )
    trainable, frozen = trees.split({"base": model.base, "memory": model.memory}, config.trainable)
    folder = Path(config.output)
    data = prompts_pipeline(config, config.data, model, source, record.of_host(folder / "rejected.jsonl"))
    steps = config.loop.total_steps(data.steps_per_epoch)
    state = descent.init_state(config.optimizer, trainable, config.seed)
    dtype = jax.tree.leaves(model.base)[0].dtype
    forward = grpo.model_forward(model.spec, trainable, remat=config.remat, base_dtype=dtype)
    score = grpo.make_score(forward, method.temperature, config.loss_chunk)
    at_once = method.prompts_at_once * config.mesh.data * config.mesh.fsdp
    rows = config.loop.batch_size
    player = Player(model.spec, model.processor, config.data.buckets, rewards, rows, mesh, min(at_once, rows))
    trainer = grpo_run.Trainer(
        config=method,
        loop=config.loop,
        seed=config.seed,
        player=player,
        sampler=method.sampler(model.sampler()),
        data=data,
        update=grpo.make_update(
            score, method.loss, config.optimizer, steps, trainable, method.max_new_tokens, dtype, config.donate
        ),
        score=grpo_run.compiled_score(score),
        cast=grpo_run.caster(dtype),
        frozen=frozen,
        reference=jax.tree.map(jnp.copy, state.trainable) if method.loss.kl_weight else None,
        report=functools.partial(sft.gates, model.spec),
        folder=folder,
        mesh=mesh,
        stage=_stage(method, model, source, steps),
    )
    evaluate = None
    if held_out is not None and config.evaluation is not None:
        rejected = record.of_host(folder / "rejected_evaluation.jsonl")
        prompts = prompts_pipeline(config, config.evaluation, model, held_out, rejected)
        evaluate = grpo_run.evaluator(trainer, prompts, config.evaluation.buckets, config.seed)
    warm = method.vismem is not None and method.vismem.stage == "warm_up"
    step = WarmUp(trainer).step if warm else trainer.step
    job = Job(config.loop, steps, step, frozen, data, evaluate, mesh, evaluate_first=True)
    return job, state


def _stage(method: GRPOConfig, model: Model, source: Sequence[Any], steps: int) -> Stage | None:
    """The stage of VisMem that the run is; the dataset's first usable records say how frequent delimiters are."""
    if method.vismem is None:
        return None
    encode, prompts = encoder(model.processor, answers=True), []
    for index in range(min(len(source), _TRIED)):
        with contextlib.suppress(DataError):  # whether too many are unusable is the pipeline's question
            prompts.append(encode(source[index]))
    return open_stage(method.vismem, model.spec.vismem, model.processor, prompts, steps)


def identity(method: GRPOConfig) -> dict[str, Any]:
    """What may not change between two starts of one run; limits of the judges and what is written down may."""
    free = {"samples", "samples_every", "eval_group", "eval_temperature", "rewards", "prompts_at_once"}
    kept = {name: value for name, value in dataclasses.asdict(method).items() if name not in free}
    return {**kept, "rewards": [dict(f) if not isinstance(f, str) else f for f in method.rewards.functions]}
