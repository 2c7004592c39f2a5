"""The run around the step, on a model that is one embedding table: resuming, faults, metrics, evaluation."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.data.pipeline import Pipeline
from jaxmem.distributed.mesh import make_mesh
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.training import descent, goodput, loop, metrics, sft, trees
from jaxmem.training.loop import Job, LoopConfig
from jaxmem.training.optimizer import OptimizerConfig
from tests.training.tiny_run import VOCAB, assemble, encode

STEPS, CONFIG = 12, OptimizerConfig(learning_rate=1e-2)
RECORDS = [{"seed": i, "answer": 1 + i % 4} for i in range(20)]
TREE = {"base": {"embed": jax.random.normal(jax.random.key(0), (VOCAB, 8))}, "memory": {"m": jnp.eye(8)}}
TRAINABLE, FROZEN = trees.split(TREE, "memory")


def forward(tree, batch, dropout):
    """Blind rows see a different state; rows whose first pixel is huge overflow."""
    hidden = tree["base"]["embed"][batch.tokens] @ tree["memory"]["m"]
    hidden = jnp.where(batch.blind[:, None, None], -hidden, hidden) * jnp.where(
        batch.patches[:, :1, :1] > 99, jnp.nan, 1
    )
    return hidden, tree["base"]["embed"]


STEP = sft.make_train_step(forward, CONFIG, STEPS, TRAINABLE)
EVAL = sft.make_eval_step(forward)


def encode_spoilt(record):
    """Records with "spoilt" hold a pixel that makes the model overflow."""
    found = encode(record)
    if "spoilt" in record:
        found.patches[0, 0] = 100
    return found


def job(records=RECORDS, steps=STEPS, step=STEP, mesh=None, **settings):
    settings = {"batch_size": 4, "accumulate": 2, "p_block": 0.5, "checkpoint_every": 3, "progress": False} | settings
    settings = {"checkpoint_seconds": 0} | settings
    data = Pipeline(records, encode_spoilt, assemble, 4, shuffle="shuffle" not in settings or settings.pop("shuffle"))

    def evaluate(state):
        batches = [jax.tree.map(jnp.asarray, rows.batch) for rows in data.epoch()]
        return {f"eval/{k}": v for k, v in sft.evaluate(EVAL, state.trainable, FROZEN, batches).items()}

    config = LoopConfig(**settings)
    return Job(config, steps, loop.supervised(step, FROZEN, config, 7, mesh), FROZEN, data, evaluate, mesh)


def start(folder, work, run="this run"):
    with CheckpointStore(folder / "checkpoints", {"run": run}, every=work.config.checkpoint_every) as store:
        return loop.run(work, descent.init_state(CONFIG, TRAINABLE, 1), store, folder)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.trainable), jax.device_get(other.trainable))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.opt_state), jax.device_get(other.opt_state))
    assert int(one.step) == int(other.step)
    assert jax.random.key_data(one.key).tolist() == jax.random.key_data(other.key).tolist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *start(folder, job(eval_every=5))


class Killed(BaseException):
    """Stands for a process that dies without another word."""


def dying(after):
    count = iter(range(after))

    def step(*arguments):
        if next(count, None) is None:
            raise Killed
        return STEP(*arguments)

    return step


@pytest.mark.parametrize("after", [2, 3, 8])
def test_a_run_that_dies_goes_on_bit_for_bit(undisturbed, tmp_path, after):
    folder, state, last = undisturbed
    with pytest.raises(Killed):
        start(tmp_path, job(step=dying(after), eval_every=5))
    with open(tmp_path / metrics.LINES, "a", encoding="utf-8") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # written after the last checkpoint, cut short
    again, also = start(tmp_path, job(eval_every=5))
    same(state, again)
    assert also["loss"] == last["loss"] and also["eval/loss"] == last["eval/loss"]
    untimed = [[_untimed(line) for line in metrics.read(where)] for where in (folder, tmp_path)]
    assert untimed[0] == untimed[1]


def _untimed(line):
    return {name: value for name, value in line.items() if "second" not in name and not name.startswith("goodput/")}


def test_metrics_are_lines_one_per_step_and_evaluations_and_event_files(undisturbed):
    folder, state, last = undisturbed
    lines = metrics.read(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == [5, 10, 12]
    wanted = {
        "loss",
        "accuracy",
        "tokens",
        "grad_norm",
        "lr",
        "skipped",
        "seconds",
        "wait_seconds",
        "tokens_per_second",
    }
    kinds = {f"goodput/{kind}" for kind in (*goodput.KINDS, "seconds")}
    assert wanted | kinds | {"step"} == set(lines[0])
    assert all(abs(sum(line[f"goodput/{kind}"] for kind in goodput.KINDS) - 1) < 1e-9 for line in lines if "lr" in line)
    assert lines[-2]["loss"] == last["loss"] < lines[0]["loss"] and last["step"] == STEPS
    assert list((folder / metrics.BOARD).glob("events.*"))
    with CheckpointStore(folder / "checkpoints", {"run": "this run"}) as store:
        assert store.latest() == STEPS


def test_a_finished_run_is_not_run_again(undisturbed):
    folder, state, last = undisturbed
    again, also = start(folder, job(step=None, eval_every=5))
    same(state, again)
    assert also["loss"] == last["loss"] and also["eval/loss"] == last["eval/loss"]


def test_resume_modes(undisturbed, tmp_path):
    with pytest.raises(CheckpointError, match='"never", and the output directory has a checkpoint of step 12'):
        start(undisturbed[0], job(resume="never"))
    with pytest.raises(CheckpointError, match='"must", and the output directory has no checkpoint'):
        start(tmp_path, job(resume="must"))
    with pytest.raises(CheckpointError, match="stored this run, this run has another"):
        start(undisturbed[0], job(), run="another")


def test_a_signal_ends_the_step_and_leaves_a_checkpoint(undisturbed, tmp_path):
    def step(state, frozen, batches):
        if int(state.step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP(state, frozen, batches)

    with pytest.raises(loop.Interrupted, match="SIGTERM after step 5 of 12"):
        start(tmp_path, job(step=step))
    state, _ = start(tmp_path, job(resume="must"))
    same(undisturbed[1], state)


def test_a_batch_without_finite_loss_is_named_and_skipped(tmp_path):
    records = [*RECORDS[:8], RECORDS[8] | {"spoilt": True}, *RECORDS[9:]]
    start(tmp_path, job(records, steps=5, shuffle=False))
    (line,) = map(json.loads, (tmp_path / loop.SKIPPED).read_text().splitlines())
    assert line["step"] == 3 and line["rows"] == ["row 8", "row 9", "row 10", "row 11"] and line["loss"] == "nan"
    lines = [entry for entry in metrics.read(tmp_path) if "loss" in entry]
    assert [entry["skipped"] for entry in lines] == [0, 0, 1, 0, 0]
    assert lines[2]["loss"] is None and np.isfinite(lines[3]["loss"])


def test_too_many_in_a_row_stop_the_run(tmp_path):
    records = [*RECORDS[:4], *(record | {"spoilt": True} for record in RECORDS[4:])]
    with pytest.raises(loop.NonFiniteError, match=r"2 steps in a row .* step 2 .* row 4, .* step 3 .* row 8"):
        start(tmp_path, job(records, shuffle=False, max_nonfinite=2))
    assert len((tmp_path / loop.SKIPPED).read_text().splitlines()) == 2


def test_eight_devices_give_the_same_run(undisturbed, tmp_path):
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    state, last = start(tmp_path, job(mesh=make_mesh(data=2)))
    assert len(state.trainable["memory"]["m"].sharding.device_set) == 2
    np.testing.assert_allclose(state.trainable["memory"]["m"], undisturbed[1].trainable["memory"]["m"], atol=1e-5)
    with CheckpointStore(tmp_path / "checkpoints", {"run": "this run"}) as store:
        restored, _ = loop.resume(job(mesh=make_mesh(data=2)), descent.init_state(CONFIG, TRAINABLE, 1), store)
    same(state, restored)


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="batch_size 5 is not a multiple of accumulate 2"):
        LoopConfig(batch_size=5, accumulate=2)
    with pytest.raises(ConfigError, match="p_block"):
        LoopConfig(p_block=1.5)
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        LoopConfig(keep=0)
    with pytest.raises(ConfigError, match="checkpoint_seconds must not be negative, got -1"):
        LoopConfig(checkpoint_seconds=-1)


def test_the_clock_makes_checkpoints_and_changes_nothing(undisturbed, tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, job(step=dying(7), checkpoint_every=100, checkpoint_seconds=1e-6, keep=20))
    whole = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert sorted(whole) == list(range(1, 8))[-3:]  # one after every step; the store keeps three
    state, _ = start(tmp_path, job(resume="must", checkpoint_every=100, checkpoint_seconds=1e-6))
    same(undisturbed[1], state)


def test_the_best_evaluation_keeps_its_checkpoint(tmp_path):
    def worse_and_worse(state):
        return {"eval/loss": abs(int(state.step) - 4) + 0.5, "eval/tokens": 1.0}

    work = dataclasses.replace(job(eval_every=2, checkpoint_every=100), evaluate=worse_and_worse)
    with pytest.raises(Killed):
        start(tmp_path, dataclasses.replace(work, step=job(step=dying(9), eval_every=2).step))
    where = tmp_path / "checkpoints"
    assert sorted(path.name for path in where.iterdir()) == ["2", "4", "best.json", "last.json"]
    start(tmp_path, work)  # the best so far is known after a restart: nothing beats step 4
    assert sorted(path.name for path in where.iterdir()) == ["12", "2", "4", "best.json", "last.json"]
    assert json.loads((where / "best.json").read_text()) == {"step": 4, "metric": "eval/loss", "value": 0.5}
    with CheckpointStore(where, {"run": "this run"}) as store:
        assert store.restore(descent.init_state(CONFIG, TRAINABLE, 1), "best").step == 4
    with pytest.raises(ConfigError, match=r"best_metric 'eval/reward' is not among .*\['eval/loss', 'eval/tokens'\]"):
        start(tmp_path / "named", dataclasses.replace(work, config=LoopConfig(batch_size=4, best_metric="eval/reward")))


def test_the_evaluation_in_front_is_written_once_however_often_the_run_begins(tmp_path):
    for _ in range(2):
        with pytest.raises(Killed):
            start(tmp_path, dataclasses.replace(job(step=dying(2)), evaluate_first=True))
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1]


def test_other_data_than_before_are_refused(undisturbed, tmp_path):
    def refused(*arguments, **settings):
        with pytest.raises(CheckpointError) as caught:
            start(undisturbed[0], job(*arguments, **settings))
        return str(caught.value)

    assert "position.records: stored 20, this run has 19" in refused(RECORDS[:-1])
    assert "position.shuffle: stored True, this run has False" in refused(shuffle=False)


def test_the_time_of_steps_that_are_done_again_is_lost(tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, job(step=dying(5)))
    before = metrics.read(tmp_path)[-1]
    for _ in range(2):  # the second time nothing new was learnt before the end
        with pytest.raises(Killed):
            start(tmp_path, job(step=dying(0)))
    _, last = start(tmp_path, job())
    seconds = json.loads((tmp_path / goodput.FILE).read_text())
    spent = {kind: before[f"goodput/{kind}"] * before["goodput/seconds"] for kind in goodput.KINDS}
    assert 0 < seconds["lost"] < spent["step"] + spent["checkpoint"] + spent["input_wait"]
    assert sum(seconds.values()) >= last["goodput/seconds"] > before["goodput/seconds"]
    assert seconds["startup"] > spent["startup"] and last["goodput/lost"] > 0
