"""Digit boards: a small, controlled test of seeing at a distance, made of real handwriting.

A board is a 4x4 grid of handwritten digits (scikit-learn's bundled `load_digits`). The user shows it, says k neutral
words, then names n cells (A to P, row by row); the answer reads each cell and keeps a running sum modulo 10:

    user       [image] river stone lamp
               Read and add C F A K
    assistant  C7=7 F3=0 A5=5 K9=4 #4

"F3=0" says: cell F shows a 3, and the sum so far is 0. The query (the cell's letter) stands next to the answer while
the evidence (the image) lies k words away, so reading accuracy measures seeing and the final sum measures text work.
One cell is 32x32 pixels: one merged visual token of a tower with 16-pixel patches merged 2x2.

Everything is a pure function of (split, seed, index). Digits of the two splits never overlap.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

SIDE = 4
"""Cells per side of a board."""
CELL_PIXELS = 32
"""Pixels per side of one cell."""
CELLS = "ABCDEFGHIJKLMNOP"
"""Names of the cells, row by row. Letters, because Qwen's tokenizer splits numbers into digits."""
QUESTION = "Read and add"
WORDS = tuple(
    """river stone lamp tree cloud chair bread green quiet paper house field light water glass road wind rain snow hill
    lake boat door wall roof spoon plate cup book page song drum bell coat shoe hat wool silk sand salt corn rice milk
    leaf seed root bird fish deer bear wolf moon star day night year hour week bench fence garden bridge market
    winter""".split()
)
"""The 64 neutral words that lie between the image and the question."""

_SPLITS = {"train": 0, "test": 1}
_TRAIN_DIGITS = 1397
_GRID_LINE = 40
_READ = re.compile(r"([A-P])(\d)=(\d)")


@dataclasses.dataclass(frozen=True)
class Board:
    """One sample.

    Attributes:
      image: [128, 128, 3] uint8, grey digits on black with faint lines between the cells.
      grid: the 16 digits of the board, row by row.
      words: the k filler words.
      cells: the n cells asked for (0..15), all different, in the order of the question.
      digits: what those cells show.
      sums: their running sums modulo 10; the last one is the answer.
    """

    image: np.ndarray
    grid: tuple[int, ...]
    words: tuple[str, ...]
    cells: tuple[int, ...]
    digits: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The user's text: k words, a newline when there are any, and the question."""
        question = " ".join([QUESTION, *(CELLS[cell] for cell in self.cells)])
        return f"{' '.join(self.words)}\n{question}" if self.words else question

    @property
    def answer(self) -> str:
        """The assistant's text."""
        reads = [f"{CELLS[c]}{d}={s}" for c, d, s in zip(self.cells, self.digits, self.sums, strict=True)]
        return " ".join([*reads, f"#{self.sums[-1]}"])

    @property
    def read_spans(self) -> tuple[tuple[int, int], ...]:
        """Character spans (start, end) of the digit reads in `answer`: one character each."""
        starts = [5 * place + 1 for place in range(len(self.cells))]
        return tuple((start, start + 1) for start in starts)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat: one user turn (image, text) and one assistant turn."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]

    @property
    def question(self) -> list[dict[str, Any]]:
        """The chat without its answer: what generation starts from."""
        return self.messages[:1]


@dataclasses.dataclass(frozen=True)
class BoardDataset(Sequence[Board]):
    """`size` boards that can be indexed in any order; item i is a pure function of (split, seed, i).

    Use it as a grain source directly. k and n are drawn independently of each other, once per `group` consecutive
    indices: with `group` equal to the batch size every batch of an unshuffled loader has one length and needs one
    compiled shape. The boards are random already, so nothing is gained by shuffling them.

    Attributes:
      split: "train" (1,397 digits, lightly augmented) or "test" (the other 400, as they are).
      seed: any non-negative integer; it selects the boards, never the split.
      k: numbers of filler words to draw from.
      n: numbers of cells to draw from, each 1..16.
      size: number of boards.
      group: consecutive boards that share k and n.

    Raises:
      ValueError: for an unknown split, an empty k or n, or a number out of range.
    """

    split: str = "train"
    seed: int = 0
    k: tuple[int, ...] = (0,)
    n: tuple[int, ...] = (4,)
    size: int = 100_000
    group: int = 1

    def __post_init__(self) -> None:
        """Accepts single numbers and lists for k and n, and checks every field."""
        for name in ("k", "n"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        if self.split not in _SPLITS:
            raise ValueError(f"BoardDataset: split is {self.split!r}; use one of {sorted(_SPLITS)}")
        if not self.k or min(self.k) < 0:
            raise ValueError(f"BoardDataset: k is {self.k}; give at least one number of words, each 0 or more")
        if not self.n or min(self.n) < 1 or max(self.n) > SIDE**2:
            raise ValueError(f"BoardDataset: n is {self.n}; give at least one number of cells, each 1..{SIDE**2}")
        if self.size < 1 or self.group < 1 or self.seed < 0:
            raise ValueError("BoardDataset: size and group must be at least 1, and seed at least 0")

    def __len__(self) -> int:
        """Number of boards."""
        return self.size

    def layout(self, index: int) -> tuple[int, int]:
        """(k, n) of board `index`."""
        rng = np.random.default_rng((_SPLITS[self.split], self.seed, 1, index // self.group))
        return int(rng.choice(self.k)), int(rng.choice(self.n))

    def __getitem__(self, index: SupportsIndex) -> Board:  # pyrefly: ignore[bad-override]
        """Board `index`; raises IndexError outside 0..size-1."""
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"board {index} of a dataset with {self.size}")
        rng = np.random.default_rng((_SPLITS[self.split], self.seed, 0, index))
        return make_board(rng, self.split, *self.layout(index))


def make_board(rng: np.random.Generator, split: str, k: int, n: int) -> Board:
    """A random board of `split` with k filler words and n questions."""
    pictures, labels = load_split(split)
    chosen = rng.integers(len(labels), size=SIDE**2)
    grid = labels[chosen]
    cells = rng.choice(SIDE**2, size=n, replace=False)
    words = rng.integers(len(WORDS), size=k)
    cell_pictures = pictures[chosen]
    if split == "train":
        cell_pictures = augment(rng, cell_pictures)
    return Board(
        image=draw_board(cell_pictures),
        grid=tuple(grid.tolist()),
        words=tuple(WORDS[word] for word in words),
        cells=tuple(cells.tolist()),
        digits=tuple(grid[cells].tolist()),
        sums=tuple((np.cumsum(grid[cells]) % 10).tolist()),
    )


@functools.cache
def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one split: pictures [N, 8, 8] float32 in 0..1 and labels [N] int64.

    One fixed permutation divides scikit-learn's 1,797 digits into 1,397 for training and 400 for testing.
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    keep = order[:_TRAIN_DIGITS] if split == "train" else order[_TRAIN_DIGITS:]
    return (pictures[keep].reshape(-1, 8, 8) / 16.0).astype(np.float32), labels[keep].astype(np.int64)


def augment(rng: np.random.Generator, pictures: np.ndarray) -> np.ndarray:
    """Light variation of digits [N, 8, 8]: shifts of one pixel (40 % per axis), gain 0.8..1.2, noise 0.07."""
    count = len(pictures)
    shifts = rng.integers(-1, 2, size=(count, 2)) * (rng.random((count, 2)) < 0.4)
    padded = np.zeros((count, 10, 10), pictures.dtype)
    padded[:, 1:9, 1:9] = pictures
    window = 1 + np.arange(8)
    rows = window[None, :, None] + shifts[:, 0, None, None]
    columns = window[None, None, :] + shifts[:, 1, None, None]
    moved = padded[np.arange(count)[:, None, None], rows, columns]
    gain = rng.uniform(0.8, 1.2, size=(count, 1, 1))
    return np.clip(moved * gain + rng.normal(0.0, 0.07, size=moved.shape), 0.0, 1.0)


def draw_board(pictures: np.ndarray) -> np.ndarray:
    """Digits [16, 8, 8] in 0..1 -> the image [128, 128, 3] uint8, each digit enlarged smoothly to 32x32 pixels."""
    cells = stretched(pictures, CELL_PIXELS)
    cells[:, 0, :] = cells[:, :, 0] = _GRID_LINE
    rows = cells.reshape(SIDE, SIDE, CELL_PIXELS, CELL_PIXELS).transpose(0, 2, 1, 3)
    return np.repeat(rows.reshape(SIDE * CELL_PIXELS, -1, 1), 3, axis=2)


def stretched(pictures: np.ndarray, side: int) -> np.ndarray:
    """Digits [N, 8, 8] in 0..1 -> [N, side, side] uint8, enlarged smoothly."""
    stretch = _stretch(8, side)
    return np.rint(255.0 * (stretch @ pictures @ stretch.T)).astype(np.uint8)


@functools.cache
def _stretch(small: int, large: int) -> np.ndarray:
    """The matrix [large, small] of linear interpolation between pixel centres, clamped at the borders."""
    centres = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    left = np.minimum(np.floor(centres).astype(int), small - 2)
    matrix = np.zeros((large, small))
    matrix[np.arange(large), left] = 1 - (centres - left)
    matrix[np.arange(large), left + 1] = centres - left
    return matrix


@dataclasses.dataclass(frozen=True)
class BoardTokens:
    """Ids of a tokenizer that matter on a board; made by `board_tokens`.

    Attributes:
      digits: the ids of "0" to "9".
      cells: the ids of "A" to "P" at the start of an answer, then those with a leading space.
    """

    digits: tuple[int, ...]
    cells: tuple[int, ...]


def board_tokens(tokenizer: Any) -> BoardTokens:
    """Looks the digits and the cell names up in a tokenizer (anything with `encode(text, add_special_tokens=)`).

    Raises:
      ValueError: when one of them is not a single token.
    """

    def one(text: str) -> int:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ids = list(getattr(encoded, "ids", encoded))
        if len(ids) != 1:
            raise ValueError(f"the tokenizer splits {text!r} into {len(ids)} tokens; boards need it to be one")
        return int(ids[0])

    return BoardTokens(
        digits=tuple(one(digit) for digit in "0123456789"),
        cells=tuple(one(prefix + cell) for prefix in ("", " ") for cell in CELLS),
    )


def digit_reads(tokens: np.ndarray, loss_mask: np.ndarray, ids: BoardTokens) -> np.ndarray:
    """Which supervised tokens are digit reads: a digit right after a cell's name, inside the answer.

    Args:
      tokens: [..., T] integer token ids.
      loss_mask: [..., T] positive on the tokens of the answer.
      ids: from `board_tokens`.

    Returns:
      [..., T] bool. Running sums follow "=" and the final sum follows "#", so they are not in it.
    """
    tokens = np.asarray(tokens)
    after_cell = np.zeros(tokens.shape, bool)
    after_cell[..., 1:] = np.isin(tokens[..., :-1], ids.cells)
    return np.isin(tokens, ids.digits) & after_cell & (np.asarray(loss_mask) > 0)


@dataclasses.dataclass(frozen=True)
class Score:
    """Reading and the final answer, apart: PVM repairs seeing, not sums.

    Attributes:
      read: share of the cells whose digit was read correctly.
      exact: is the final answer correct (for many boards: the share of them)?
    """

    read: float
    exact: float


def answer_reads(text: str, board: Board) -> tuple[bool, ...]:
    """Which questions free text reads right: its i-th "cell digit = sum" against the i-th question.

    A wrong cell or a missing entry counts as not read.
    """
    wanted = [(CELLS[cell], str(digit)) for cell, digit in zip(board.cells, board.digits, strict=True)]
    right = [entry[:2] == want for entry, want in zip(_entries(text), wanted, strict=False)]
    return (*right, *[False] * (len(wanted) - len(right)))


def named_reads(text: str, board: Board) -> tuple[bool, ...]:
    """Which entries of free text give the digit that the cell which they name shows, whether it was asked for or not.

    This is seeing apart from following the question: a text that loses its place names wrong cells, but may see them.
    """
    return tuple(board.grid[CELLS.index(cell)] == int(digit) for cell, digit, _ in _entries(text))


def _entries(text: str) -> list[tuple[str, str, str]]:
    """(cell, digit, sum) of every entry in front of the final sum."""
    return _READ.findall(text.strip().partition("#")[0])


def score_answer(text: str, board: Board) -> Score:
    """Scores free text against one board.

    `read` is the share of `answer_reads`. `exact` wants the right number of entries, the right final sum, and nothing
    after it.
    """
    right, final = answer_reads(text, board), text.strip().partition("#")[2]
    exact = len(_entries(text)) == len(right) and final == str(board.sums[-1])
    return Score(read=sum(right) / len(right), exact=float(exact))


def score_tokens(predicted: np.ndarray, tokens: np.ndarray, loss_mask: np.ndarray, ids: BoardTokens) -> Score:
    """Scores teacher-forced predictions of many boards.

    Args:
      predicted: [B, T] the most likely token *at* each index, given the true tokens before it.
      tokens: [B, T] the true tokens.
      loss_mask: [B, T] positive on the tokens of the answer.
      ids: from `board_tokens`.

    Returns:
      read = accuracy at the digit reads; exact = share of rows whose every answer token is predicted, which is when
      greedy decoding would give the whole answer. (Free text may also reach the right sum by two wrong digits.)
    """
    right = np.asarray(predicted) == np.asarray(tokens)
    reads = digit_reads(tokens, loss_mask, ids)
    exact = (right | (np.asarray(loss_mask) <= 0)).all(axis=-1)
    return Score(read=float(right[reads].mean()), exact=float(exact.mean()))


def mean_score(scores: Sequence[Score]) -> Score:
    """The average of several scores (boards with equally many questions each)."""
    if not scores:
        raise ValueError("mean_score: no scores to average")
    return Score(
        read=sum(score.read for score in scores) / len(scores),
        exact=sum(score.exact for score in scores) / len(scores),
    )
