"""The branch and the whole decoder against a plain float64 implementation of the published description."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.model import Spec
from tests.memory import oracle
from tests.memory import world as w
from tests.memory.conftest import make_branch

SWITCHES = [
    {},
    {"visibility": "all"},
    {"silence": False},
    {"visibility": "all", "silence": False},
    {"output_norm": False},
]
NAMES = ["default", "all", "loud", "loud-all", "no-output-norm"]


def expected(config, branch):
    params, visual = oracle.float64(branch.params), oracle.float64(branch.visual)
    x = oracle.float64(branch.x)
    segments, rows = np.asarray(branch.batch.segments), np.asarray(branch.batch.visual_rows)
    out = np.zeros((len(config.layers), *x.shape))
    for b in range(len(x)):
        seen = oracle.visible(config, segments[b], rows[b], visual.shape[1])
        for s in range(len(config.layers)):
            out[s, b] = oracle.inject(config, oracle.slot(params, s), x[b], visual[b], seen)
    return out


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("switches", SWITCHES, ids=NAMES)
def test_branch_equals_the_float64_oracle(world, switches, padding):
    branch, config = make_branch(world, w.batch_of(w.rows_of(1), padding)), dataclasses.replace(w.CAUSAL, **switches)
    want = expected(config, branch)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(branch.inject(config), want, atol=1e-5)


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_packed_documents_see_their_own_images(world, config):
    """Two documents in a row: the second, which has an image of its own, cannot ask the first one's."""
    batch = w.batch_of(w.rows_of(1))
    segments = np.array(batch.segments)
    segments[0, 13:24] = 2
    branch = make_branch(world, batch.replace(segments=jnp.asarray(segments)))
    want = expected(config, branch)
    np.testing.assert_allclose(branch.inject(config), want, atol=1e-5)
    assert not want[:, 0, 13:16].any() or config.visibility == "all"


def decoded(world, spec, batch):
    """Hidden states of every valid token, row by row, in float64."""
    memory = world.memory if spec.memories else {}
    prompt = w.read_prompt(spec, world.base, memory, batch)
    base, params = oracle.float64(world.base), oracle.float64(world.params)
    x, angle, features = (oracle.float64(a) for a in (prompt.x, prompt.angle, prompt.own.after_layer[0].slots))
    out = np.zeros_like(x)
    for b in range(len(x)):
        valid = np.asarray(batch.segments)[b] > 0
        rows = np.asarray(batch.visual_rows)[b, valid]
        visual = x[b, valid][rows >= 0]  # the PVM paper: the input sequence gathered at its placeholders
        branches = {}
        for config in spec.memories:
            seen = oracle.visible(config, np.ones(len(rows), int), rows, len(visual))
            for s, layer in enumerate(config.layers):
                branches[layer] = _branch(config, oracle.slot(params, s), visual, seen)
        text = spec.backbone.text
        out[b, valid] = oracle.decoder(text, base, x[b, valid], angle[b, valid], rows, features[:, b], branches)
    return out


def _branch(config, params, visual, seen):
    def run(residual, normed):
        x = residual if config.query == "residual" else normed
        return oracle.inject(config, params, x, visual, seen)

    return run


# Slot s serves layers[s], in whatever order the layers are named.
NORMED = Spec(w.BACKBONE, (dataclasses.replace(w.ALL, query="normed", layers=(4, 1, 3)),))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("spec", [w.BARE, w.WITH_CAUSAL, w.WITH_ALL, NORMED], ids=["bare", "causal", "all", "normed"])
def test_whole_decoder_equals_the_float64_oracle(world, spec, padding):
    """The branch reads the residual after attention, stands beside the FFN, and runs after DeepStack (1.2)."""
    batch = w.batch_of(w.rows_of(1), padding)
    valid = np.asarray(batch.segments) > 0
    run = w.quick_hidden if spec is NORMED else w.hidden
    ours = run(spec, world.base, world.memory if spec.memories else {}, batch)
    np.testing.assert_allclose(np.asarray(ours)[valid], decoded(world, spec, batch)[valid], atol=2e-5)
