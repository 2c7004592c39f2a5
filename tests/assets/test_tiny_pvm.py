"""The shipped memory on the shipped backbone: a task that only the image solves, with text in between."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem import config as configs
from jaxmem import model as functions
from jaxmem.assets import TINY_PVM
from jaxmem.backbones import decoder
from jaxmem.data.boards import BoardDataset, board_tokens, digit_reads
from jaxmem.evaluation.boards import BoardTest, evaluate
from jaxmem.training import run


@pytest.fixture(scope="module")
def model():
    return jaxmem.load(dtype="float32", memory=TINY_PVM)


@functools.partial(jax.jit, static_argnums=0)
def swapped(spec, base, memory, batch, other):
    """Hidden states of `batch` whose memory remembers the images of `other`."""
    prompt, states = functions.read_prompt(spec, base, memory, batch), functions.read_prompt(spec, base, memory, other)
    x, _ = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        prompt.x,
        prompt.angle,
        decoder.among(prompt.stream, prompt.stream),
        ports=prompt.own + functions.memory_ports(spec, memory, states.states, prompt.stream),
    )
    return functions.final_norm(spec, base, x)


def test_check_39_swapping_what_is_remembered_flips_the_answer(model):
    """The backbone's text cannot see the image; the digits that the model names are those of the other board."""
    boards = list(BoardDataset("test", 5, (0,), (4,), size=48))
    others = [
        dataclasses.replace(two, words=one.words, cells=one.cells, digits=tuple(two.grid[c] for c in one.cells))
        for one, two in zip(boards, boards[1:] + boards[:1], strict=True)
    ]
    batch = model.batch([board.messages for board in boards], add_generation_prompt=False)
    batch = batch.replace(blind=np.ones(len(boards), bool))
    other = batch.replace(patches=np.roll(batch.patches, -1, axis=0))
    reads = digit_reads(batch.tokens, batch.loss_mask, board_tokens(model.processor.tokenizer))
    places = np.nonzero(reads)[1].reshape(len(boards), 4)
    digits = np.array(board_tokens(model.processor.tokenizer).digits)

    def read(remembered):
        states = swapped(model.spec, model.base, model.memory, batch, remembered)
        here = jnp.take_along_axis(states, jnp.asarray(places - 1)[..., None], axis=1)
        return np.asarray(functions.logits(model.spec, model.base, here).argmax(-1))

    own, theirs = (digits[np.array([board.digits for board in some])] for some in (boards, others))
    assert (read(batch) == own).mean() > 0.85 and (read(other) == theirs).mean() > 0.85
    assert (read(other) == own).mean() < 0.25  # what equal digits give


FAR = BoardTest(k=(256,), boards=64, cells=4, batch_size=64, seed=3)


def test_check_39_the_memory_reads_where_the_backbone_does_not(model):
    """Long text between image and answer: against gates at zero, which is the backbone bit for bit."""
    closed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "gate_alpha" in jax.tree_util.keystr(path) else leaf, model.memory
    )
    (on,), (off,) = (evaluate(one, FAR) for one in (model, dataclasses.replace(model, memory=closed)))
    assert on.read > off.read + 0.25


@pytest.mark.slow
def test_check_39_an_equal_number_of_parameters_without_the_image_reads_less(model, tmp_path):
    """The MLP branch trains as the shipped memory did, and is of its size."""
    config = configs.load("configs/digits_quickstart.py", [f"--config.output={tmp_path / 'mlp'}"])
    config.memory = {"name": "mlp", "layers": (0, 2), "latent": 32, "initialiser": "fan_in"}
    config.experiment = None
    trained = run.train(config)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one.memory)) for one in (trained.model, model)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01
    (mlp,), (on,) = (evaluate(one, FAR) for one in (trained.model, model))
    assert on.read > mlp.read + 0.1
