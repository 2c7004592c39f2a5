"""Digit boards: determinism, disjoint digits, what the picture shows, token masks and scores."""

import numpy as np
import pytest

from jaxmem.data.boards import (
    CELLS,
    WORDS,
    Board,
    BoardDataset,
    BoardTokens,
    answer_reads,
    board_tokens,
    digit_reads,
    load_split,
    mean_score,
    named_reads,
    score_answer,
    score_tokens,
)


def same(one: Board, other: Board) -> bool:
    return np.array_equal(one.image, other.image) and one.messages[1] == other.messages[1] and one.words == other.words


def test_a_board_is_a_function_of_split_seed_and_index():
    data = BoardDataset("train", seed=3, k=(0, 5), n=(2, 4), size=10)
    assert same(data[7], BoardDataset("train", seed=3, k=(0, 5), n=(2, 4), size=99)[7])
    assert not same(data[7], data[8])
    assert not same(data[7], BoardDataset("train", seed=4, k=(0, 5), n=(2, 4), size=10)[7])
    assert len(data) == 10 and len(list(data)) == 10


def test_text_and_sums_follow_the_board():
    board = BoardDataset("test", k=3, n=4)[11]
    assert board.image.shape == (128, 128, 3) and board.image.dtype == np.uint8
    assert board.digits == tuple(board.grid[cell] for cell in board.cells)
    assert board.sums == tuple(sum(board.digits[: place + 1]) % 10 for place in range(4))
    words, question = board.prompt.split("\n")
    assert tuple(words.split(" ")) == board.words and set(board.words) <= set(WORDS)
    assert question == "Read and add " + " ".join(CELLS[cell] for cell in board.cells)
    first = f"{CELLS[board.cells[0]]}{board.digits[0]}={board.sums[0]} "
    assert board.answer.startswith(first) and board.answer.endswith(f" #{board.sums[-1]}")
    assert tuple(int(board.answer[start:end]) for start, end in board.read_spans) == board.digits
    assert [message["role"] for message in board.messages] == ["user", "assistant"]
    assert board.question == board.messages[:1]
    assert BoardDataset("test", k=0)[0].prompt.startswith("Read and add")


def test_every_cell_of_the_picture_shows_its_digit():
    """The nearest digit of the split (of all its pictures) to each cell, shrunk by averaging, has the cell's label."""
    pictures, labels = load_split("test")
    board = BoardDataset("test", seed=1)[0]
    shrunk = (
        board.image[..., 0].reshape(4, 8, 4, 4, 8, 4).mean(axis=(2, 5)).transpose(0, 2, 1, 3).reshape(16, 8, 8) / 255
    )
    distance = ((shrunk[:, None] - pictures[None]) ** 2).sum(axis=(2, 3))
    assert labels[distance.argmin(axis=1)].tolist() == list(board.grid)


def test_digits_of_the_splits_are_disjoint_and_complete():
    train, test = load_split("train"), load_split("test")
    assert (len(train[1]), len(test[1])) == (1397, 400)
    seen = {picture.tobytes() for picture in train[0]}
    assert not any(picture.tobytes() in seen for picture in test[0])


def test_training_boards_vary_and_test_boards_do_not():
    pictures, _ = load_split("test")
    board = BoardDataset("test")[0]
    peaks = board.image.reshape(4, 32, 4, 32, 3).max(axis=(1, 3, 4))
    assert peaks.min() >= 200  # full contrast, no gain
    noisy = BoardDataset("train")[0].image[1:30, 1:30, 0]
    assert len(np.unique(noisy)) > 50


def test_k_and_n_are_independent_and_groups_share_them():
    data = BoardDataset("train", k=(0, 8, 16), n=(2, 4), size=1200, group=4)
    layouts = [data.layout(index) for index in range(len(data))]
    assert all(layouts[index] == layouts[index - index % 4] for index in range(1200))
    counts = np.array([[sum(layout == (k, n) for layout in layouts[::4]) for n in (2, 4)] for k in (0, 8, 16)])
    assert counts.min() > 25  # 300 groups over 6 layouts: 50 each
    assert (len(data[5].words), len(data[5].cells)) == layouts[5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "validation"}, "validation"),
        ({"k": ()}, "k is"),
        ({"k": (-1,)}, "k is"),
        ({"n": (17,)}, "1..16"),
        ({"n": 0}, "1..16"),
        ({"size": 0}, "size"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BoardDataset(**fields)


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError, match="board 3"):
        BoardDataset(size=3)[3]


IDS = BoardTokens(digits=tuple(range(10)), cells=tuple(range(20, 52)))
END, EQUALS, HASH = 60, 61, 62
ROW = np.array([[23, 24, 25, 7, 99, 23, 7, EQUALS, 7, 25, 5, EQUALS, 2, HASH, 2, END, 99]])
LOSS = np.array([[0.0] * 5 + [1.0] * 11 + [0.0]])


def test_digit_reads_are_the_digits_after_cell_names_in_the_answer():
    assert np.flatnonzero(digit_reads(ROW, LOSS, IDS)[0]).tolist() == [6, 10]


def test_token_scores_tell_reading_from_exactness():
    assert score_tokens(ROW, ROW, LOSS, IDS) == mean_score([score_tokens(ROW, ROW, LOSS, IDS)])
    wrong_sum, wrong_read = ROW.copy(), ROW.copy()
    wrong_sum[0, 8] = wrong_sum[0, 2] = 3
    wrong_read[0, 6] = 3
    assert (score_tokens(wrong_sum, ROW, LOSS, IDS).read, score_tokens(wrong_sum, ROW, LOSS, IDS).exact) == (1.0, 0.0)
    assert (score_tokens(wrong_read, ROW, LOSS, IDS).read, score_tokens(wrong_read, ROW, LOSS, IDS).exact) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("text", "read", "exact"),
    [
        ("C7=7 F3=0 #0", 1.0, 1.0),
        (" C7=7 F3=0 #0\n", 1.0, 1.0),
        ("C7=7 F4=1 #1", 0.5, 0.0),
        ("C7=7 G3=0 #0", 0.5, 1.0),
        ("C7=7 #0", 0.5, 0.0),
        ("C7=7 F3=0 A1=1 #0", 1.0, 0.0),
        ("C7=7 F3=0 #0 river", 1.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_scores_of_free_text(text, read, exact):
    board = Board(np.zeros((128, 128, 3), np.uint8), (0,) * 16, (), (2, 5), (7, 3), (7, 0))
    score = score_answer(text, board)
    assert (score.read, score.exact) == (read, exact)


def test_seeing_is_apart_from_following_the_question():
    grid = (4, 0, 7, 0, 0, 3, *[0] * 10)
    board = Board(np.zeros((128, 128, 3), np.uint8), grid, (), (2, 5), (7, 3), (7, 0))
    assert answer_reads("C7=7 A4=1 F3=4 #4", board) == (True, False)
    assert named_reads("C7=7 A4=1 F9=0 #0", board) == (True, True, False)
    assert answer_reads("C7", board) == (False, False) and named_reads("C7", board) == ()


def test_mean_score_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        mean_score([])


def test_a_tokenizer_that_splits_cell_names_is_refused():
    class Letters:
        def encode(self, text, add_special_tokens):
            return [ord(letter) for letter in text]

    with pytest.raises(ValueError, match="' A'"):
        board_tokens(Letters())
