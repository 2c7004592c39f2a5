"""A short run of the quickstart on the shipped backbone: gates move, the loss falls, the report is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxmem import cli
from jaxmem import config as configs
from jaxmem.analysis.digit_boards import open_experiment
from jaxmem.training import metrics
from jaxmem.training.settings import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name", ["digits_quickstart.py", "digits_sft.py", "pvm_qwen3vl.py:2b", "pvm_qwen3vl.py:4b", "pvm_qwen3vl.py:8b"]
)
def test_configurations_are_valid(name):
    config = configs.build(TrainConfig, configs.load(f"{CONFIGS}/{name}"), "config")
    assert (config.experiment is not None) == name.startswith("digits")
    if config.experiment is not None:
        open_experiment(config.experiment)


def test_the_recipe_of_the_paper():
    """the PVM paper: AdamW 1e-4, cosine to 0, warm-up 0.1, 64 rows, one epoch, no blocking."""
    config = configs.build(TrainConfig, configs.load(f"{CONFIGS}/pvm_qwen3vl.py:8b"), "config")
    rates = config.optimizer
    assert (rates.learning_rate, rates.schedule, rates.warmup_ratio, rates.final_fraction) == (1e-4, "cosine", 0.1, 0)
    assert (rates.beta1, rates.beta2, rates.eps, rates.weight_decay, rates.clip_norm) == (0.9, 0.999, 1e-8, 0, 1)
    assert (config.loop.batch_size, config.loop.epochs, config.loop.p_block, config.seed) == (64, 1, 0, 42)
    assert config.memory["layers"] == (8, 16, 24) and config.memory["latent"] == 512
    assert config.trainable == "memory" and config.dtype == "bfloat16" and config.loop.checkpoint_every == 500


@pytest.mark.slow
def test_hundred_steps_of_the_quickstart(tmp_path, capsys):
    words = {
        "output": tmp_path / "run",
        "loop.steps": 100,
        "loop.tensorboard": False,
        "data.boards.k": "(0,)",
        "experiment.test.k": "(0,)",
        "experiment.test.blind_k": "(0,)",
        "experiment.test.boards": 16,
        "experiment.test.batch_size": 16,
        "experiment.shown": 2,
    }
    overrides = [f"--config.{key}={value}" for key, value in words.items()]
    assert cli.main(["train", f"--config={CONFIGS}/digits_quickstart.py", *overrides]) == 0
    history = metrics.read(tmp_path / "run")
    loss = [line["loss"] for line in history]
    assert len(loss) == 100 and np.mean(loss[-25:]) < 0.8 * np.mean(loss[:25])
    for layer in (0, 2):
        assert abs(history[-1][f"gate/pvm/layer_{layer}"]) > 0.01
    assert "image hidden*" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
