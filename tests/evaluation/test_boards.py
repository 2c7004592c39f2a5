"""Board scores against hand-made answers and against one board at a time."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.analysis.attention import image_mass, image_masses
from jaxmem.data.boards import board_tokens, digit_reads, score_answer
from jaxmem.errors import ConfigError
from jaxmem.evaluation import boards
from jaxmem.evaluation.boards import BoardTest, evaluate, prompt_of
from jaxmem.evaluation.conditions import Condition
from jaxmem.evaluation.reading import mean_and_error
from jaxmem.sampling import generate

TEST = BoardTest(k=(0, 12), blind_k=(0,), boards=5, cells=3, batch_size=3, seed=7)


@pytest.fixture(scope="module")
def model():
    attached = jaxmem.load(dtype="float32").attach("pvm", layers=(1, 2), latent=32, initialiser="fan_in")
    gates = {**attached.memory["pvm"], "gate_alpha": jnp.array([0.4, -0.7])}
    return dataclasses.replace(attached, memory={"pvm": gates})


@pytest.fixture(scope="module")
def results(model):
    before = generate.proceed._cache_size()
    done = []
    found = evaluate(model, TEST, look=image_mass, tick=done.append)
    return found, done, generate.proceed._cache_size() - before


def one_by_one(model, k, index):
    """Share of reads, exactness, answer and mass of a single board, in a batch of its own, without padding tricks."""
    board = TEST.dataset(k)[index]
    batch = model.batch(board.messages, add_generation_prompt=False)
    reads = digit_reads(batch.tokens, batch.loss_mask, board_tokens(model.processor.tokenizer))
    at = np.flatnonzero(reads[0])
    logits = np.asarray(model.logits(batch))[0]
    read = np.mean(logits[at - 1].argmax(-1) == batch.tokens[0, at])
    (answer,) = model.generate(board.question, max_new_tokens=15)
    masses = image_masses(model, batch, (at - 1)[None].astype(np.int32))
    return read, score_answer(answer.text, board).exact, answer.text, masses.mean((1, 2))


def test_results_equal_boards_taken_one_by_one(model, results):
    for row in results[0][:2]:
        single = [one_by_one(model, row.k, index) for index in range(TEST.boards)]
        reads, exacts, answers, masses = zip(*single, strict=True)
        assert (row.read, row.read_error) == pytest.approx(mean_and_error(reads))
        assert (row.exact, row.exact_error) == pytest.approx(mean_and_error(exacts))
        assert row.answers == answers
        np.testing.assert_allclose(row.mass, np.mean(masses, axis=0), atol=1e-6)


def test_blind_text_sees_nothing_of_the_image(results):
    seeing, _, blind = results[0]
    assert [(row.k, row.blind, row.boards) for row in results[0]] == [(0, False, 5), (12, False, 5), (0, True, 5)]
    assert set(blind.mass) == {0.0} and min(seeing.mass) > 0
    assert blind.answers != seeing.answers


def test_every_board_is_counted_once(results):
    assert sum(results[1]) == 3 * TEST.boards


def test_one_decode_loop_serves_all_lengths(results):
    assert results[2] == 1


def test_memory_reaches_blind_text(model):
    """With gates at zero a blind row cannot tell two images apart; with open gates it can."""
    test = dataclasses.replace(TEST, k=(), blind_k=(0,), boards=3)
    closed = dataclasses.replace(model, memory={"pvm": {**model.memory["pvm"], "gate_alpha": jnp.zeros(2)}})
    (off,), (on,) = evaluate(closed, test), evaluate(model, test)
    assert off.mass == () and on.answers != off.answers


def test_mean_and_error():
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5, np.sqrt(1 / 3) / 2))
    assert mean_and_error([0.25]) == (0.25, 0.0)


def test_prompt_is_what_generation_starts_from(model):
    board = TEST.dataset(12)[0]
    cut = prompt_of(model.processor.encode(board.messages))
    whole = model.processor.encode(board.question, add_generation_prompt=True)
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(cut, field.name), getattr(whole, field.name), err_msg=field.name)


def test_batches_have_one_shape(model):
    rows = boards._encode(model.processor, TEST.dataset(12))
    batch = boards._collate(rows[:2], 4, model.processor.pad_token, False)
    assert batch.tokens.shape[0] == 4 and batch.tokens.shape[1] % 16 == 0
    np.testing.assert_array_equal(batch.tokens[2], batch.tokens[0])


def test_a_test_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="at least 1"):
        BoardTest(k=(), blind_k=())
    with pytest.raises(ConfigError, match="at least one word"):
        BoardTest(packed=((0, 3),))


@pytest.fixture(scope="module")
def bare(model):
    return model.without_memory()


def test_boards_that_need_no_writing_get_what_would_be_written(bare):
    """The backbone is right about most boards: those are not generated, and the result is as if they were."""
    test, done = BoardTest(k=(0,), boards=6, cells=3, batch_size=3, seed=7), []
    (found,) = evaluate(bare, test, tick=done.append)
    written = tuple(bare.generate(board.question, max_new_tokens=17)[0].text for board in test.dataset(0))
    assert found.answers == written and 0 < sum(done[:2]) <= found.exact * test.boards


def test_long_answers_and_their_places(bare):
    test = BoardTest(k=(4,), boards=3, cells=16, batch_size=3, seed=1)
    (found,) = evaluate(bare, test)
    assert len(found.read_by_place) == len(found.free_read_by_place) == 16
    assert np.mean(found.read_by_place) == pytest.approx(found.read)
    assert np.mean(found.free_read_by_place) == pytest.approx(found.free_read)
    scores = [score_answer(text, board) for text, board in zip(found.answers, test.dataset(4), strict=True)]
    assert found.free_read == pytest.approx(np.mean([score.read for score in scores]))
    assert found.answers == tuple(bare.generate(board.question, max_new_tokens=70)[0].text for board in test.dataset(4))


def test_moved_positions_reach_reading_and_writing(bare):
    test = BoardTest(k=(0, 40), stretched=(0, 500), packed=((40, 41), (40, 5)), boards=3, cells=3, batch_size=3)
    plain, words, same, far, alike, near = evaluate(bare, test, look=image_mass)
    assert [row.condition for row in (far, near)] == [Condition(0, span=500), Condition(40, span=5)]
    for one, two in ((plain, same), (words, alike)):  # moved by nothing (40 words are 41 tokens)
        assert (one.read, one.mass, one.answers) == (two.read, two.mass, two.answers)
    assert far.mass != plain.mass and near.mass != words.mass
    assert sum(near.mass) < sum(plain.mass)  # as many keys as before


def test_positions_beyond_the_backbone_are_refused(bare):
    with pytest.raises(ConfigError, match="0 over 5000 positions reach position 50.* that has 4096"):
        evaluate(bare, BoardTest(k=(), stretched=(5000,), boards=1))
