"""How well a model reads digit boards at several distances between the image and the question.

Reading and answering are measured apart, because a visual memory repairs seeing and nothing else: `read` is the share
of digits that are the most likely token where they stand in the true answer (teacher forcing), `exact` the share of
boards whose final answer is right when the model writes freely and greedily.
Axis letters: B boards of a batch, R reads of a board, T tokens, L decoder layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.api import Model
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.decoder import Observe
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.boards import Board, BoardDataset, BoardTokens, board_tokens, digit_reads, score_answer
from jaxmem.data.example import Example
from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError
from jaxmem.model import Spec, logits, observed
from jaxmem.sampling.generate import generate

Look = Callable[[Array, Array], Observe]
"""look(is_visual [B, T], places [B, R]) -> what to keep of each layer's attention, [B, R]."""
_ROUND = 16  # token lengths are rounded up to multiples of this


@dataclasses.dataclass(frozen=True)
class BoardTest:
    """What is evaluated.

    Attributes:
      k: numbers of words between image and question, one result each.
      blind_k: numbers of words at which text also cannot see the image in the backbone (visual-key blocking).
      boards: boards per result.
      cells: cells asked for, R.
      batch_size: boards that run together, B; every batch has this size.
      seed: selects the boards.
      split: "test" or "train" digits.
    """

    k: tuple[int, ...] = (0, 128, 256)
    blind_k: tuple[int, ...] = ()
    boards: int = 256
    cells: int = 4
    batch_size: int = 64
    seed: int = 0
    split: str = "test"

    def __post_init__(self) -> None:
        if self.boards < 1 or self.batch_size < 1 or not self.k + self.blind_k:
            raise ConfigError("a board test needs boards, batch_size and the number of lengths k to be at least 1")

    @property
    def conditions(self) -> tuple[tuple[int, bool], ...]:
        """(k, blind) of every result, in order."""
        return (*((k, False) for k in self.k), *((k, True) for k in self.blind_k))

    def dataset(self, k: int) -> BoardDataset:
        """The boards at one length."""
        return BoardDataset(self.split, self.seed, (k,), (self.cells,), size=self.boards)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The result at one length.

    Attributes:
      k: words between image and question.
      blind: could the backbone's text not see the image?
      boards: how many.
      read, read_error: share of digits read, and its standard error over boards.
      exact, exact_error: share of right final answers in free greedy writing, and its standard error.
      mass: per decoder layer, what `look` saw at the tokens that predict a read, averaged; () without `look`.
      answers: what the model wrote about each board.
      seconds: wall time, compilation included.
    """

    k: int
    blind: bool
    boards: int
    read: float
    read_error: float
    exact: float
    exact_error: float
    mass: tuple[float, ...]
    answers: tuple[str, ...]
    seconds: float


def evaluate(
    model: Model,
    test: BoardTest,
    *,
    look: Look | None = None,
    tick: Callable[[int], None] = lambda boards: None,
) -> tuple[Reading, ...]:
    """Evaluates a model on digit boards.

    All boards of a length run in batches of one shape, and one decode loop serves all lengths, so that a test of three
    lengths compiles seven programs, for any number of boards and any values of the weights.

    Args:
      model: backbone, memories and processor; its tokenizer must have digits and cell names as single tokens.
      test: what to evaluate.
      look: what to observe of the backbone's attention, e.g. `jaxmem.analysis.attention.image_mass`.
      tick: called with a number of boards whenever they are done, for a progress bar.

    Returns:
      One Reading per entry of `test.conditions`.

    Raises:
      ValueError: the tokenizer splits a digit or a cell name.
    """
    ids = board_tokens(model.processor.tokenizer)
    encoded = {k: _encode(model.processor, test.dataset(k)) for k in dict.fromkeys((*test.k, *test.blind_k))}
    new, size = _room(encoded)
    options = model.sampler(max_new_tokens=new, cache_size=size)
    results = []
    for k, blind in test.conditions:
        began = time.perf_counter()
        rows = [
            _run(model, chunk, ids, test, blind, options, look, tick)
            for chunk in _chunks(list(zip(test.dataset(k), encoded[k], strict=True)), test.batch_size)
        ]
        results.append(_reading(k, blind, rows, time.perf_counter() - began))
    return tuple(results)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n); 0 for a single value)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def _encode(processor: Processor, boards: Sequence[Board]) -> list[Example]:
    """Question and answer of every board."""
    return [processor.encode(board.messages, where=f"board {i}") for i, board in enumerate(boards)]


def prompt_of(example: Example) -> Example:
    """The part in front of the first supervised token, which is where generation starts; it holds all images."""
    end = int(np.argmax(example.loss_mask > 0))
    cut = {name: getattr(example, name)[..., :end] for name in ("tokens", "positions", "loss_mask", "visual_rows")}
    return dataclasses.replace(example, **cut)


def _width(lengths: Sequence[int]) -> int:
    """One token length for all rows: the longest, rounded up."""
    return -(-max(lengths) // _ROUND) * _ROUND


def _room(encoded: dict[int, list[Example]]) -> tuple[int, int]:
    """(tokens to generate, slots of the cache) that suffice at every length: one decode loop for all."""
    prompts = {k: [len(prompt_of(row)) for row in rows] for k, rows in encoded.items()}
    new = max(len(row) - start for k, rows in encoded.items() for row, start in zip(rows, prompts[k], strict=True))
    return new, max(_width(starts) for starts in prompts.values()) + new


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _collate(rows: list[Example], size: int, pad_token: int, blind: bool) -> Batch:
    """`size` rows of one shape: those given, then copies of the first."""
    buckets = Buckets((_width([len(row) for row in rows]),), (max(len(row.patches) for row in rows),))
    filled = rows + rows[:1] * (size - len(rows))
    return collate(filled, buckets, pad_token, blind=[blind] * size)


@functools.partial(jax.jit, static_argnames=("spec", "look"))
def _forced(spec: Spec, base: Any, memory: Any, batch: Batch, places: Array, look: Look | None) -> tuple[Array, Any]:
    """The most likely token [B, R] right after `places` [B, R] of the true text, and what `look` saw there."""
    observe = None if look is None else look(batch.is_visual, places)
    hidden, seen = observed(spec, base, memory, batch, observe)
    here = jnp.take_along_axis(hidden, places[..., None], axis=1)
    return jnp.argmax(logits(spec, base, here), axis=-1), seen


def _run(
    model: Model,
    pairs: list[tuple[Board, Example]],
    ids: BoardTokens,
    test: BoardTest,
    blind: bool,
    options: Any,
    look: Look | None,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """One batch: per board its share of reads, exactness, answer, and mass [boards, L]."""
    boards, rows = zip(*pairs, strict=True)
    pad, count = model.processor.pad_token, len(pairs)
    whole = _collate(list(rows), test.batch_size, pad, blind)
    reads = digit_reads(whole.tokens, whole.loss_mask, ids)
    places = np.nonzero(reads)[1].reshape(test.batch_size, test.cells).astype(np.int32)
    predicted, seen = _forced(model.spec, model.base, model.memory, whole, places - 1, look)
    right = np.asarray(predicted) == np.take_along_axis(whole.tokens, places, axis=1)
    prompts = _collate([prompt_of(row) for row in rows], test.batch_size, pad, blind)
    written = generate(model.spec, model.base, model.memory, prompts, options)
    answers = [
        model.processor.decode(tokens[:length])
        for tokens, length in zip(written.tokens[:count], written.lengths[:count], strict=True)
    ]
    tick(count)
    return {
        "read": right.mean(axis=1)[:count],
        "exact": np.array([score_answer(a, board).exact for a, board in zip(answers, boards, strict=True)]),
        "answers": answers,
        "mass": np.zeros((count, 0)) if seen is None else np.asarray(seen).mean(axis=-1).T[:count],
    }


def _reading(k: int, blind: bool, batches: list[dict[str, Any]], seconds: float) -> Reading:
    """The result of all batches of one length."""
    read, exact, mass = (np.concatenate([batch[name] for batch in batches]) for name in ("read", "exact", "mass"))
    answers = tuple(answer for batch in batches for answer in batch["answers"])
    return Reading(
        k, blind, len(read), *mean_and_error(read), *mean_and_error(exact), _floats(mass.mean(axis=0)), answers, seconds
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
