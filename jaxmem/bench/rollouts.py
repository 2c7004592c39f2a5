"""`jaxmem bench grpo`: whole GRPO steps against TRL's GRPOTrainer, and the gain from sharing a group's prompt.

A random Qwen3-VL of about 30 M parameters in float32 on both sides, the same prompts with one image each, groups of 8,
completions of one length without an end, AdamW on everything but the vision tower, one update per batch of
completions. A step is all of it: reading the images, sampling, rewards, loss and update.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxmem import api
from jaxmem.assets.tiny_folder import write_folder
from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.config import BackboneConfig
from jaxmem.bench.models import backbone, hf_config
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.bench.trl_step import Task, trl_step
from jaxmem.checkpoints.huggingface import save_backbone
from jaxmem.data.batching import Buckets
from jaxmem.sampling.rollout import rollout
from jaxmem.training import descent, grpo, trees
from jaxmem.training.advantages import AdvantageConfig, advantages
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.policy import LossConfig

PROMPTS, GROUP, NEW, PIXELS = 4, 8, 64, (256, 256)
SHARED_PROMPTS, SHARED_PIXELS = 1, (1024, 512)  # 512 visual tokens
BUCKETS = Buckets(tuple(range(32, 4096, 32)))
PHASES = ("rollout", "rewards", "update")
Step = Callable[[], dict[str, float]]


def run(
    config: BackboneConfig | None = None,
    prompts: int = PROMPTS,
    new: int = NEW,
    runs: int = 5,
    peer_runs: int = 3,
    pixels: tuple[int, int] = PIXELS,
    shared_pixels: tuple[int, int] = SHARED_PIXELS,
) -> list[Comparison]:
    """Measures all three: against TRL with small and with large images, and sharing against not sharing.

    Args:
      config: the backbone; 5 layers of width 512 by default.
      prompts: of one step against TRL.
      new: tokens per completion.
      runs: rounds of sharing against not sharing.
      peer_runs: rounds against TRL.
      pixels, shared_pixels: width and height of the images of the first and the second comparison.

    Raises:
      ConfigError: torch or trl is not installed.
    """
    config = config or backbone(layers=5, width=512, mlp_width=1536, heads=8, kv_heads=4, vocab=4096)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        millions = _write(folder, config)
        model = api.load(folder)
        task = _task(prompts, new, pixels)
        label = f"GRPO step, {millions} M, {prompts} x {GROUP} x {new} tokens"
        against = _compare(
            label, "ours / TRL >= 3", task, {"ours": jax_step(model, task), "peer": trl_step(folder, task)}, peer_runs
        )
        task = _task(SHARED_PROMPTS, new, shared_pixels)
        visual = model.processor.image_tokens(shared_pixels)
        label = f"GRPO step, {SHARED_PROMPTS} x {GROUP} x {new} tokens, {visual} visual tokens"
        sides = {"ours": jax_step(model, task), "peer": trl_step(folder, task)}
        against += _compare(label, "ours / TRL >= 3", task, sides, peer_runs)
        sides = {"ours": jax_step(model, task), "peer": jax_step(model, task, share=False)}
        shared = _compare(f"shared prompt, {visual} visual tokens", "on / off >= 2", task, sides, runs)
    return [*against, *shared]


def jax_step(model: api.Model, task: Task, share: bool = True) -> Step:
    """Our side: a function that does one step and returns its seconds by phase.

    Args:
      model: the weights in front of the first step.
      task: the step.
      share: compute the prompt once per group; otherwise every completion is a row with its own prompt.
    """
    repeats, group = (1, task.group) if share else (task.group, 1)
    chats = [_chat(*pair) for pair in zip(task.questions, task.images, strict=True) for _ in range(repeats)]
    trainable, frozen = trees.split({"base": model.base, "memory": {}}, ("base", "!base/visual"))
    settings = OptimizerConfig(learning_rate=task.learning_rate, schedule="constant", warmup_steps=0)
    score = grpo.make_score(grpo.model_forward(model.spec, trainable, remat=False), temperature=1.0)
    update = grpo.make_update(score, LossConfig("dapo"), settings, 1, trainable, task.new)
    sampler = model.sampler(max_new_tokens=task.new, temperature=1.0, stop_tokens=())
    state = descent.init_state(settings, trainable, seed=0)

    def step() -> dict[str, float]:
        nonlocal state
        clock = [time.perf_counter()]
        batch, base = model.batch(chats, buckets=BUCKETS), trees.merge(state.trainable, frozen)["base"]
        rolled = rollout(model.spec, base, {}, batch, sampler, jax.random.key(0), group)
        clock.append(time.perf_counter())
        rewards = [task.reward(model.processor.decode(row)) for row in rolled.tokens.reshape(-1, task.new)]
        scored = advantages(AdvantageConfig(), np.reshape(rewards, (-1, task.group, 1)), np.ones(1))
        clock.append(time.perf_counter())
        samples = _samples(batch, rolled, scored)
        state, *_ = jax.block_until_ready(update(state, frozen, samples))
        clock.append(time.perf_counter())
        return dict(zip(PHASES, np.diff(clock).tolist(), strict=True))

    return step


def _samples(batch: Any, rolled: Any, scored: Any) -> grpo.Samples:
    """One microbatch [1, B, ...] of a rollout; groups without signal do not count."""
    shape = rolled.lengths.shape
    mask = (rolled.kinds > 0) & ~np.repeat(scored.dead, scored.advantage.shape[1]).reshape(*shape, 1)
    samples = grpo.Samples(
        prompts=batch,
        tokens=rolled.tokens,
        lengths=rolled.lengths,
        mask=mask.astype(np.float32),
        old=rolled.logprobs,
        advantages=scored.advantage.reshape(shape).astype(np.float32),
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], samples)


def _compare(label: str, goal: str, task: Task, sides: Mapping[str, Step], runs: int) -> list[Comparison]:
    """Completions per second of both sides, and their median seconds by phase."""
    kept: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    alternate({side: lambda side=side, step=step: kept[side].append(step()) for side, step in sides.items()}, runs)
    kept = {side: steps[1:] for side, steps in kept.items()}  # the first compiled
    rates = {side: [task.completions / sum(step.values()) for step in steps] for side, steps in kept.items()}
    mine, theirs = median(rates["ours"]), median(rates["peer"])
    found = [Comparison(label, "completions/s", mine, theirs, mine / theirs, goal, rates)]
    for phase in PHASES:
        seconds = {side: [step[phase] for step in steps] for side, steps in kept.items()}
        mine, theirs = median(seconds["ours"]), median(seconds["peer"])
        found.append(Comparison(f"  {phase}", "s", mine, theirs, theirs / mine, "times faster", seconds))
    return found


def _task(prompts: int, new: int, pixels: tuple[int, int]) -> Task:
    """Prompts of unequal length with images of noise; the reward is the length of the text."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (*pixels[::-1], 3), dtype=np.uint8)) for _ in range(prompts)]
    questions = ["what is seen here" + ", and here" * (i % 4) + "?" for i in range(prompts)]
    return Task(questions, images, GROUP, new, reward=lambda text: float(len(text)))


def _chat(question: str, image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def _write(folder: Path, config: BackboneConfig) -> int:
    """A Hugging Face folder with random weights, the tiny backbone's tokenizer and room for large images.

    Returns:
      Millions of parameters.
    """
    write_folder(folder)
    images = folder / "preprocessor_config.json"
    limits = {"size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024}}
    images.write_text(json.dumps(json.loads(images.read_text(encoding="utf-8")) | limits), encoding="utf-8")
    tiny = qwen3_vl.config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    ids = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    config = dataclasses.replace(config, **{name: getattr(tiny, name) for name in ids})
    base = jax.jit(lambda key: qwen3_vl.init(key, config))(jax.random.key(0))
    save_backbone(folder, base, config, hf_config=hf_config(config))
    return round(sum(leaf.size for leaf in jax.tree.leaves(base)) / 1e6)
