"""The image's attention mass against a softmax written out in numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.analysis.attention import image_mass, image_masses
from jaxmem.api import Model
from jaxmem.model import observed
from tests.training import tiny_run

SPEC = tiny_run.SPEC


def brute_force(query, keys, mask, is_visual, places):
    """Loops over rows, places and heads, in float64."""
    rows, heads, group = query.shape[0], query.shape[2], query.shape[2] // keys.shape[2]
    out = np.zeros(places.shape)
    for row in range(rows):
        for column, place in enumerate(places[row]):
            for head in range(heads):
                scores = keys[row, :, head // group] @ query[row, place, head] / np.sqrt(query.shape[-1])
                weights = np.where(mask[row, place], np.exp(scores - scores[mask[row, place]].max()), 0.0)
                out[row, column] += weights[is_visual[row]].sum() / weights.sum() / heads
    return out


def test_masses_equal_brute_force_from_queries_and_keys():
    tree = tiny_run.opened({"memory": tiny_run.tree()["memory"]})
    batch = tiny_run.visual_batch(3, seed=1)
    batch = batch.replace(blind=jnp.array([False, True, False]))
    places = np.array([[6, 9], [7, 8], [3, 10]], np.int32)  # one of them inside the image
    keep = lambda query, keys, values, mask: (query, keys, mask)  # noqa: E731
    layers = jax.jit(lambda: observed(SPEC, tiny_run.tree()["base"], tree["memory"], batch, keep)[1])()
    model = Model(SPEC, tiny_run.tree()["base"], tree["memory"], None, Path())
    found = image_masses(model, batch, places)
    assert found.shape == (SPEC.backbone.text.layers, 3, 2) and found.dtype == np.float32
    for layer, seen in enumerate(zip(*layers, strict=True)):
        query, keys, mask = (np.asarray(array, np.float64 if array.dtype != bool else bool) for array in seen)
        wanted = brute_force(query, keys, mask, np.asarray(batch.is_visual), places)
        np.testing.assert_allclose(found[layer], wanted, atol=2e-6)
    assert (found[:, 1] == 0).all() and (found[:, 0] > 0).all()


def test_even_attention_gives_the_share_of_visible_visual_keys():
    rows, tokens, places = 2, 7, np.array([[2, 6], [4, 5]], np.int32)
    is_visual = np.zeros((rows, tokens), bool)
    is_visual[:, 1:4] = True
    mask = np.broadcast_to(np.tril(np.ones((tokens, tokens), bool)), (rows, tokens, tokens))
    keys = np.random.default_rng(0).normal(size=(rows, tokens, 2, 4)).astype(np.float32)
    query = np.zeros((rows, tokens, 4, 4), np.float32)
    found = image_mass(jnp.asarray(is_visual), jnp.asarray(places))(query, keys, keys, jnp.asarray(mask))
    np.testing.assert_allclose(found, [[2 / 3, 3 / 7], [3 / 5, 3 / 6]], rtol=1e-6)


def test_masses_do_not_depend_on_the_memory_below_its_first_layer():
    batch, places = tiny_run.visual_batch(1, seed=2), np.array([[8]], np.int32)
    model = Model(SPEC, tiny_run.tree()["base"], tiny_run.tree()["memory"], None, Path())
    opened = dataclasses.replace(model, memory=tiny_run.opened({"memory": model.memory})["memory"])
    off, on = image_masses(model, batch, places), image_masses(opened, batch, places)
    first = SPEC.first_port_layer
    np.testing.assert_array_equal(off[: first + 1], on[: first + 1])
    assert (off[first + 1 :] != on[first + 1 :]).any()
