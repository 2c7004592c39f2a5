"""The warm-up's continuations: where memories stand, of which type, and which rows are bare."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmem.errors import ConfigError, DataError
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.slots import Slot, text_tokens
from jaxmem.training import vismem_stages
from jaxmem.training.prompts import Prompt
from jaxmem.training.vismem_settings import VisMemStage
from jaxmem.training.warm_up import with_memory
from tests.memory import vismem_world as v

ROWS, LIMIT = 200, 24


def prompts(rows: int = ROWS) -> list[Prompt]:
    draw = np.random.default_rng(0)
    answer = lambda: tuple(int(t) for t in draw.integers(0, v.KNOWN, draw.integers(3, 9)))  # noqa: E731
    return [Prompt(None, [], {}, answer()) for _ in range(rows)]  # type: ignore[arg-type]


def made(**settings):
    stage = VisMemStage(stage="warm_up", **settings)
    return vismem_stages.references(v.CONFIG, prompts(), jax.random.key(3), LIMIT, v.PAD, stage)


def test_a_memory_of_either_type_in_front_of_every_answer():
    tokens, kinds, lengths = made()
    types = []
    for row, prompt in enumerate(prompts()):
        kind = v.CONFIG.invoke_ids.index(tokens[row, 0, 0])
        size = v.CONFIG.sizes[kind]
        expected = [Slot.FORCED, *[Slot.MEMORY] * size, Slot.END, *[Slot.TEXT] * len(prompt.answer)]
        assert kinds[row, 0, : lengths[row, 0]].tolist() == expected
        assert tokens[row, 0, size + 1] == v.CONFIG.end_ids[kind]
        assert text_tokens(tokens[row, 0], kinds[row, 0], lengths[row, 0]) == list(prompt.answer)
        assert (kinds[row, 0, lengths[row, 0] :] == Slot.EMPTY).all()
        types.append(kind)
    assert abs(np.mean(types) - 0.5) < 3 * 0.5 / ROWS**0.5


def test_random_places_and_bare_rows():
    tokens, kinds, lengths = made(bare=0.3, invoke=InvokeConfig(anywhere=True))
    memory = (kinds == Slot.FORCED).any(axis=-1)[:, 0]
    assert abs(memory.mean() - 0.7) < 3 * (0.21 / ROWS) ** 0.5
    np.testing.assert_array_equal(with_memory(kinds), memory)
    places = [int(np.argmax(kinds[row, 0] == Slot.FORCED)) for row in np.flatnonzero(memory)]
    lengths_of = [len(prompts()[row].answer) for row in np.flatnonzero(memory)]
    assert all(place < length for place, length in zip(places, lengths_of, strict=True))
    shares = np.array(places) / np.array(lengths_of)
    assert 0.3 < shares.mean() < 0.5 and len(set(places)) >= 5
    for row, prompt in enumerate(prompts()):
        assert text_tokens(tokens[row, 0], kinds[row, 0], lengths[row, 0]) == list(prompt.answer)


def test_what_cannot_be_is_named():
    stage = VisMemStage(stage="warm_up")
    bare = Prompt(None, [], {}, None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a record has none"):
        vismem_stages.references(v.CONFIG, [bare], jax.random.key(0), LIMIT, v.PAD, stage)
    with pytest.raises(DataError, match="exceed grpo.max_new_tokens 5"):
        vismem_stages.references(v.CONFIG, prompts(1), jax.random.key(0), 5, v.PAD, stage)
    for wrong in ({"stage": "three"}, {"bare": 2.0}, {"controls": ("loud",)}, {"baseline": "some"}, {"penalty": -1.0}):
        with pytest.raises(ConfigError, match=r"grpo\.vismem"):
            VisMemStage(**wrong)
