"""Training checkpoints: bit for bit, safe against SIGKILL, and only for the run that wrote them."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.checkpoints.best import Score, score_of
from jaxmem.checkpoints.checksum import checksum, checksum_on_host
from jaxmem.checkpoints.identity import run_identity
from jaxmem.checkpoints.native import CheckpointStore
from jaxmem.errors import CheckpointError
from tests.checkpoints.test_memory_files import BACKBONE, CONFIG

RUN = run_identity(BACKBONE, [CONFIG])


def state_of(seed: int):
    """A trainable tree with everything that a run holds."""
    key = jax.random.key(seed)
    tree = {
        "pvm": {
            "kernel": jax.random.normal(key, (3, 8, 16)),
            "gate_alpha": jnp.array([jnp.nan, -0.0, 1e-42], jnp.float32),  # bits that a careless cast would lose
            "half": jax.random.normal(key, (4,)).astype(jnp.bfloat16),
        }
    }
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), jax.tree.map(lambda _: True, tree))
    )
    optimizer = jax.tree.map(lambda x: x + 1, rule.init(tree))
    return {"trainable": tree, "optimizer": optimizer, "key": key, "keys": jax.random.split(key, 4), "lost": 3}


def assert_same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = (
            jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x for x in (a, b)
        )
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype and np.shape(a) == np.shape(b)
        assert np.asarray(jnp.asarray(a)).tobytes() == np.asarray(jnp.asarray(b)).tobytes()


@pytest.mark.parametrize("background", [True, False])
def test_restores_bit_identically(tmp_path, background):
    state = state_of(0)
    with CheckpointStore(tmp_path / "run", RUN, background=background) as store:
        assert store.latest() is None and store.restore(state) is None
        assert store.save(7, state, {"data": {"epoch": 1, "row": 12}})
    with CheckpointStore(tmp_path / "run", RUN) as store:
        abstract = jax.eval_shape(lambda: state_of(1))
        restored = store.restore(abstract)
    assert restored.step == 7 and restored.metadata == {"data": {"epoch": 1, "row": 12}}
    assert_same_bits(restored.state, state)
    draw = lambda s: np.asarray(jax.random.normal(s["keys"][2], (5,)))  # noqa: E731
    np.testing.assert_array_equal(draw(restored.state), draw(state))


def test_key_implementation_is_kept(tmp_path):
    state = {"key": jax.random.key(0, impl="rbg")}
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, state)
        assert jax.random.key_impl(store.restore(state).state["key"]) == jax.random.key_impl(state["key"])
        with pytest.raises(CheckpointError, match=r"key: stored key<rbg>\[\], this run has key<fry>\[\]"):
            store.restore({"key": jax.random.key(0)})


def test_donated_buffers_are_safe_while_saving(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda y: y * 2 + 1, x), donate_argnums=0)
    state, seen = {"w": jnp.arange(500_000.0)}, {}
    with CheckpointStore(tmp_path, RUN, keep=4) as store:
        for number in range(4):
            seen[number] = np.array(state["w"])
            store.save(number, state)
            state = step(state)
        for number, want in seen.items():
            np.testing.assert_array_equal(store.restore(jax.eval_shape(lambda: state), number).state["w"], want)


def test_restores_onto_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    spread = jax.NamedSharding(mesh, jax.P("fsdp"))
    state = {"w": jnp.arange(64.0).reshape(16, 4), "key": jax.random.key(5)}
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, state)
        like = {
            "w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=spread),
            "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=jax.NamedSharding(mesh, jax.P())),
        }
        restored = store.restore(like).state
        assert restored["w"].sharding == spread and len(restored["key"].addressable_shards) == 8
        assert_same_bits(restored, state)
        store.save(2, restored)
        assert_same_bits(store.restore(state).state, state)


def test_keeps_the_newest_and_saves_when_due(tmp_path):
    with CheckpointStore(tmp_path, RUN, keep=2, every=3) as store:
        assert [step for step in range(1, 11) if store.save(step, {"w": jnp.full(3, step)})] == [3, 6, 9]
        assert store.save(10, {"w": jnp.full(3, 10)}, force=True)
        assert not store.save(10, {"w": jnp.full(3, 10)}, force=True)  # already there
        store.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "9", "last.json"]
        assert json.loads((tmp_path / "last.json").read_text()) == {"step": 10}
        assert store.restore({"w": jnp.zeros(3, int)}, 9).state["w"].tolist() == [9, 9, 9]
        with pytest.raises(CheckpointError, match=r"step 6: no such checkpoint; there are \[9, 10\]"):
            store.restore({"w": jnp.zeros(3)}, 6)


def test_checkpoint_of_another_memory_or_backbone(tmp_path):
    state = {"w": jnp.zeros(3)}
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, state)
    others = {
        r"memories.pvm.layers: stored \[1, 4\], this run has \[2, 3\]": run_identity(
            BACKBONE, [dataclasses.replace(CONFIG, layers=(2, 3))]
        ),
        "memories.pvm: stored .*, this run has none": run_identity(BACKBONE),
        "backbone.width: stored 64, this run has 80": run_identity(
            dataclasses.replace(BACKBONE, text=dataclasses.replace(BACKBONE.text, width=80)), [CONFIG]
        ),
    }
    for message, run in others.items():
        with CheckpointStore(tmp_path, run) as store, pytest.raises(CheckpointError, match=message):
            store.restore(state)


def test_other_arrays_and_bad_metadata(tmp_path):
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, {"a": jnp.zeros(3), "b": jnp.zeros(2)})
        with pytest.raises(CheckpointError) as caught:
            store.restore({"a": jnp.zeros(4), "c": jnp.zeros(2)})
        assert "a: stored float32[3], this run has float32[4]" in str(caught.value)
        assert "c: stored none, this run has float32[2]" in str(caught.value)
        assert "b: stored float32[2], this run has none" in str(caught.value)
        with pytest.raises(CheckpointError, match="metadata of step 2 is not JSON"):
            store.save(2, {"a": jnp.zeros(3)}, {"position": object()})
        assert store.latest() == 1


def test_damaged_step_is_named(tmp_path):
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, {"a": jnp.arange(1000.0)})
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with CheckpointStore(tmp_path, RUN) as store, pytest.raises(CheckpointError, match="step 1: cannot be read"):
        store.restore({"a": jnp.zeros(1000)})


def test_a_changed_bit_is_noticed(tmp_path):
    """A file of numbers can be read whatever its bits are; only the checksum knows."""
    state = {"a": jax.random.normal(jax.random.key(0), (100, 30)), "b": jnp.arange(5)}
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, state)
    numbers = max((path for path in (tmp_path / "1" / "state").rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(numbers.read_bytes())
    content[len(content) // 2] ^= 4
    numbers.write_bytes(content)
    with CheckpointStore(tmp_path, RUN) as store:
        with pytest.raises(CheckpointError, match=r"step 1: not the bits that were saved: a; .*doctor --checkpoint"):
            store.restore(state)


def test_checksum_is_the_sum_that_is_documented():
    spread = jax.NamedSharding(jax.make_mesh((4, 2), ("x", "y")), jax.P("y", "x"))
    for dtype in ("float32", "bfloat16", "int32", "uint8", "bool"):
        array = (
            jax.random.normal(jax.random.key(1), (8, 12)) * 3 > 0
            if dtype == "bool"
            else (100 * jax.random.uniform(jax.random.key(1), (8, 12))).astype(dtype)
        )
        words = np.asarray(array).view({1: "u1", 2: "u2", 4: "u4"}[array.dtype.itemsize]).reshape(-1).tolist()
        wanted = sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**32
        assert int(checksum(array)) == int(checksum(jax.device_put(array, spread))) == wanted
        assert checksum_on_host(np.asarray(array), block=7) == wanted
    assert int(checksum(jnp.float32(1.5))) == checksum_on_host(np.float32([1.5])) == 0x3FC00000
    wide = np.arange(10.0) + 0.1
    assert checksum_on_host(wide) == checksum_on_host(wide.view(np.uint32))


@pytest.mark.parametrize("mesh", [(2, 2), (1, 1), (8, 1)])
def test_resumes_on_another_mesh_with_the_same_bits(tmp_path, mesh):
    def on(devices, rule):
        shape = jax.make_mesh(devices, ("fsdp", "tensor"), devices=jax.devices()[: devices[0] * devices[1]])
        return {
            "w": jax.device_put(state["w"], jax.NamedSharding(shape, rule)),
            "key": jax.device_put(state["key"], jax.NamedSharding(shape, jax.P())),
        }

    state = {"w": jax.random.normal(jax.random.key(3), (16, 8)), "key": jax.random.key(5)}
    with CheckpointStore(tmp_path, RUN) as store:
        store.save(1, on((4, 1), jax.P("fsdp")))
    like = on(mesh, jax.P("fsdp", "tensor"))
    with CheckpointStore(tmp_path, RUN) as store:
        restored = store.restore(like).state
        assert restored["w"].sharding == like["w"].sharding
        assert_same_bits(restored, state)
        single = store.restore(state).state
        assert len(single["w"].sharding.device_set) == 1
        assert_same_bits(single, state)


def test_the_best_stay_and_are_named(tmp_path):
    values = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1, 6: None, 7: 0.2}
    like = {"w": jnp.zeros(3)}
    with CheckpointStore(tmp_path, RUN, keep=2, keep_best=2) as store:
        with pytest.raises(CheckpointError, match="no checkpoint has a score; there are"):
            store.restore(like, "best")
        for step, value in values.items():
            score = score_of("", step, {"eval/accuracy": value, "eval/loss": 1.0}) if value else None
            store.save(step, {"w": jnp.full(3, float(step))}, score=score)
    with CheckpointStore(tmp_path, RUN, keep=2, keep_best=2) as store:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6", "7", "best.json", "last.json"]
        assert store.best() == Score(2, "eval/accuracy", 0.9)  # of equal ones the first
        assert store.restore(like, "best").state["w"].tolist() == [2, 2, 2] and store.restore(like).step == 7
        store.save(8, like, score=score_of("eval/loss", 8, {"eval/loss": 5.0}))
        assert store.best() == Score(8, "eval/loss", 5.0)  # judged by something else from now on
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 8, "metric": "eval/loss", "value": 5.0}
    (tmp_path / "best.json").write_text("{")
    CheckpointStore(tmp_path, RUN).close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 8


def test_scores():
    assert score_of("", 1, {"eval/tokens": 3.0}) is None and score_of("", 1, {"eval/loss": float("nan")}) is None
    assert Score(2, "eval/loss", 1.0).beats(Score(1, "eval/loss", 2.0)) and Score(1, "a", 0.0).beats(None)
    assert not Score(2, "eval/reward", 1.0).beats(Score(1, "eval/reward", 1.0))


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; checkpoints need a directory"):
        CheckpointStore(tmp_path / "file", RUN)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with CheckpointStore(tmp_path / "run", RUN) as store:
        monkeypatch.setattr(store._manager, "save", full)
        with pytest.raises(CheckpointError, match="No space left on device.*is the disk full"):
            store.save(1, {"w": jnp.zeros(3)})


CHILD = """
    import sys, jax.numpy as jnp
    from jaxmem.checkpoints.native import CheckpointStore
    store = CheckpointStore(sys.argv[1], {"run": 1}, keep=2)
    step = (store.latest() or 0) + 1
    while True:
        store.save(step, {f"w{i}": jnp.full((500, 200), step + i, jnp.float32) for i in range(10)}, {"row": step})
        print(step, flush=True)
        step += 1
"""


def test_sigkill_while_saving_leaves_a_whole_step(tmp_path):
    directory, rng, last = tmp_path / "run", random.Random(0), 0
    like = {f"w{i}": jax.ShapeDtypeStruct((500, 200), jnp.float32) for i in range(10)}
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(3):
            begun = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with CheckpointStore(directory, {"run": 1}) as store:
            restored = store.restore(like)
            assert restored.step >= begun - 1 > last  # every save but the one in flight
            assert restored.metadata == {"row": restored.step}
            for index in range(10):
                assert (np.asarray(restored.state[f"w{index}"]) == restored.step + index).all()
        last = restored.step
