"""Configurations of reinforcement learning: they build without their files, and hold the published values."""

import dataclasses
from pathlib import Path

import pytest

from jaxmem import config as configs
from jaxmem.errors import ConfigError
from jaxmem.training.settings import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    return configs.build(TrainConfig, configs.load(f"{CONFIGS}/{name}"), "config")


@pytest.mark.parametrize("name", ["digits_pvm_grpo.py", "digits_pvm_grpo.py:memory"])
def test_the_digit_boards_need_no_files_but_the_clones(name):
    config = load(name)
    assert config.grpo is not None and Path(config.memory_folder or "").is_dir()


@pytest.mark.parametrize("size", ["2b", "4b", "8b"])
@pytest.mark.parametrize("what", ["", "-memory", "-lora"])
def test_the_second_stage_in_all_sizes_and_choices(size, what):
    config = load(f"pvm_qwen3vl_grpo.py:{size}{what}")
    assert config.backbone == f"Qwen3-VL-{size.upper()}-Instruct"
    assert config.memory_folder == f"{load(f'pvm_qwen3vl.py:{size}').output}/memory"
    assert (config.lora is not None) == (what == "-lora")
    trained = {"": ("**", "!base/visual"), "-memory": ("memory",)}
    assert config.trainable == trained.get(what, ("memory", "base/**/lora_a", "base/**/lora_b"))


def test_the_recipe_of_the_second_stage():
    """The PVM paper: 8 prompts of 8 completions, AdamW 1e-6 constant, no KL, clip 0.2, truncated ones left out."""
    config = load("pvm_qwen3vl_grpo.py:8b")
    method, rates = config.grpo, config.optimizer
    assert (method.group, config.loop.batch_size, method.max_new_tokens, method.temperature) == (8, 8, 16384, 1.0)
    assert (method.iterations, method.minibatches, method.mask_truncated, method.resample) == (1, 1, True, 0)
    assert (method.loss.kind, method.loss.kl_weight, method.loss.clip_low, method.loss.high) == ("dapo", 0, 0.2, 0.2)
    assert (method.advantage.scale, method.advantage.eps, method.advantage.ddof) == ("group", 1e-4, 1)
    assert (rates.learning_rate, rates.schedule, rates.warmup_ratio) == (1e-6, "constant", 0)
    assert (method.rewards.labels, method.rewards.weights) == (("pvm",), (1.0,))
    assert (config.loop.epochs, config.loop.eval_every, config.seed, config.dtype) == (1, 10, 42, "bfloat16")


def test_a_wrong_argument_says_what_would_be_right():
    with pytest.raises(ConfigError, match="unknown size '9b'; valid: 2b, 4b, 8b|did you mean '[248]b'"):
        load("pvm_qwen3vl_grpo.py:9b")
    with pytest.raises(ConfigError, match="unknown choice of what trains 'memories'; did you mean 'memory'"):
        load("pvm_qwen3vl_grpo.py:8b-memories")


@pytest.mark.parametrize("preset", ["vr_v1", "vr_v2"])
def test_vision_remembers_recipe_trains_two_stages_and_their_baseline(preset):
    """The recipe of both stages, and of the paired baseline from the same folder, seed and rows."""
    from jaxmem.training import stages

    config = load(f"llava_vr_2b.py:{preset}")
    align, tune, alone, last = stages.plan(config)
    assert align.trainable == ("base/projector", "base/newline", "memory") and tune.trainable == ("**",)
    assert (align.optimizer.learning_rate, align.loop.batch_size) == (1e-3, 256)
    assert (tune.optimizer.learning_rate, tune.loop.batch_size) == (1e-5, 128)
    assert align.optimizer.multipliers == (("memory", 0.1), ("**/gate", 1.0))
    assert tune.optimizer.multipliers == (("base/visual", 0.2),)
    assert align.memory["preset"] == preset and alone.memory is None and last.memory is None
    assert alone.backbone == align.backbone and alone.memory_folder is None
    assert tune.backbone == f"{align.output}/backbone" and last.backbone == f"{alone.output}/backbone"
    assert (alone.seed, alone.data, last.data) == (align.seed, align.data, tune.data)


def test_the_seeds_of_the_digit_facts_share_one_backbone():
    from jaxmem.training import stages

    config = load("digits_comem.py")
    first, second = (stages.plan(dataclasses.replace(config, seed=seed, output=f"x/seed_{seed}")) for seed in (0, 1))
    assert first[0] == second[0] and first[0].output == "runs/digits_comem/backbone"
    assert first[1].backbone == second[1].backbone == "runs/digits_comem/backbone/backbone"
    assert first[1].output != second[1].output and first[1].memory_folder is None
