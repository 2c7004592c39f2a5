"""A backbone against transformers' torch implementation: logits and greedy answers, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jaxmem.data.batching import Buckets, collate
from tests.backbones.prompts import PROMPTS, torch_inputs

BUCKETS = Buckets(tokens=(160, 1280), patches=(128, 512))
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both libraries.

    Attributes:
      seconds: per prompt, the seconds of a temporal patch of its video, for models that ask for it.
    """

    ours: Any
    theirs: Any
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def encode(pair: Pair, name: str) -> Any:
    """The prompt, as our processor makes it."""
    return pair.ours.processor.encode(PROMPTS[name], add_generation_prompt=True)


def inputs_of(pair: Pair, name: str) -> dict[str, torch.Tensor]:
    """The same tokens and pixels for torch; it computes positions and windows on its own."""
    inputs = torch_inputs(name, encode(pair, name))
    if name in pair.seconds:
        inputs["second_per_grid_ts"] = torch.tensor([pair.seconds[name]])
    return inputs


def torch_logits(pair: Pair, name: str, **more: torch.Tensor) -> np.ndarray:
    """[T, V]."""
    with torch.no_grad():
        return pair.theirs(**inputs_of(pair, name), **more).logits[0].numpy()


def assert_equal_logits(pair: Pair, name: str, our_positions: bool = False) -> None:
    """Every token of one prompt, to 1e-4; torch computes its own positions unless it shall take ours."""
    example = encode(pair, name)
    ours = np.asarray(pair.ours.logits(collate([example], BUCKETS)))[0, : len(example)]
    places = {"position_ids": torch.tensor(example.positions, dtype=torch.long)[:, None]} if our_positions else {}
    theirs = torch_logits(pair, name, **places)
    assert np.abs(theirs).max() > 1  # random weights that say something
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    if name == "long":
        assert len(example) > 1000


def assert_equal_batch(pair: Pair, names: Sequence[str], padding: str) -> None:
    """Prompts of unequal length in one batch, against single runs of the oracle."""
    examples = [encode(pair, name) for name in names]
    assert len({len(example) for example in examples}) == len(names)
    batch = collate(examples, BUCKETS, pad_token=pair.ours.processor.pad_token, padding=padding)
    logits = np.asarray(pair.ours.logits(batch))
    for row, name in enumerate(names):
        valid = np.asarray(batch.segments[row]) > 0
        np.testing.assert_allclose(logits[row][valid], torch_logits(pair, name), atol=1e-4, rtol=0, err_msg=name)


def torch_greedy(pair: Pair, name: str) -> list[int]:
    """NEW_TOKENS ids; media tokens are suppressed, as in ours."""
    inputs, banned = inputs_of(pair, name), list(pair.ours.spec.backbone.media_tokens)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    out = pair.theirs.generate(**inputs, **options, eos_token_id=None, suppress_tokens=banned)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def assert_equal_answers(pair: Pair, names: Sequence[str]) -> None:
    """One padded batch against single runs of the oracle, token for token."""
    prompts = [PROMPTS[name] for name in names]
    answers = pair.ours.generate(prompts, max_new_tokens=NEW_TOKENS, stop_tokens=(), buckets=BUCKETS)
    for name, answer in zip(names, answers, strict=True):
        assert list(answer.tokens) == torch_greedy(pair, name), name
