"""`jaxmem doctor --checkpoint`: what is whole, what is not, and which step a resume would take."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmem import doctor
from jaxmem.checkpoints.best import Score
from jaxmem.checkpoints.examine import examine
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.errors import CheckpointError

IDENTITY = {"seed": 1, "memory": "pvm"}


@pytest.fixture
def run(tmp_path):
    """A run's folder with steps 3, 6 and 9, the best of them 3."""
    (tmp_path / "run.json").write_text(json.dumps({"identity": IDENTITY}))
    state = {"w": jax.random.normal(jax.random.key(0), (60, 40)), "key": jax.random.key(0), "count": jnp.int32(4)}
    with CheckpointStore(tmp_path / "checkpoints", IDENTITY, keep=2) as store:
        for step, value in ((3, 0.5), (6, 0.25), (9, 0.0)):
            about = {"position": {"epoch": 1, "batch": step}}
            store.save(step, state, about, score=Score(step, "eval/reward", value) if value else None)
    return tmp_path


def files_of(run, step):
    return [path for path in (run / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()]


def test_a_run_named_by_a_relative_path(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert doctor.main(checkpoint=run.name) == 0 and "no problems found" in capsys.readouterr().out


def test_a_whole_run(run, capsys):
    (run / "memory").mkdir()
    save_file({"a": np.zeros(3)}, run / "memory" / "memory.safetensors")
    assert doctor.main(checkpoint=str(run)) == 0
    text = capsys.readouterr().out
    assert "a resume takes step 9" in text and "no problems found" in text
    assert "memory.safetensors: 1 tensors" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.split() and line.split()[0].isdigit()}
    assert set(rows) == {"3", "6", "9"} and "best, eval/reward 0.5000, epoch 1, batch 3" in rows["3"]
    assert "last" in rows["9"]
    assert doctor.main(json=True, checkpoint=str(run / "checkpoints")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resume"], found["best"], found["run"]) == (9, 3, IDENTITY)
    assert all(step["arrays"] == 3 and step["bytes"] > 5000 and step["saved"] for step in found["steps"])
    assert len({step["digest"] for step in found["steps"]}) == 1  # the same bits in all three


def test_damage_is_named(run):
    numbers = max(files_of(run, 9), key=os.path.getsize)
    content = bytearray(numbers.read_bytes())
    content[len(content) // 2] ^= 1
    numbers.write_bytes(content)
    for path in files_of(run, 6):
        path.write_bytes(b"")
    shutil.rmtree(run / "checkpoints" / "3" / "about")
    found = examine(run)
    text = "\n".join(found["problems"])
    assert "step 9: w does not hold the bits that were saved" in text
    assert "step 6: w cannot be read" in text and "step 3: is incomplete" in text
    assert "remove its folder and start anew: no step is whole" in text and found["resume"] == 9


def test_half_written_foreign_and_not_finite(run):
    with CheckpointStore(run / "checkpoints", {"seed": 2, "memory": "pvm"}) as store:
        store.save(12, {"w": jnp.array([1.0, jnp.nan, jnp.inf])})
    leftover = run / "checkpoints" / "15.orbax-checkpoint-tmp"
    leftover.mkdir()
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (run / "checkpoints" / "best.json").write_text('{"step": 4}')
    found = examine(run)
    text = "\n".join(found["problems"])
    assert found["unfinished"] == [leftover.name] and leftover.exists()
    assert "step 12: belongs to another run: seed: stored 2, this run has 1" in text
    assert "step 12: w has 2 values that are not finite" in text
    assert "adapter_model.safetensors: cannot be read" in text and "names step 4, which is not there" in text
    assert "remove its folder to go on from step 9" in text


def test_an_old_step_that_was_being_removed_is_no_problem(run):
    shutil.rmtree(run / "checkpoints" / "6" / "about")
    found = examine(run)
    assert found["unfinished"] == ["6"] and found["problems"] == [] and [s["step"] for s in found["steps"]] == [3, 9]


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        examine(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="has neither run.json nor checkpoints"):
        examine(tmp_path)
    (tmp_path / "run.json").write_text("{")
    problems = examine(tmp_path)["problems"]
    assert "run.json is damaged" in problems[0] and "a resume would start at step 0" in problems[1]
