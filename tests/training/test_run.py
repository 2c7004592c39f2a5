"""`jaxmem train` from a Hugging Face folder to a trained memory, killed and started again on the way."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmem import api
from jaxmem import config as configs
from jaxmem.errors import CheckpointError, ConfigError, DataError
from jaxmem.training import encoding, metrics, record, run
from jaxmem.training import settings as settings_of
from tests.helpers import write_tokenizer
from tests.tiny import write_qwen3_vl

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen3-VL, and a chat per line about pictures beside the file."""
    folder = tmp_path_factory.mktemp("backbone")
    write_tokenizer(folder)
    write_qwen3_vl(folder)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(24):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what is this?"}]
        answer = "seven lazy dogs" if number % 2 else "a fox and a picture of colours"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": chat}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder, output, **changes):
    data = {"path": str(folder / "chats.jsonl"), "buckets": {"tokens": [64], "patches": [64]}}
    return {
        "output": str(output),
        "backbone": str(folder),
        "memory": {"name": "pvm", "layers": [1], "latent": 16, "initialiser": "fan_in"},
        "data": data,
        "evaluation": data,
        "optimizer": {"learning_rate": 1e-2, "multipliers": [["**/gate_alpha", 5.0]]},
        "loop": {
            "steps": STEPS,
            "batch_size": 4,
            "accumulate": 2,
            "p_block": 0.5,
            "checkpoint_every": 5,
            "eval_every": 20,
            "progress": False,
        },
    } | changes


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    return run.train(settings(folder, tmp_path_factory.mktemp("undisturbed")))


def test_a_run_learns_and_leaves_a_memory_that_loads(folder, undisturbed):
    lines = [line for line in metrics.read(undisturbed.output) if "loss" in line]
    assert undisturbed.steps == STEPS and len(lines) == STEPS
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert lines[-1]["gate/pvm/layer_1"] != 0 and {"eval/loss", "eval/accuracy"} <= set(undisturbed.metrics)
    model = api.load(folder, memory=undisturbed.output / run.MEMORY)
    jax.tree.map(np.testing.assert_array_equal, model.memory, undisturbed.model.memory)
    jax.tree.map(np.testing.assert_array_equal, model.base, undisturbed.model.base)
    about = json.loads((undisturbed.output / record.FILE).read_text())
    assert about["versions"]["jax"] == jax.__version__ and about["config"]["loop"]["steps"] == STEPS
    assert about["config"]["optimizer"]["eps"] == 1e-8 and len(about["identity"]["dataset"]) == 64


def test_sigkill_at_a_random_step_changes_nothing(folder, undisturbed, tmp_path):
    output, at = tmp_path / "killed", random.randrange(6, STEPS - 8)
    config = settings(folder, output)
    program = f"from jaxmem.training import run; run.train({config!r})"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    while process.poll() is None and len(metrics.read(output)) < at:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    survived = [line["step"] for line in metrics.read(output) if "loss" in line]
    again = run.train(config)
    jax.tree.map(np.testing.assert_array_equal, again.model.memory, undisturbed.model.memory)
    for name in ("loss", "eval/loss", "grad_norm"):
        assert again.metrics[name] == undisturbed.metrics[name]
    steps = [line["step"] for line in metrics.read(output) if "loss" in line]
    assert steps == list(range(1, STEPS + 1)) and at - 1 <= len(survived) < STEPS
    losses = [
        [line["loss"] for line in metrics.read(where) if "loss" in line] for where in (output, undisturbed.output)
    ]
    assert losses[0] == losses[1]


def test_the_directory_of_another_run_is_refused(folder, undisturbed):
    config = settings(folder, undisturbed.output, seed=1)
    with pytest.raises(CheckpointError, match="belongs to another run: seed: stored 42, this run has 1"):
        run.train(config)
    (folder / "other.jsonl").write_text((folder / "chats.jsonl").read_text().replace("lazy", "quick"))
    config = settings(folder, undisturbed.output)
    with pytest.raises(CheckpointError, match="belongs to another run: dataset"):
        run.train(config | {"data": config["data"] | {"path": str(folder / "other.jsonl")}})


def test_a_finished_run_may_be_shown_and_cut_otherwise(folder, undisturbed):
    config = settings(folder, undisturbed.output)
    again = run.train(config | {"loop": config["loop"] | {"accumulate": 1, "log_every": 5, "keep": 2}})
    jax.tree.map(np.testing.assert_array_equal, again.model.memory, undisturbed.model.memory)
    assert again.metrics["loss"] == undisturbed.metrics["loss"]


def test_training_the_decoder_leaves_the_visual_tower_and_saves_a_backbone(folder, tmp_path):
    config = settings(folder, tmp_path, trainable=["**", "!base/visual"], evaluation=None)
    result = run.train(config | {"loop": config["loop"] | {"steps": 2}, "optimizer": {"warmup_ratio": 0.0}})
    before, after = api.load(folder).base, api.load(tmp_path / run.BACKBONE).base
    jax.tree.map(np.testing.assert_array_equal, before["visual"], after["visual"])
    assert np.any(before["layers"]["ffn"]["up"]["kernel"] != after["layers"]["ffn"]["up"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, after, result.model.base)


def test_bad_input_is_named_before_anything_is_written(folder, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"unknown key 'config.optimizer.learning_rat'.*learning_rate"):
        run.train(settings(folder, output, optimizer={"learning_rat": 1}))
    with pytest.raises(ConfigError, match="data.path is empty"):
        run.train(settings(folder, output, data={}))
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl is empty"):
        run.train(settings(folder, output, data={"path": str(folder / "empty.jsonl")}))
    with pytest.raises(ValueError, match="'memory/pwm' matches no parameter"):
        run.train(settings(folder, output, trainable="memory/pwm"))
    with pytest.raises(ConfigError, match="1 rows per microbatch cannot be shared by mesh data x fsdp = 2"):
        run.train(settings(folder, output, loop={"batch_size": 1}, mesh={"data": 2}))
    assert not output.exists()


def test_a_broken_image_names_record_file_and_line(folder, tmp_path):
    lines = (folder / "chats.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace("2.png", "chats.jsonl")
    (folder / "broken.jsonl").write_text("\n".join(lines[:4]))
    config = settings(folder, tmp_path, evaluation=None)
    config["data"] = config["data"] | {"path": str(folder / "broken.jsonl")}
    with pytest.raises(DataError, match=r"1 of 4 records .*broken.jsonl:3: image 0 of"):
        run.train(config)


def test_digit_boards_are_a_source_with_one_length_per_batch(folder):
    boards = {"k": [0, 30], "size": 40, "seed": 3}
    buckets = {"tokens": [64, 100, 128, 256], "patches": [64]}
    wanted = {"output": "x", "data": {"source": "boards", "boards": boards, "buckets": buckets}}
    config = configs.build(settings_of.TrainConfig, wanted, "config")
    source = encoding.open_source(config.data, 8)
    assert source.group == 8 and dataclasses.replace(source, group=1) == config.data.boards
    model = api.load(folder)
    fast = encoding.encoders(config.data, model.processor, model.spec)
    slow = encoding.encoders(settings_of.DataConfig(path="x", buckets=config.data.buckets), model.processor, model.spec)
    assert fast[0](source[0]) is not None and not hasattr(fast[0](source[0]), "tokens")
    for place in (0, 8, 16, 24):
        boards = [source[place + i] for i in range(8)]
        batches = [assemble([encode(board) for board in boards]) for encode, assemble in (fast, slow)]
        for field in dataclasses.fields(batches[0]):
            if field.name != "patch_table":  # rows of weight 0 may differ
                np.testing.assert_array_equal(*(getattr(batch, field.name) for batch in batches), field.name)


def test_a_config_with_every_key_spelt_out_is_the_same_config():
    data = settings_of.DataConfig(path="x.jsonl")
    config = settings_of.TrainConfig(output="out", data=data, evaluation=data, trainable=("**", "!base/visual"))
    spelt = settings_of.config_dict(config)
    assert configs.build(settings_of.TrainConfig, spelt, "config") == config
    assert {"seed", "optimizer.eps", "loop.p_block", "data.boards.k"} <= set(configs.keys(spelt))
