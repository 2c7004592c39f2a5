"""Which tokens can be sampled, and where memories are forced: acceptance checks 39 and 40."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import ConfigError
from jaxmem.memory.vismem import TYPES
from jaxmem.sampling.invoking import InvokeConfig, forced, permitted
from jaxmem.sampling.logits import draw
from jaxmem.sampling.rollout import Rollout
from jaxmem.sampling.slots import Slot
from tests.memory import vismem_world as v
from tests.sampling.insertion_world import DELIMITERS, VARIANTS, members, play

FITS = ((False, False), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("fits", FITS)
def test_check_39_permitted_tokens_have_all_probability(fits: tuple[bool, bool], temperature: float) -> None:
    """Every token that can be drawn is drawn often; what is reported of each sums to 1 over all of them."""
    scores = jax.random.normal(jax.random.key(0), (v.KNOWN + 4,)).at[v.KNOWN :].set(3.0)
    masked = permitted(v.CONFIG, scores, jnp.asarray(fits))
    settings, keys = v.sampler(temperature=temperature), jax.random.split(jax.random.key(1), 20_000)
    tokens, logprobs = jax.jit(functools.partial(draw, settings))(
        keys, jnp.broadcast_to(masked, (len(keys), len(masked))), None
    )
    found = dict(zip(np.asarray(tokens).tolist(), np.asarray(logprobs).tolist(), strict=True))
    control = {id_ for id_, fit in zip(v.CONFIG.invoke_ids, fits, strict=True) if fit}
    assert set(found) == set(range(v.KNOWN)) | control
    assert np.exp(list(found.values())).sum() == pytest.approx(1, abs=1e-5)


def within(hits: int, trials: int, probability: float) -> bool:
    """Three standard deviations."""
    return abs(hits - trials * probability) <= 3 * np.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("probability", [0.25, 0.5, 0.9])
def test_check_40_rate_and_types(probability: float) -> None:
    """Of 20,000 places: behind delimiters alone, then anywhere; of a type that does not fit none."""
    keys, shape = jax.random.split(jax.random.key(2), (200, 100)), (200, 100)
    last = np.random.default_rng(0).integers(0, v.KNOWN, shape)
    both = jnp.ones((*shape, 2), bool)
    for anywhere in (False, True):
        invoke = InvokeConfig("random", probability, anywhere, DELIMITERS)
        here, kind = (np.asarray(leaf) for leaf in forced(v.CONFIG, invoke, keys, last, both))
        may = np.ones(shape, bool) if anywhere else np.isin(last, DELIMITERS)
        assert not here[~may].any() and within(here.sum(), may.sum(), probability)
        assert within(kind[here].sum(), here.sum(), 0.5)
        short, _ = forced(v.CONFIG, invoke, keys, last, both.at[..., 1].set(False))
        np.testing.assert_array_equal(short, here & (kind == 0))


def places(rolled: Rollout, one: tuple[int, ...], prompt: int, most: int) -> list[tuple[int, int, bool]]:
    """(slot, token in front, was one forced) where either type had room and its turn; `prompt` is its last token."""
    found, tokens, kinds = [], rolled.tokens[one], rolled.kinds[one]
    for slot in range(min(int(rolled.lengths[one]), v.NEW - v.CONFIG.long - 1)):
        invoked = np.isin(kinds[:slot], (Slot.FORCED, Slot.INVOKE)).sum()
        front = int(tokens[slot - 1]) if slot else prompt
        behind_text = not slot or kinds[slot - 1] == Slot.TEXT
        if behind_text and kinds[slot] in (Slot.TEXT, Slot.FORCED) and invoked < most:
            found.append((slot, front, bool(kinds[slot] == Slot.FORCED)))
    return found


@pytest.mark.parametrize("name", ["delimiters", "anywhere"])
def test_check_40_memories_forced_in_rollouts(name: str) -> None:
    """Twelve rollouts; the rest of what may not be forced is check 22."""
    invoke, seen, kinds, prompts = VARIANTS[name].invoke, [], [], np.asarray(v.kept_rows().tokens)[:, -1]
    for seed in range(100, 112):
        rolled = play(name, keys=jax.random.split(jax.random.key(seed), 4))
        for one in members(rolled):
            here = places(rolled, one, int(prompts[one[0]]), invoke.max_invocations)
            kinds += [int(rolled.tokens[one][slot] == v.CONFIG.invoke_ids[1]) for slot, _, hit in here if hit]
            seen += here
            assert not (rolled.kinds[one] == Slot.INVOKE).any()
            if name == "delimiters":
                fronts = np.concatenate([prompts[one[0]][None], rolled.tokens[one][:-1]])
                assert np.isin(fronts[rolled.kinds[one] == Slot.FORCED], DELIMITERS).all()
    at_delimiter = np.isin([token for _, token, _ in seen], DELIMITERS)
    hits = np.array([hit for *_, hit in seen])
    assert len(hits) > 300 and hits[~at_delimiter].any() == (name == "anywhere")
    may = at_delimiter if name == "delimiters" else np.ones_like(at_delimiter)
    assert within(hits[may].sum(), may.sum(), invoke.probability) and within(sum(kinds), len(kinds), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "often"}, "'often' is none of free, random, off"),
        ({"mode": "random"}, "needs delimiters, or anywhere=True"),
        ({"content": "text"}, "'text' is none of memory, zero, noise, shuffle"),
        ({"disabled": ("middle",)}, f"may hold {' and '.join(TYPES)} alone"),
        ({"disabled_mode": "hide"}, "none of skip, mask"),
        ({"probability": 1.5}, r"lie in \[0, 1\], got 1.5"),
        ({"max_invocations": 0}, "must be at least 1"),
        ({"min_gap": -1}, "min_gap not negative"),
    ],
)
def test_impossible_settings(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InvokeConfig(**change)
