"""`jaxmem train` with rewards, on a tiny random Qwen3-VL and chats about pictures."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmem import api
from jaxmem import config as configs
from jaxmem.errors import ConfigError, DataError
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.training import grpo_run, loop, metrics, playing, run, seeds
from jaxmem.training.advantages import AdvantageConfig, advantages
from jaxmem.training.settings import TrainConfig
from tests.helpers import write_tokenizer
from tests.tiny import write_qwen3_vl

STEPS, PROMPTS, GROUP, NEW = 4, 4, 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen3-VL, and prompts with an answer each about pictures beside the file."""
    folder = tmp_path_factory.mktemp("backbone")
    write_tokenizer(folder)
    write_qwen3_vl(folder)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(8):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what is this?"}]
        lines.append(json.dumps({"messages": [{"role": "user", "content": question}], "kind": f"fox {number}"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder, output, rewards=("tests.training.judges:vowels",), loop=None, grpo=None, **changes):
    data = {"path": str(folder / "prompts.jsonl"), "buckets": {"tokens": [64], "patches": [64]}, "threads": 0}
    return {
        "output": str(output),
        "backbone": str(folder),
        "memory": {"name": "pvm", "layers": [1], "latent": 16, "initialiser": "fan_in", "gate": 0.3},
        "data": data,
        "trainable": ["**", "!base/visual"],
        "grpo": {"group": GROUP, "max_new_tokens": NEW, "mask_truncated": False, "samples_every": 2, "samples": 1}
        | {"rewards": {"functions": rewards, "workers": 1}}
        | (grpo or {}),
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0},
        "loop": {
            "steps": STEPS,
            "batch_size": PROMPTS,
            "checkpoint_every": 1,
            "progress": False,
            "tensorboard": False,
            "p_block": 0.5,
        }
        | (loop or {}),
        "remat": False,
    } | changes


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return run.train(settings(folder, output, evaluation={**settings(folder, output)["data"]}))


def leaves(tree):
    return jax.tree.leaves(jax.device_get(tree))


def test_check_38_a_step_on_policy_learns_and_leaves_the_tower_alone(folder, undisturbed):
    """Language model and PVM train, the visual tower is frozen, and sampler and trainer agree."""
    before = api.load(folder)
    jax.tree.map(np.testing.assert_array_equal, before.base["visual"], undisturbed.model.base["visual"])
    layers = zip(leaves(before.base["layers"]), leaves(undisturbed.model.base["layers"]), strict=True)
    assert all(np.abs(old - new).max() > 0 for old, new in layers)
    lines = [line for line in metrics.read(undisturbed.output) if "loss" in line]
    assert len(lines) == STEPS
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert line["clip_ratio/region_mean"] == line["kl"] == line["skipped"] == 0 and line["tokens_in_loss"] > 0
    assert lines[-1]["gate/pvm/layer_1"] != lines[0]["gate/pvm/layer_1"]


def test_metrics_have_the_names_that_people_know(undisturbed):
    first, *_ = [line for line in metrics.read(undisturbed.output) if "loss" in line]
    wanted = (
        "reward reward_std rewards/vowels/mean rewards/vowels/std rewards/vowels/error_rate frac_reward_zero_std kl"
    )
    wanted += " entropy clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean completions/mean_length"
    wanted += " completions/min_length completions/max_length completions/clipped_ratio num_tokens step_time"
    wanted += " completions/mean_terminated_length sampling/sampling_logp_difference/mean"
    wanted += " sampling/sampling_logp_difference/p99 grad_norm lr loss time/rollout time/reward time/update"
    assert set(wanted.split()) <= set(first)
    assert sum(first[f"time/{phase}"] for phase in ("rollout", "reward", "update")) == pytest.approx(1)
    evaluated = [line for line in metrics.read(undisturbed.output) if "eval/reward" in line]
    assert [line["step"] for line in evaluated] == [0, STEPS]
    assert undisturbed.metrics["eval/reward"] == evaluated[-1]["eval/reward"]


def test_samples_show_prompt_picture_completions_and_rewards(undisturbed):
    lines = [json.loads(line) for line in (undisturbed.output / loop.SAMPLES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    for line in lines:
        assert line["prompt"] == "what is this?" and len(line["completions"]) == GROUP
        assert Image.open(undisturbed.output / line["image"]).size == (64, 64)
        for one in line["completions"]:
            vowels = sum(one["text"].count(letter) for letter in "aeiou") / max(1, len(one["text"]))
            assert one["reward"] == pytest.approx(vowels) == one["rewards"]["vowels"]


def test_a_run_that_dies_goes_on_bit_for_bit(folder, undisturbed, tmp_path, monkeypatch):
    """Parameters, optimizer, sampled completions and data: the second start ends where one run ends."""
    step, calls = grpo_run.Trainer.step, []

    def dying(self, *arguments):
        calls.append(arguments[2])
        if len(calls) == 3:
            raise RuntimeError("the power went out")
        return step(self, *arguments)

    config = settings(folder, tmp_path / "run")
    monkeypatch.setattr(grpo_run.Trainer, "step", dying)
    with pytest.raises(RuntimeError, match="power"):
        run.train(config)
    again = run.train(config)
    assert calls == [0, 1, 2, 2, 3]
    for one, other in ((again.model.base, undisturbed.model.base), (again.model.memory, undisturbed.model.memory)):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (tmp_path / "run" / loop.SAMPLES).read_text() == (undisturbed.output / loop.SAMPLES).read_text()
    timed = ("time", "second", "goodput")
    untimed = lambda line: {k: v for k, v in line.items() if not any(word in k for word in timed)}  # noqa: E731
    lines = lambda output: [untimed(line) for line in metrics.read(output) if "loss" in line]  # noqa: E731
    assert lines(again.output) == lines(undisturbed.output)


@pytest.mark.slow
def test_everything_at_once(folder, tmp_path):
    """Two passes, minibatches of microbatches, a reference, the trainer's log-probabilities, resampling, two judges."""
    grpo = {
        "iterations": 2, "minibatches": 2, "old_logprobs": "trainer", "resample": 2, "mask_truncated": True,
        "loss": {"kind": "gspo", "kl_weight": 0.05}, "advantage": {"aggregate": "normalize_then_sum"},
        "max_new_tokens": 24,
    }  # fmt: skip
    rewards = ("tests.training.judges:vowels", {"name": "exact", "column": "kind", "weight": 0.5})
    config = settings(folder, tmp_path / "run", rewards, grpo=grpo, loop={"accumulate": 2, "steps": 2})
    result = run.train({**config, "optimizer": {**config["optimizer"], "learning_rate": 1e-3}})
    assert result.metrics["kl"] > 0 and result.metrics["rewards/exact/mean"] == 0 and not result.metrics["skipped"]


def test_groups_without_signal_are_counted_and_change_nothing(folder, tmp_path):
    """All rewards equal: nothing is learnt, resampling stops at its limit, and an event says so."""
    config = settings(folder, tmp_path / "run", ("tests.training.judges:constant",), {"steps": 1}, {"resample": 1})
    result = run.train(config)
    assert result.metrics["frac_reward_zero_std"] == result.metrics["no_signal"] == 1
    assert result.metrics["groups_resampled"] == 1 and result.metrics["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, result.model.base, api.load(folder).base)
    (event,) = [json.loads(line) for line in (result.output / loop.EVENTS).read_text().splitlines()]
    assert event["event"] == "no_signal" and event["step"] == 1


@pytest.mark.slow
def test_a_mesh_samples_and_learns_the_same(folder, tmp_path):
    """Weights cut over two devices, prompts over four: the completions are those of one device."""
    one, many = (
        run.train(settings(folder, tmp_path / name, loop={"steps": 2}, **mesh))
        for name, mesh in (("one", {}), ("many", {"mesh": {"data": 2, "fsdp": 2, "tensor": 1}}))
    )
    assert many.metrics["reward"] == one.metrics["reward"]
    for ours, theirs in zip(leaves(many.model.base), leaves(one.model.base), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_seeds_are_runs_of_their_own(folder, tmp_path, capsys):
    config = settings(folder, tmp_path, loop={"steps": 1}, seeds=[3, 5])
    with pytest.raises(ConfigError, match="one run"):
        run.train(config)
    assert run.main(config) == 0
    found = json.loads((tmp_path / seeds.FILE).read_text())
    rewards = [metrics.read(tmp_path / f"seed_{seed}")[-1]["reward"] for seed in (3, 5)]
    assert found[0]["name"] == "reward" and found[0]["last"] == rewards and rewards[0] != rewards[1]
    assert f"{np.mean(rewards):.3f} +- {np.std(rewards, ddof=1):.3f} over 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": {"group": 1}}, "group is 1"),
        ({"grpo": {"temperature": 0.0}}, "no spread"),
        ({"grpo": {"minibatches": 3}}, "cannot be dealt"),
        ({"grpo": {"loss": {"kind": "gspo", "normaliser": "tokens"}}}, "contradicts the sequence-level"),
        ({"grpo": {"loss": {"kind": "gpro"}}}, "unknown loss.kind 'gpro'; did you mean"),
        ({"rewards": ({"name": "exact", "column": "answer"},)}, "needs the column 'answer'"),
        ({"rewards": ("tests.training.judges:nothing",)}, "no function 'nothing'"),
    ],
)
def test_bad_settings_are_named(folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run.train(settings(folder, tmp_path / "run", **changes))


def test_a_prompt_beyond_the_longest_bucket_is_named(folder, tmp_path):
    config = settings(folder, tmp_path / "run")
    config["data"] = {**config["data"], "buckets": {"tokens": [16], "patches": [64]}}
    with pytest.raises(DataError, match=r"prompts.jsonl:\d+.*longest bucket is 16"):
        run.train(config)


def played(rewards, lengths, truncated):
    """A Played of which only what rewards and masks need is real."""
    rewards, lengths = np.asarray(rewards, float), np.asarray(lengths, np.int32)
    shape = (*lengths.shape, NEW)
    kinds = (np.arange(NEW) < lengths[..., None]).astype(np.int8)
    zeros = np.zeros(shape, np.float32)
    rolled = playing.Rollout(zeros.astype(np.int32), zeros, kinds, lengths, np.asarray(truncated))
    names = tuple(f"row {i}" for i in range(len(rewards)))
    texts = (("",),) * len(rewards)
    blind = np.zeros(len(rewards), bool)
    return playing.Played(tuple(range(len(rewards))), names, rolled, blind, texts, rewards, (), {"rollout": 0.0})


def test_check_37_truncated_dead_and_unjudged_completions_are_in_no_sum(folder, monkeypatch):
    """And the advantages of a group sum to 0; a group without variance gets 0."""
    config = configs.build(TrainConfig, settings(folder, "out", grpo={"mask_truncated": True}), "config")
    groups = played(
        [[[1.0], [0.0], [0.5]], [[0.5]] * 3, [[1.0], [np.nan], [0.0]], [[0.1], [0.7], [0.3]]],
        [[2, 6, 4], [3, 3, 3], [1, 2, 6], [5, 5, 0]],
        [[False, True, False], [False] * 3, [False, False, True], [False, False, False]],
    )
    compared = advantages(config.grpo.advantage, groups.rewards, np.ones(1))
    assert compared.dead.tolist() == [False, True, False, False]
    np.testing.assert_allclose(compared.advantage.sum(1), 0, atol=1e-12)
    monkeypatch.setattr(grpo_run, "batch_of", lambda *_: None)
    player = type("Player", (), {"buckets": None, "processor": type("Processor", (), {"pad_token": 0})})
    trainer = object.__new__(grpo_run.Trainer)
    for name, value in {"config": config.grpo, "loop": config.loop, "player": player}.items():
        object.__setattr__(trainer, name, value)
    samples = trainer._samples(groups, compared)
    counted = samples.mask.sum(-1).astype(int).tolist()
    assert counted == [[2, 0, 4], [0, 0, 0], [1, 0, 0], [5, 5, 0]]


def test_an_evaluation_hides_the_same_images_each_time_and_as_many_as_training(folder, monkeypatch):
    config = configs.build(TrainConfig, settings(folder, "out"), "config")
    hidden: list[np.ndarray] = []

    @dataclasses.dataclass(frozen=True)
    class Player:
        buckets: Any = None
        rows: int = 0

        def __call__(self, *arguments):
            hidden.append(arguments[6])
            return 0

    trainer, sampler = object.__new__(grpo_run.Trainer), SamplerConfig(max_new_tokens=NEW)
    given = {"config": config.grpo, "loop": config.loop, "player": Player(), "sampler": sampler, "stage": None}
    for name, value in {**given, "cast": lambda tree: tree, "frozen": {}}.items():
        object.__setattr__(trainer, name, value)
    monkeypatch.setattr(grpo_run.grpo_metrics, "of_rewards", lambda *_: {})
    rows = SimpleNamespace(examples=[], names=[])
    evaluate = grpo_run.evaluator(trainer, SimpleNamespace(batch_size=8, epoch=lambda: [rows] * 3), None, 0)
    for _ in range(2):
        evaluate(SimpleNamespace(trainable={}))
    assert np.shape(hidden) == (6, 8) and np.sum(hidden, axis=1).tolist() == [4] * 6
    np.testing.assert_array_equal(hidden[:3], hidden[3:])
    assert len({tuple(one) for one in hidden}) > 1


def test_resampling_replaces_dead_groups_and_keeps_their_number():
    """Live groups of later attempts take the places of dead ones; at the limit dead ones stay."""
    dead_of = lambda p: advantages(AdvantageConfig(), p.rewards, np.ones(1)).dead  # noqa: E731

    def batch(*live):
        count = len(live)
        return played([[[float(x)], [0.0]] for x in live], [[1, 1]] * count, [[False] * 2] * count)

    attempts = iter([batch(0, 0, 7), batch(8, 9, 0)])
    found, count = playing.resampled(batch(5, 0, 0), dead_of, lambda n: next(attempts), 5)
    assert count == 2 and sorted(found.rewards[:, 0, 0].tolist()) == [5, 7, 8] and len(found.names) == 3
    found, count = playing.resampled(batch(5, 0, 0), dead_of, lambda n: batch(0, 0, 0), 2)
    assert count == 2 and found.rewards[:, 0, 0].tolist() == [5, 0, 0]
