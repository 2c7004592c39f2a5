"""Rotary positions of the controls against boards that really have, or lack, the words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxmem
from jaxmem.data.boards import BoardDataset
from jaxmem.evaluation.conditions import Condition, filler_tokens, lay

K = 12


@pytest.fixture(scope="module")
def setting():
    """A board with K words, the same without, both encoded, and how many tokens the words are."""
    model = jaxmem.load()
    board = BoardDataset("test", 3, (K,))[0]
    bare = dataclasses.replace(board, words=())
    rows = [model.processor.encode(one.messages) for one in (board, bare)]
    count = len(rows[0]) - len(rows[1])
    place = lambda k, span: Condition(k, span=span).place(  # noqa: E731
        rows[0] if k else rows[1], board if k else bare, model.processor, model.spec.backbone.vision_end_token
    )
    assert filler_tokens(board, model.processor) == count == K + 1  # a newline
    return rows, count, place


def behind(row, count):
    """Positions of the last `count` tokens: the question and the answer."""
    return row.positions[:, -count:]


def test_stretched_is_where_the_words_would_put_the_question(setting):
    (full, bare), count, place = setting
    last = len(bare) - int(np.flatnonzero(bare.visual_rows >= 0)[-1]) - 2  # image, its end token, then the question
    np.testing.assert_array_equal(behind(place(0, count), last), behind(full, last))
    np.testing.assert_array_equal(place(0, count).positions[:, :-last], bare.positions[:, :-last])
    np.testing.assert_array_equal(place(0, 0).positions, bare.positions)


def test_packed_words_end_where_fewer_would(setting):
    (full, bare), count, place = setting
    np.testing.assert_array_equal(place(K, count).positions, full.positions)
    for span in (1, 4, 30):
        packed, last = place(K, span), len(full) - count - int(np.flatnonzero(full.visual_rows >= 0)[-1]) - 2
        np.testing.assert_array_equal(behind(packed, last), behind(place(0, span), last))
        np.testing.assert_array_equal(packed.tokens, full.tokens)
        words = packed.positions[0, -last - count : -last] - packed.positions[0, -last - count]
        np.testing.assert_array_equal(words, [i * span // count for i in range(count)])
        assert words.max() < span and packed.positions.dtype == np.int32
    assert Condition(K).place(full, None, None, 0) is full


def test_lay_moves_what_is_behind_alone(setting):
    (full, _), _, _ = setting
    moved = lay(full, 20, 4, 2).positions - full.positions
    np.testing.assert_array_equal(moved[:, :20], 0)
    np.testing.assert_array_equal(moved[:, 20:24], [[0, -1, -1, -2]] * 3)
    np.testing.assert_array_equal(moved[:, 24:], -2)


def test_names():
    labels = [Condition(128).label, Condition(0, blind=True).label, Condition(0, span=64).label]
    assert labels == ["128", "0, image hidden*", "0 over 64 positions"]
    kinds = [c.positions for c in (Condition(3), Condition(0, span=9), Condition(3, span=9))]
    assert kinds == ["plain", "stretched", "packed"]
