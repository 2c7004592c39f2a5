"""How well a model reads digit boards at several distances between the image and the question.

Reading and answering are measured apart, because a visual memory repairs seeing and nothing else: `read` is the share
of digits that are the most likely token where they stand in the true answer (teacher forcing), `exact` the share of
boards whose final answer is right when the model writes freely and greedily.
Axis letters: B boards of a batch, R reads of a board, A tokens of an answer, T tokens, L decoder layers.
"""

from __future__ import annotations

import functools
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
from jaxmem.data.boards import Board, BoardTokens, board_tokens, digit_reads
from jaxmem.data.example import Example
from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError
from jaxmem.evaluation.conditions import BoardTest, Condition
from jaxmem.evaluation.reading import Reading, Taken, summarise
from jaxmem.model import Spec, logits, observed
from jaxmem.sampling.generate import generate

Look = Callable[[Array, Array], Observe]
"""look(is_visual [B, T], places [B, R]) -> what to keep of each layer's attention, [B, R]."""
_ROUND = 16  # token lengths are rounded up to multiples of this


def evaluate(
    model: Model,
    test: BoardTest,
    *,
    look: Look | None = None,
    tick: Callable[[int], None] = lambda boards: None,
) -> tuple[Reading, ...]:
    """Evaluates a model on digit boards.

    All boards of a length run in batches of one shape, and one decode loop serves all lengths, so that a test of three
    lengths compiles seven programs, for any number of boards and any values of the weights. A model that finds every
    token of the true answer the most likely one, given those before it, would write this answer greedily: only the
    other boards are generated.

    Args:
      model: backbone, memories and processor; its tokenizer must have digits and cell names as single tokens.
      test: what to evaluate.
      look: what to observe of the backbone's attention, e.g. `jaxmem.analysis.attention.image_mass`.
      tick: called with a number of boards whenever they are done, for a progress bar.

    Returns:
      One Reading per entry of `test.conditions`.

    Raises:
      ConfigError: positions beyond those of the backbone.
      ValueError: the tokenizer splits a digit or a cell name.
    """
    ids = board_tokens(model.processor.tokenizer)
    encoded = {k: _encode(model.processor, test.dataset(k)) for k in dict.fromkeys(c.k for c in test.conditions)}
    new, size = _room(encoded)
    options = model.sampler(max_new_tokens=new, cache_size=size)
    results = []
    for condition in test.conditions:
        began = time.perf_counter()
        boards = _placed(model, condition, test.dataset(condition.k), encoded[condition.k])
        for chunk in _chunks(boards, test.batch_size):
            _force(model, chunk, ids, test, condition.blind, look)
            tick(sum(one.answer is not None for one in chunk))
        for chunk in _chunks([one for one in boards if one.answer is None], test.batch_size):
            _write(model, chunk, test, condition.blind, options)
            tick(len(chunk))
        results.append(summarise(condition, boards, time.perf_counter() - began))
    return tuple(results)


def _encode(processor: Processor, boards: Sequence[Board]) -> list[Example]:
    """Question and answer of every board."""
    return [processor.encode(board.messages, where=f"board {i}") for i, board in enumerate(boards)]


def _placed(model: Model, condition: Condition, boards: Sequence[Board], rows: list[Example]) -> list[Taken]:
    """The boards with the positions of a condition."""
    backbone = model.spec.backbone
    place = lambda board, row: condition.place(row, board, model.processor, backbone.vision_end_token)  # noqa: E731
    placed = [Taken(board, place(board, row)) for board, row in zip(boards, rows, strict=True)]
    last, limit = max(int(one.row.positions.max()) for one in placed), backbone.text.max_positions
    if last >= limit:
        raise ConfigError(f"boards with {condition.label} reach position {last} of a backbone that has {limit}")
    return placed


def prompt_of(example: Example) -> Example:
    """The part in front of the first supervised token, which is where generation starts; it holds all images."""
    return example.upto(int(np.argmax(example.loss_mask > 0)))


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
def _forced(
    spec: Spec, base: Any, memory: Any, batch: Batch, places: Array, reads: Array, look: Look | None
) -> tuple[Array, Any]:
    """The most likely token [B, A] right after `places` [B, A] of the true text, and what `look` saw at `reads`."""
    observe = None if look is None else look(batch.is_visual, reads)
    hidden, seen = observed(spec, base, memory, batch, observe)
    here = jnp.take_along_axis(hidden, places[..., None], axis=1)
    best = jax.lax.map(lambda column: jnp.argmax(logits(spec, base, column), axis=-1), here.swapaxes(0, 1))
    return best.swapaxes(0, 1), seen


def _force(model: Model, chunk: list[Taken], ids: BoardTokens, test: BoardTest, blind: bool, look: Look | None) -> None:
    """Reads by teacher forcing: fills in `read` [R] and `mass` [L], and the answer where every token of it is right."""
    batch = _collate([one.row for one in chunk], test.batch_size, model.processor.pad_token, blind)
    reads = np.nonzero(digit_reads(batch.tokens, batch.loss_mask, ids))[1].reshape(test.batch_size, test.cells)
    places = _answer_places(batch.loss_mask)
    before = (places - 1).astype(np.int32), (reads - 1).astype(np.int32)
    predicted, seen = _forced(model.spec, model.base, model.memory, batch, *before, look)
    right = np.asarray(predicted) == np.take_along_axis(batch.tokens, places, axis=1)
    masses = np.zeros((len(chunk), 0)) if seen is None else np.asarray(seen).mean(axis=-1).T
    for index, one in enumerate(chunk):
        one.read, one.mass = right[index][np.isin(places[index], reads[index])], masses[index]
        one.answer = one.board.answer if right[index].all() else None


def _answer_places(loss_mask: np.ndarray) -> np.ndarray:
    """[B, A] indices of the supervised tokens, in order; a row with fewer than the longest repeats its last one."""
    rows = [np.flatnonzero(row > 0) for row in loss_mask]
    length = max(map(len, rows))
    return np.stack([np.pad(row, (0, length - len(row)), mode="edge") for row in rows])


def _write(model: Model, chunk: list[Taken], test: BoardTest, blind: bool, options: Any) -> None:
    """Fills in the answers that the model writes freely and greedily."""
    prompts = _collate([prompt_of(one.row) for one in chunk], test.batch_size, model.processor.pad_token, blind)
    written = generate(model.spec, model.base, model.memory, prompts, options)
    for one, tokens, length in zip(chunk, written.tokens, written.lengths, strict=False):
        one.answer = model.processor.decode(tokens[:length])
