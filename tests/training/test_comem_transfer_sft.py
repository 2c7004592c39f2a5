"""Training CoMEM for a text-only model: what learns, from what, and what stays as it was."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.distributed import mesh as meshes
from jaxmem.errors import CheckpointError, ConfigError
from jaxmem.training import descent, optimizer, placing, run, sft, trees
from tests.memory import comem_world as w
from tests.memory import transfer_world as t

MEMORY = {"name": "comem", **w.SMALL, "alpha": 2.0}
BUCKETS = {"tokens": [128], "patches": [32], "items": [2], "item_tokens": [64], "query_tokens": [64]}


def digest(tree):
    found = hashlib.sha256()
    for path, leaf in sorted(trees.leaves(tree)):
        found.update(path.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer")
    t.write_target(root / "target")
    t.write_encoder(root / "encoder")
    t.rows_file(root)
    return root


def settings(folders, output, **changes):
    data = {"path": str(folders / "rows.jsonl"), "buckets": BUCKETS, "threads": 0, "shuffle": False, "newline": True}
    loop = {"steps": 50, "batch_size": 4, "checkpoint_every": 1000, "progress": False, "tensorboard": False}
    return {
        "output": str(output),
        "backbone": str(folders / "target"),
        "encoder": str(folders / "encoder"),
        "memory": MEMORY,
        "dtype": "float32",
        "min_pixels": 28 * 28,
        "data": data,
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
        "loop": loop,
    } | changes


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    return run.train(settings(folders, tmp_path_factory.mktemp("run")))


def test_the_memory_learns_and_both_backbones_stay(folders, trained):
    lines = [json.loads(line) for line in (trained.output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 50 and losses[-1] < 0.5 * losses[0]
    fresh = jaxmem.load(folders / "target", "float32", encoder=folders / "encoder")
    fresh = fresh.attach("comem", key=jax.random.key(42), **{k: v for k, v in MEMORY.items() if k != "name"})
    assert digest(trained.model.base) == digest(fresh.base) and "encoder" in fresh.base
    before, after = (dict(trees.leaves(model.memory["comem"])) for model in (fresh, trained.model))
    assert before.keys() == after.keys()
    assert not [path for path in after if np.array_equal(before[path], after[path])]


def test_what_was_trained_is_loaded_again(folders, trained):
    encoder, memory = folders / "encoder", trained.output / "memory"
    again = jaxmem.load(folders / "target", "float32", memory=memory, encoder=encoder, min_pixels=28 * 28)
    assert again.spec == trained.model.spec
    ask = {"buckets": t.BUCKETS, "max_new_tokens": 6, "items": [w.ITEMS[:2]]}
    assert again.generate(t.QUESTIONS[:1], **ask) == trained.model.generate(t.QUESTIONS[:1], **ask)
    with pytest.raises(CheckpointError, match="name its folder as `encoder`"):
        jaxmem.load(folders / "target", memory=memory)


def split(model):
    return trees.split({"base": model.base, "memory": model.memory}, "memory")


def batch(model):
    """Four rows with 0, 1, 3 and 1 items; the third has no image of its own."""
    known = (w.ITEMS[:0], w.ITEMS[:1], w.ITEMS[:3], w.ITEMS[2:3])
    questions = (*t.QUESTIONS[::2], t.QUESTIONS[1], t.QUESTIONS[0])
    return t.batch_of(model, *(t.record(q, "seven dogs", k) for q, k in zip(questions, known, strict=True)))


def test_gradients_reach_all_of_the_memory_through_items_and_prompts():
    model = t.model(48)
    trainable, frozen = split(model)
    forward = sft.model_forward(model.spec, trainable, remat=True)
    loss = lambda trainable, frozen, batch: sft.token_loss(forward, trainable, frozen, batch).nll  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    found = gradient(trainable, frozen, batch(model))
    assert set(found) == {"memory"} and set(frozen) == {"base"}
    assert not [path for path, leaf in trees.leaves(found) if not float(jnp.abs(leaf).max()) > 0]
    alone = gradient(trainable, frozen, t.batch_of(model, t.record(t.QUESTIONS[0], "seven dogs")))["memory"]["comem"]
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert largest(alone["encoder"]["visual"]) > 0 and largest(alone["encoder"]["layers"]) > 0  # by the prompt alone
    assert largest(alone["q_former"]) == 0
    assert largest(alone["adapter"]) > 0


@pytest.mark.slow
def test_a_mesh_of_devices_learns_what_one_does():
    model, about = t.model(), optimizer.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0)

    def learnt(mesh):
        with meshes.current(mesh):
            tree = {"base": model.base, "memory": model.memory}
            tree = tree if mesh is None else jax.device_put(tree, meshes.shardings(mesh, tree))
            trainable, frozen = trees.split(tree, "memory")
            step = sft.make_train_step(sft.model_forward(model.spec, trainable), about, 10, trainable, donate=False)
            state, found = descent.init_state(about, trainable, 0), []
            for _ in range(2):
                state, metrics = step(state, frozen, placing.place(batch(model), 2, mesh))
                found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            return np.array(found)

    wanted = learnt(None)
    np.testing.assert_allclose(learnt(meshes.make_mesh(data=2, fsdp=2, tensor=2)), wanted, rtol=1e-4)
    assert wanted[0, 0] != wanted[1, 0]


def test_runs_that_would_train_or_lose_an_encoder_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match='add "!base/encoder"'):
        run.train(settings(folders, tmp_path, trainable=("base", "memory")))
    with pytest.raises(ConfigError, match='the model has none: set memory.name to "comem"'):
        run.train(settings(folders, tmp_path, memory=None, trainable="base"))
    with pytest.raises(ConfigError, match="in a training run config.encoder"):
        run.train(settings(folders, tmp_path, encoder="", memory=MEMORY | {"encoder": str(folders / "encoder")}))
