"""Acceptance checks 19 to 25 of PVM: who is silenced, what is remembered, and who may see it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import pvm
from tests.memory import oracle
from tests.memory import world as w


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_check_19_silencing_touches_visual_positions_alone(branch, config):
    silent = np.asarray(branch.inject(config))
    loud = np.asarray(branch.inject(dataclasses.replace(config, silence=False)))
    visual = np.asarray(branch.batch.is_visual)
    np.testing.assert_array_equal(silent[:, ~visual], loud[:, ~visual])
    assert not silent[:, visual].any()
    assert np.abs(loud[:, visual]).max() > 0.1


def test_check_19_vision_start_and_end_are_text(branch):
    tokens, pictured = np.asarray(branch.batch.tokens), np.asarray(branch.batch.is_visual).any(1)[:, None]
    for token, config in ((w.START, w.ALL), (w.END, w.ALL), (w.END, w.CAUSAL)):
        chosen = branch.text & (tokens == token) & pictured
        assert chosen.sum() == 4
        rms = np.sqrt(np.mean(np.square(branch.inject(config)), -1))[:, chosen]
        np.testing.assert_allclose(rms, np.broadcast_to(np.abs(w.GATES)[:, None], rms.shape), rtol=1e-2)


def test_check_20_memory_is_the_main_mergers_output(world):
    batch = w.batch_of(w.rows_of(5))
    prompt = w.read_prompt(w.WITH_CAUSAL, world.base, world.memory, batch)
    state, x = prompt.states["pvm"], np.asarray(prompt.x)
    params = oracle.float64(world.params)
    for b, rows in enumerate(np.asarray(batch.visual_rows)):
        visual = x[b][rows >= 0].astype(np.float64)  # the input sequence at its placeholders, in their order
        for s in range(3):
            keys, values = oracle.keys_values(w.CAUSAL, oracle.slot(params, s), visual)
            np.testing.assert_allclose(state.keys[s, b, : len(visual)], keys, atol=1e-5)
            np.testing.assert_allclose(state.values[s, b, : len(visual)], values, atol=1e-5)
        assert np.asarray(state.segments)[b].tolist() == [1] * len(visual) + [0] * (9 - len(visual))
        assert np.asarray(state.order)[b, : len(visual)].tolist() == np.flatnonzero(rows >= 0).tolist()


def test_check_20_only_the_main_merger_reaches_the_memory(world):
    batch = w.batch_of(w.rows_of(5))

    def remembered(**changed):
        base = {**world.base, "visual": {**world.base["visual"], **changed}}
        prompt = w.read_prompt(w.WITH_CAUSAL, base, world.memory, batch)
        return prompt.states["pvm"], prompt.own.after_layer[0].slots

    state, features = remembered()
    louder = lambda tree: jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, tree)  # noqa: E731
    other, moved = remembered(deepstack=louder(world.base["visual"]["deepstack"]))
    jax.tree.map(np.testing.assert_array_equal, other, state)
    assert np.abs(np.asarray(moved - features)).max() > 0.1
    other, same = remembered(merger=louder(world.base["visual"]["merger"]))
    np.testing.assert_array_equal(same, features)
    assert np.abs(np.asarray(other.keys - state.keys)).max() > 0.1
    assert np.abs(np.asarray(other.values - state.values)).max() > 0.1


def test_check_21_permutation(branch):
    """Visual rows are a set: with their places they may lie in any order, and with `all` in any place."""
    out, order = branch.inject(w.ALL), np.array([4, 0, 8, 2, 6, 1, 7, 3, 5])
    rows = np.asarray(branch.batch.visual_rows)
    moved = np.where(rows >= 0, np.argsort(order)[rows], -1).astype(np.int32)
    turned = dataclasses.replace(
        branch, batch=branch.batch.replace(visual_rows=jnp.asarray(moved)), visual=branch.visual[:, order]
    )
    np.testing.assert_allclose(turned.inject(w.ALL), out, rtol=0, atol=1e-6)
    np.testing.assert_allclose(turned.inject(w.CAUSAL), branch.inject(w.CAUSAL), rtol=0, atol=1e-6)
    swapped = np.array(branch.visual)
    swapped[0, :8], swapped[1, :3] = swapped[0, [7, 2, 5, 0, 1, 6, 3, 4]], swapped[1, [2, 0, 1]]
    np.testing.assert_allclose(branch.inject(w.ALL, visual=jnp.asarray(swapped)), out, rtol=0, atol=1e-6)
    assert (
        np.abs(np.asarray(branch.inject(w.CAUSAL, visual=jnp.asarray(swapped)) - branch.inject(w.CAUSAL))).max() > 0.05
    )


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_check_21_duplication_and_padding(branch, config):
    out, state = branch.inject_and_state(config)
    twice = w.through(config, branch.params, pvm.append(state, state), branch.stream, branch.x)
    np.testing.assert_allclose(twice, out, rtol=0, atol=1e-6)
    garbage = 100 * jax.random.normal(jax.random.key(0), (4, 5, 48))
    wider = jnp.concatenate([branch.visual, garbage.at[0, 0, 0].set(jnp.nan)], 1)
    np.testing.assert_allclose(branch.inject(config, visual=wider), out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_check_22_attention_is_a_distribution_over_what_is_seen(branch, config):
    _, state = branch.inject_and_state(config)
    weights, seen = (np.asarray(a) for a in w.weights(config, branch.params, state, branch.stream, branch.x))
    assert weights.dtype == np.float32 and weights.shape == (3, 4, 2, 2, w.TOKENS, 9)
    batch = branch.batch
    for b, (segments, rows) in enumerate(zip(np.asarray(batch.segments), np.asarray(batch.visual_rows), strict=True)):
        np.testing.assert_array_equal(seen[b], oracle.visible(config, segments, rows, 9))
    every = np.broadcast_to(seen[None, :, None, None], weights.shape)
    assert np.all(weights[~every] == 0) and np.all(weights[every] > 0)
    sums = weights.sum(-1)
    any_seen = np.broadcast_to(seen.any(-1)[None, :, None, None], sums.shape)
    np.testing.assert_allclose(sums[any_seen], 1, atol=1e-6)
    assert np.all(sums[~any_seen] == 0)


def test_check_22_a_single_visual_row_answers_every_query_alike(branch):
    """Row 3 has one visual token at place 3: its weight is 1 and the injection is one vector."""
    _, state = branch.inject_and_state(w.CAUSAL)
    weights, _ = w.weights(w.CAUSAL, branch.params, state, branch.stream, branch.x)
    assert np.all(np.asarray(weights)[:, 3, :, :, 4:8, 0] == 1)
    out = np.asarray(branch.inject(w.CAUSAL))[:, 3, 4:8]
    assert np.abs(out).max() > 0.1
    np.testing.assert_allclose(out, np.broadcast_to(out[:, :1], out.shape), rtol=0, atol=1e-6)
    other = np.asarray(branch.inject(w.CAUSAL, x=branch.x[:, ::-1] ** 2))[:, 3, 4:8]
    np.testing.assert_allclose(other, out, rtol=0, atol=1e-6)


def first_image_ends(batch):
    """Per row, the place behind the first image's last placeholder."""
    ends = []
    for row in np.asarray(batch.is_visual):
        start = int(np.argmax(row))
        ends.append(start + int(np.argmin(row[start:])) if row.any() else len(row))
    return ends


@pytest.mark.parametrize("padding", ["right", "left"])
def test_check_23_visibility(world, padding):
    batch = w.batch_of(w.rows_of(6), padding)
    bare = np.asarray(w.hidden(w.BARE, world.base, {}, batch))
    causal = np.asarray(w.hidden(w.WITH_CAUSAL, world.base, world.memory, batch))
    everywhere = np.asarray(w.hidden(w.WITH_ALL, world.base, world.memory, batch))
    starts = np.asarray(batch.segments).argmax(1)
    for row, end in enumerate(first_image_ends(batch)):
        np.testing.assert_array_equal(causal[row, starts[row] : end], bare[row, starts[row] : end])
        if end < w.TOKENS:
            assert np.abs(causal[row, end] - bare[row, end]).max() > 1e-2  # vision_end is the first to see
            assert np.abs(everywhere[row, starts[row]] - bare[row, starts[row]]).max() > 1e-2


def test_check_24_causal_means_causal(world):
    """Nothing behind a token, text or image, of whatever size, changes it; with `all` it does."""
    heads = [w.example(parts, seed) for seed, parts in enumerate([(3, (2, 3), 2), ((3, 1), 4), (5,), (2,)])]
    tails = [(3, (1, 2), 3), (2,), ((2, 2), 3), ((1, 1), 3)]
    others = [(1, (2, 1), 6), ((1, 1), 1), (4,), ((3, 1), 2)]
    make = lambda parts, seed: w.batch_of(  # noqa: E731
        [w.join(head, w.example(tail, seed + i)) for i, (head, tail) in enumerate(zip(heads, parts, strict=True))]
    )
    one, two = make(tails, 100), make(others, 200)
    causal = [w.logits(w.BARE, world.base, w.hidden(w.WITH_CAUSAL, world.base, world.memory, b)) for b in (one, two)]
    loose = [w.logits(w.BARE, world.base, w.hidden(w.WITH_ALL, world.base, world.memory, b)) for b in (one, two)]
    for row, head in enumerate(heads):
        np.testing.assert_array_equal(*(np.asarray(scores)[row, : len(head)] for scores in causal))
        assert np.any(np.asarray(causal[0])[row, len(head) :] != np.asarray(causal[1])[row, len(head) :])
        assert np.any(np.asarray(loose[0])[row, : len(head)] != np.asarray(loose[1])[row, : len(head)])


def last_of(states, batch):
    """[B, D]: each row's last valid token."""
    lengths = w.TOKENS - np.argmax(np.asarray(batch.segments)[:, ::-1] > 0, axis=1)
    return np.asarray(states)[np.arange(len(lengths)), lengths - 1]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_check_25_two_turns_equal_one_forward(world, padding):
    firsts = [(3, (2, 3), 2), ((3, 1), 4), (5,), (2, (1, 1), 1)]
    seconds = [(2, (1, 2), 3), (3,), (1, (2, 2), 2), ((1, 2), 1)]
    turns = [(w.example(a, 30 + i), w.example(b, 60 + i)) for i, (a, b) in enumerate(zip(firsts, seconds, strict=True))]
    whole = w.batch_of([w.join(*pair) for pair in turns])
    run = lambda batch: w.hidden(w.WITH_CAUSAL, world.base, world.memory, batch)  # noqa: E731

    first, second = w.batch_of([a for a, _ in turns], padding), w.batch_of([b for _, b in turns])
    states, kept = w.prefill(w.WITH_CAUSAL, world.base, world.memory, first, w.SLOTS)
    np.testing.assert_allclose(states, last_of(run(first), first), rtol=0, atol=1e-5)
    states, kept = w.extend(w.WITH_CAUSAL, world.base, world.memory, kept, second)
    np.testing.assert_allclose(states, last_of(run(whole), whole), rtol=0, atol=1e-5)
    memory = kept.states["pvm"]
    assert memory.keys.shape[2] == 18
    assert (np.asarray(memory.segments) > 0).sum(1).tolist() == [8, 3, 4, 3]  # earlier images stay

    third = [w.example((3,), 90 + i) for i in range(4)]  # a turn without images reads both
    states, later = w.extend(w.WITH_CAUSAL, world.base, world.memory, kept, w.batch_of(third, tokens=3))
    longer = w.batch_of([w.join(w.join(*pair), turn) for pair, turn in zip(turns, third, strict=True)])
    np.testing.assert_allclose(states, last_of(run(longer), longer), rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, later.states["pvm"], memory)
