"""Facts that exist in knowledge items alone: a small, controlled test of a memory of items, with real handwriting.

The cells of a digit board (`jaxmem.data.boards`) are knowledge items: each shows one handwritten digit and says which
cell it is. A question names some cells and shows nothing; the answer reads each of them and keeps a running sum:

    items      [image of a 7] C     [image of a 3] F     [image of a 0] K     ...
    user       Read and add F C
    assistant  F3=3 C7=0 #0

Digits and cells are drawn anew for every row, so nothing but the right item holds an answer; the items that are not
asked for are distractors. A question that names no cell ("recite") is answered with all items in their order: it asks
for names too, which a memory has no other reason to carry before names are looked up. Everything is a pure function of
(split, seed, index). No digit is in both splits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxmem.data.boards import CELL_PIXELS, CELLS, QUESTION, augment, load_split, stretched
from jaxmem.data.items import Item

_SPLITS = {"train": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One row.

    Attributes:
      items: the knowledge; the items that are asked for stand anywhere among it.
      asked: their indices, in the order of the question.
      digits: what their images show.
      recited: the question names none, and asks for all.
    """

    items: tuple[Item, ...]
    asked: tuple[int, ...]
    digits: tuple[int, ...]
    recited: bool = False

    @property
    def question(self) -> list[dict[str, Any]]:
        """The chat without its answer."""
        return [{"role": "user", "content": " ".join([QUESTION, *self._names])}]

    @property
    def _names(self) -> list[str]:
        """The cells that the question names."""
        return [] if self.recited else [self.items[i].text for i in self.asked]

    @property
    def answer(self) -> str:
        """The assistant's text."""
        sums = [total % 10 for total in itertools.accumulate(self.digits)]
        reads = [f"{self.items[i].text}{d}={s}" for i, d, s in zip(self.asked, self.digits, sums, strict=True)]
        return " ".join([*reads, f"#{sums[-1]}"])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat: one user turn and one assistant turn."""
        return [*self.question, {"role": "assistant", "content": self.answer}]


@dataclasses.dataclass(frozen=True)
class FactDataset(Sequence[Fact]):
    """`size` rows that can be indexed in any order; item i is a pure function of (split, seed, i).

    Attributes:
      split: "train" (1,397 digits, lightly augmented) or "test" (the other 400, as they are).
      seed: selects the rows, never the split.
      items: numbers of items to draw from, each 1 to 16; drawn once per `group` consecutive indices, so that with
        `group` equal to the batch size the rows of a batch have one shape.
      asked: numbers of items that a question names to draw from, likewise; all where there are fewer.
      recite: share of groups whose questions name no cell.
      size: number of rows.
      group: consecutive rows with equally many items.

    Raises:
      ValueError: for an unknown split, or numbers out of range.
    """

    split: str = "train"
    seed: int = 0
    items: tuple[int, ...] = (1, 2, 3, 5, 10)
    asked: tuple[int, ...] = (1,)
    size: int = 100_000
    group: int = 1
    recite: float = 0.0

    def __post_init__(self) -> None:
        """Accepts single numbers and lists for items and asked, and checks every field."""
        for name in ("items", "asked"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        if self.split not in _SPLITS:
            raise ValueError(f"FactDataset: split is {self.split!r}; use one of {sorted(_SPLITS)}")
        if not self.items or min(self.items) < 1 or max(self.items) > len(CELLS):
            raise ValueError(f"FactDataset: items is {self.items}; give numbers of 1 to {len(CELLS)}")
        if self.size < 1 or self.group < 1 or not self.asked or min(self.asked) < 1 or self.seed < 0:
            raise ValueError("FactDataset: size, asked and group must be at least 1, and seed at least 0")
        if not 0 <= self.recite <= 1:
            raise ValueError(f"FactDataset: recite is {self.recite}; give a share of 0 to 1")

    def __len__(self) -> int:
        """Number of rows."""
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Fact:  # pyrefly: ignore[bad-override]
        """Row `index`; raises IndexError outside 0..size-1."""
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"fact {index} of a dataset with {self.size}")
        source = (_SPLITS[self.split], self.seed)
        shape = np.random.default_rng((*source, 1, index // self.group))
        count, asked = int(shape.choice(self.items)), int(shape.choice(self.asked))
        recited = bool(shape.random() < self.recite)
        rng, name = np.random.default_rng((*source, 0, index)), f"{self.split}-{self.seed}-{index}"
        fact = _fact(rng, self.split, count, count if recited else min(asked, count), name)
        return _recited(fact) if recited else fact


def _recited(fact: Fact) -> Fact:
    """The question for all items, in their order."""
    digits = dict(zip(fact.asked, fact.digits, strict=True))
    order = tuple(sorted(fact.asked))
    return Fact(fact.items, order, tuple(digits[i] for i in order), recited=True)


def _fact(rng: np.random.Generator, split: str, count: int, asked: int, name: str) -> Fact:
    """A random row with `count` items."""
    pictures, labels = load_split(split)
    chosen, cells = rng.integers(len(labels), size=count), rng.permutation(len(CELLS))[:count]
    digits = augment(rng, pictures[chosen]) if split == "train" else pictures[chosen]
    shown = np.repeat(stretched(digits, CELL_PIXELS)[..., None], 3, axis=-1)
    items = tuple(Item(f"{name}-{i}", CELLS[cell], (shown[i],)) for i, cell in enumerate(cells))
    wanted = tuple(rng.permutation(count)[:asked].tolist())
    return Fact(items, wanted, tuple(int(labels[chosen[i]]) for i in wanted))
