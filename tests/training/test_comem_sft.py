"""Acceptance checks 20 to 26 of CoMEM: what trains, on which tokens, with which schedule, and again after a stop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxmem import api
from jaxmem import config as configs
from jaxmem.backbones.batch import Batch
from jaxmem.data import knowledge
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.facts import FactDataset
from jaxmem.data.records import JsonlRecords
from jaxmem.errors import ConfigError, DataError
from jaxmem.model import hidden_states, logits
from jaxmem.training import encoding, optimizer, run, sft, trees
from jaxmem.training.descent import init_state
from jaxmem.training.settings import DataConfig, TrainConfig
from tests.backbones.prompts import picture
from tests.memory import comem_world as w

SMALL = {"name": "comem", "latents": 3, "depth": 2, "heads": 4, "rank": 2, "dropout": 0.0, "suffix": ""}
FACT_BUCKETS = {"tokens": [48], "patches": [4], "items": [2], "item_tokens": [16], "item_patches": [4]}
states_of = jax.jit(hidden_states, static_argnames="spec")
FACTS = {"items": [2], "asked": [1], "size": 64, "seed": 3}


def settings(output, **changes):
    data = {"source": "facts", "facts": FACTS, "buckets": FACT_BUCKETS, "threads": 0}
    loop = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "checkpoint_seconds": 0, "progress": False}
    return {
        "output": str(output),
        "memory": SMALL,
        "dtype": "float32",
        "data": data,
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
        "loop": loop,
    } | changes


def digest(tree):
    found = hashlib.sha256()
    for path, leaf in sorted(trees.leaves(tree)):
        found.update(path.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run.train(settings(tmp_path_factory.mktemp("comem")))


def test_check_20_the_backbone_stays_and_the_memory_trains(trained):
    fresh = api.load(dtype="float32").attach(
        "comem", key=jax.random.key(42), **{k: SMALL[k] for k in SMALL if k != "name"}
    )
    assert digest(trained.model.base) == digest(fresh.base)
    before, after = (dict(trees.leaves(model.memory["comem"])) for model in (fresh, trained.model))
    assert before.keys() == after.keys() and sum(path.startswith("q_former") for path in after) == 18
    same = [path for path in after if np.array_equal(before[path], after[path])]
    assert not same  # lora_a moves from the second step on, when lora_b is no longer zero


def grads(model, batch):
    """Gradient of the summed loss by CoMEM's parameters."""
    tree = {"base": model.base, "memory": model.memory}
    trainable, frozen = trees.split(tree, "memory")
    forward = sft.model_forward(model.spec, trainable, remat=False)
    loss = lambda trainable, frozen, batch: sft.token_loss(forward, trainable, frozen, batch).nll  # noqa: E731
    return jax.jit(jax.grad(loss))(trainable, frozen, batch)["memory"]["comem"]


def row(model, question, items, answer="seven dogs", newline=False):
    chat = [*question, {"role": "assistant", "content": answer}]
    read = [knowledge.encode_item(model.processor, model.spec.comem, item) for item in items]
    example = model.processor.encode(chat, newline=newline)
    return knowledge.behind_items(example, read, model.spec.comem, model.processor.pad_token)


@pytest.mark.parametrize(("tower", "reaches"), [("frozen", False), ("encoder", True)])
def test_check_20_the_tower_learns_from_items_and_not_from_questions(tower, reaches):
    model = w.model(query_tower=tower)
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    text_items = [row(model, w.QUESTIONS[0], w.ITEMS[3:])]  # the image is the question's
    found = grads(model, collate(text_items, w.BUCKETS, 0))
    assert (largest(found["encoder"]["visual"]) > 0) is reaches and largest(found["encoder"]["layers"]) > 1e-4
    seen = grads(model, collate([row(model, w.QUESTIONS[1], w.ITEMS[:2])], w.BUCKETS, 0))
    for path, leaf in trees.leaves(seen["encoder"]["visual"]):
        assert float(jnp.abs(leaf).max()) > 0, path


def test_check_21_answers_alone_are_supervised():
    """The loss is the mean cross-entropy of answer, end of turn and line break; memory rows never count."""
    model = w.model()
    examples = [
        row(model, w.QUESTIONS[0], w.ITEMS[:2], newline=True),
        row(model, w.QUESTIONS[1], [], "a fox", newline=True),
    ]
    batch = collate(examples, w.BUCKETS, model.processor.pad_token)
    words = lambda text: model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for at, answer in enumerate(("seven dogs", "a fox")):
        assert batch.tokens[at][batch.loss_mask[at] > 0].tolist() == [*words(f"{answer}<|im_end|>\n")]
    assert not (np.asarray(batch.loss_mask) * (np.asarray(batch.prefix_rows) >= 0)).any()
    states = states_of(model.spec, model.base, model.memory, batch)
    scores = np.asarray(jax.nn.log_softmax(logits(model.spec, model.base, states)), np.float64)
    wanted = [
        -scores[at, place - 1, batch.tokens[at, place]] for at, place in zip(*np.nonzero(batch.loss_mask), strict=True)
    ]
    trainable, frozen = trees.split({"base": model.base, "memory": model.memory}, "memory")
    forward = sft.model_forward(model.spec, trainable)
    total = jax.jit(lambda *trees: sft.token_loss(forward, *trees, batch))(trainable, frozen)
    np.testing.assert_allclose(float(total.nll / total.weight), np.mean(wanted), rtol=1e-5)
    assert float(total.weight) == len(wanted) == len(words("seven dogs")) + len(words("a fox")) + 4


def test_check_22_one_batch_is_learnt_by_heart_from_its_items(tmp_path):
    """And zeros instead of the vectors take the answers away."""
    facts = {**FACTS, "size": 4}
    result = run.train(
        settings(
            tmp_path,
            memory=SMALL | {"latents": 8, "rank": 8},
            data={"source": "facts", "facts": facts, "buckets": FACT_BUCKETS, "shuffle": False, "threads": 0},
            optimizer={"learning_rate": 3e-3, "warmup_ratio": 0.1, "beta2": 0.99},
            loop={"steps": 200, "batch_size": 4, "checkpoint_every": 1000, "progress": False, "tensorboard": False},
        )
    )
    assert result.metrics["loss"] < 0.05
    model, rows = result.model, [FactDataset(**{**facts, "group": 4})[i] for i in range(4)]
    encode, assemble = encoding.encoders(
        DataConfig(source="facts", buckets=Buckets(**FACT_BUCKETS)), model.processor, model.spec
    )
    batch = assemble([encode(fact) for fact in rows])
    vectors = np.stack([model.encode_items(fact.items) for fact in rows]).reshape(4, -1, 128)

    def loss(known: np.ndarray) -> float:
        brought = dataclasses.replace(batch, items=None, vectors=known)
        states = states_of(model.spec, model.base, model.memory, brought)
        scores = jax.nn.log_softmax(logits(model.spec, model.base, states)[:, :-1])
        taken = jnp.take_along_axis(scores, jnp.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
        mask = jnp.asarray(batch.loss_mask)[:, 1:]
        return float(-(taken * mask).sum() / mask.sum())

    assert loss(vectors) < 0.1 < 1.0 < loss(np.zeros_like(vectors))


class TestCheck23:
    """The recipe's optimizer: schedule, decay and clipping."""

    def config(self) -> TrainConfig:
        found = configs.load("configs/comem_qwen25vl_7b.py", [])
        return configs.build(TrainConfig, found, "config")

    def test_schedule(self):
        about, steps = self.config().optimizer, 1950
        rate = optimizer.schedule(about, steps)
        values = np.array([float(rate(step)) for step in range(steps + 1)])
        warm = 59  # ceil(0.03 * 1950)
        np.testing.assert_allclose(values[:warm], 5e-5 * np.arange(warm) / warm, rtol=1e-5, atol=1e-12)
        assert values.argmax() == warm and abs(values.max() - 5e-5) < 1e-11
        progress = np.arange(steps + 1 - warm) / (steps - warm)
        np.testing.assert_allclose(values[warm:], 2.5e-5 * (1 + np.cos(np.pi * progress)), rtol=1e-4, atol=1e-10)

    def test_decay_leaves_biases_and_norms_alone_and_takes_the_latents(self):
        about = dataclasses.replace(self.config().optimizer, learning_rate=1.0, warmup_ratio=0.0, schedule="constant")
        params = {"memory": w.model().memory}
        transform = optimizer.transformation(about, params)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = transform.update(zero, transform.init(params), params)
        decayed = {path for path, leaf in trees.leaves(updates) if np.abs(leaf).max() > 0}
        kept = {path for path, _ in trees.leaves(params)} - decayed
        assert "memory/comem/q_former/latents" in decayed and any(path.endswith("lora_a") for path in decayed)
        assert kept and all(path.rpartition("/")[2] in ("bias", "scale") for path in kept)
        assert not any(path.rpartition("/")[2] in ("bias", "scale") for path in decayed)

    def test_gradients_are_clipped_at_three(self):
        """Exploding gradients move the weights as gradients of norm 3 do; those below are not touched."""
        about = dataclasses.replace(self.config().optimizer, weight_decay=0.0)
        params = {"a": jnp.ones(4), "b": jnp.ones(4)}
        transform = optimizer.transformation(about, params)
        for norm, wanted in ((1e6, 3.0), (2.0, 2.0)):
            grads = {"a": jnp.full(4, norm / 8**0.5), "b": jnp.full(4, norm / 8**0.5)}
            _, state = transform.update(grads, transform.init(params), params)
            first = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)][:2]  # Adam's first moments
            seen = float(optax.global_norm(first)) / 0.1
            np.testing.assert_allclose(seen, wanted, rtol=1e-5)


def test_check_24_eight_microbatches_of_one_row_are_a_batch_of_eight():
    model = w.model()
    examples = [row(model, w.QUESTIONS[i % 2], w.items(2, i), "a fox jumps over " * (1 + i % 3)) for i in range(8)]
    batch = collate(examples, w.BUCKETS, model.processor.pad_token)
    trainable, frozen = trees.split({"base": model.base, "memory": model.memory}, "memory")
    forward = sft.model_forward(model.spec, trainable)
    about = optimizer.OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0, clip_norm=1.0)
    step = sft.make_train_step(forward, about, 10, trainable, donate=False)
    cut = lambda parts: jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(parts, -1, *leaf.shape[1:]), batch)  # noqa: E731
    results = [step(init_state(about, trainable, 0), frozen, cut(parts)) for parts in (1, 8)]
    (one, first), (eight, second) = results
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-5)
    moments = [[leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim] for state in (one, eight)]
    for a, b in zip(*moments, strict=True):  # a tenth of the clipped gradient, and a thousandth of its square
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert one.step == eight.step == 1


def test_check_26_a_run_that_stops_goes_on_bit_for_bit(trained, tmp_path):
    """From a checkpoint in the middle, with shuffled data."""
    shutil.copytree(trained.output, tmp_path / "run")
    last = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert last == 4
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(last))
    shutil.rmtree(tmp_path / "run" / run.MEMORY)
    again = run.train(settings(tmp_path / "run"))
    assert digest(again.model.memory) == digest(trained.model.memory)
    assert again.metrics["loss"] == trained.metrics["loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with items beside a file, as users write them."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number in range(4):
        Image.fromarray(picture(64, 64, number)).save(folder / f"{number}.png")
        items = [{"text": f"a fox and {word}", "image": f"{number}.png"} for word in ("dogs", "wizards")[: number % 3]]
        rows.append({"prompt": "what is this?", "image": f"{number}.png", "answer": "seven", "items": items})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_rows_with_items_are_read_from_a_file(folder):
    model, records = w.model(), JsonlRecords(folder / "rows.jsonl")
    data = DataConfig(path="rows.jsonl", buckets=w.BUCKETS)
    encode, assemble = encoding.encoders(data, model.processor, model.spec)
    batch = assemble([encode(record) for record in records])
    assert isinstance(batch, Batch) and batch.items.tokens.shape[:2] == (4, 2)
    assert (np.asarray(batch.items.segments).max(axis=-1) > 0).sum(axis=1).tolist() == [0, 1, 2, 0]
    inside, _ = encoding.encoders(dataclasses.replace(data, items="prompt"), model.processor, model.spec)
    shown = inside(records[2])
    assert shown.prefix_rows is None and len(shown.images) == 3 and len(shown) > len(encode(records[2])) - 6
    without, _ = encoding.encoders(dataclasses.replace(data, items="none"), model.processor, model.spec)
    assert len(without(records[2])) == len(encode(records[2])) - 2 * 3


def test_items_without_a_place_to_go_are_refused(folder):
    bare = w.pair("qwen3_vl")[0]
    encode, _ = encoding.encoders(DataConfig(path="rows.jsonl"), bare.processor, bare.spec)
    with pytest.raises(DataError, match='no CoMEM for them; set data.items to "prompt" or "none"'):
        encode(JsonlRecords(folder / "rows.jsonl")[1])
    with pytest.raises(ConfigError, match='set memory.name to "comem"'):
        encoding.encoders(DataConfig(source="facts"), bare.processor, bare.spec)
    with pytest.raises(DataError, match="items is 3; give a list"):
        encode({"messages": [{"role": "user", "content": "a"}], "items": 3})


def test_dropout_of_the_factors_is_off_in_evaluation_and_keeps_the_mean():
    model = w.model(dropout=0.5)
    batch = collate([row(model, w.QUESTIONS[1], w.ITEMS[:2])], w.BUCKETS, 0)
    valid = np.asarray(batch.segments) > 0
    states = lambda key: states_of(model.spec, model.base, model.memory, batch, dropout=key)  # noqa: E731
    plain = np.asarray(states(None))[valid]
    one, same, other = (np.asarray(states(jax.random.key(seed)))[valid] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - plain).max() > 0.1
    undropped = w.model()
    np.testing.assert_array_equal(
        plain, np.asarray(states_of(undropped.spec, undropped.base, undropped.memory, batch))[valid]
    )
