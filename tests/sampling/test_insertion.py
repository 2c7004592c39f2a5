"""Memories spliced in while decoding, against full forwards over the recorded slots: checks 17 to 25, 10 and 12."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.errors import ConfigError
from jaxmem.memory import vismem
from jaxmem.memory.vismem import VisMemConfig
from jaxmem.model import Spec
from jaxmem.sampling import generate, insertion, splicing
from jaxmem.sampling.invoking import InvokeConfig, fitting
from jaxmem.sampling.rollout import Rollout
from jaxmem.sampling.slots import Slot
from tests.memory import vismem_oracle
from tests.memory import vismem_world as v
from tests.memory import world as w
from tests.sampling.insertion_world import VARIANTS, base, free, members, play, played, weights


def permitted_by_hand(name: str, rolled: Rollout) -> np.ndarray:
    """[B, G, N, 2] bool: the rules of section 1.7, from the tokens alone."""
    variant = VARIANTS[name]
    invoke, sizes = variant.invoke, variant.config.sizes
    sizes = sizes[::-1] if invoke.reverse else sizes
    found = np.zeros((*rolled.kinds.shape, 2), bool)
    for row, member in members(rolled):
        count, gap = 0, 10**6
        for slot in range(rolled.lengths[row, member]):
            kind = rolled.kinds[row, member, slot]
            if kind in (Slot.MEMORY, Slot.END):
                continue
            for type_, type_name in enumerate(vismem.TYPES):
                off = type_name in invoke.disabled
                needed = 2 if off and invoke.disabled_mode == "skip" else sizes[type_] + 2
                found[row, member, slot, type_] = (
                    count < invoke.max_invocations
                    and gap >= invoke.min_gap
                    and v.NEW - slot >= needed
                    and not (off and invoke.disabled_mode == "mask")
                )
            invoked = kind in (Slot.FORCED, Slot.INVOKE)
            count, gap = count + invoked, 0 if invoked else gap + 1
    return found


@functools.cache
def states(name: str, padding: str = "left") -> np.ndarray:
    """[B, G, N, D] in front of every slot, by full forwards."""
    variant = VARIANTS[name]
    batch = v.kept_rows(padding)
    return v.states_by_hand(variant.spec, base(), variant.memory, batch, played(name, padding))


def logprobs(config: VisMemConfig, rolled: Rollout, hidden: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """[B, G, N] of the recorded tokens, in float64: the tokenizer's rows, and control tokens that could be sampled."""
    params = weights(config)
    rows = params["rows"]["unembed"]
    own = np.stack([rows["invoke"][0], rows["invoke"][1]]).astype(np.float64)
    head = np.asarray(base()["head"], np.float64)[: config.vocab]
    scores = np.full((*rolled.tokens.shape, config.vocab + 4), -np.inf)
    scores[..., : config.vocab] = hidden @ head.T
    scores[..., list(config.invoke_ids)] = np.where(allowed, hidden @ own.T + config.invoke_bias, -np.inf)
    top = scores.max(-1, keepdims=True)
    norm = top[..., 0] + np.log(np.exp(scores - top).sum(-1))
    return np.take_along_axis(scores, rolled.tokens[..., None], -1)[..., 0] - norm


def sampled(rolled: Rollout) -> np.ndarray:
    """[B, G, N] bool: tokens that the policy answers for."""
    return np.isin(rolled.kinds, (Slot.TEXT, Slot.INVOKE))


CASES = [(name, "left") for name in VARIANTS] + [("free", "right")]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_check_17_cached_decoding_equals_one_full_forward(name: str, padding: str) -> None:
    """Log-probabilities of all sampled tokens, behind one, two and three memories too, to 1e-4; of "reverse" beside a
    PVM, whose branch acts on every slot."""
    rolled, config = played(name, padding), VARIANTS[name].config
    allowed = permitted_by_hand(name, rolled) & (VARIANTS[name].invoke.mode == "free")
    known, used = logprobs(config, rolled, states(name, padding), allowed), sampled(rolled)
    np.testing.assert_allclose(np.where(used, rolled.logprobs, 0), np.where(used, known, 0), atol=1e-4)
    assert not rolled.logprobs[~used].any()
    memories = [len([call for call in v.calls(rolled, *one, config) if call.end >= 0]) for one in members(rolled)]
    assert sum(memories) > 3 and max(memories) > 1
    # Positions decide: one further on, or the official code's restart, is far off.
    if (name, padding) == ("free", "left"):
        for shift in (1, -5):
            moved = v.states_by_hand(
                VARIANTS[name].spec, base(), VARIANTS[name].memory, v.kept_rows(padding), rolled, shift
            )
            wrong = logprobs(config, rolled, moved, allowed)
            assert np.abs(wrong[used] - known[used]).max() > 0.01


def test_padding_does_not_matter() -> None:
    left, right = played("free"), played("free", "right")
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_allclose(left.memories, right.memories, atol=1e-4)


def test_check_18_positions_behind_an_image() -> None:
    """11 tokens with a grid of 1 x 4 x 4 patches: the next position is 9, the difference to the length -2."""
    row = w.example((3, (2, 2), 2), 0)
    assert len(row) == 11 and len(row.patches) == 16
    batch = w.batch_of([row], padding="left")
    (place,) = np.asarray(model.next_position(v.SPEC, batch))
    assert (place, place - len(row)) == (9, -2)
    _, kept = w.quick_prefill(v.SPEC, base(), VARIANTS["free"].memory, batch, w.SLOTS)
    assert kept.position.tolist() == [9]


@pytest.mark.parametrize("name", VARIANTS)
def test_check_19_an_insertion_takes_two_slots_and_its_vectors(name: str) -> None:
    """Slots, and keys in the cache: what the tail holds in reserve is one block of N + 1 per insertion."""
    rolled, config = played(name), VARIANTS[name].config
    for one in members(rolled):
        kinds, length = rolled.kinds[one], rolled.lengths[one]
        for call in v.calls(rolled, *one, config):
            if call.end >= 0:
                assert call.end - call.slot + 1 == config.sizes[call.formed] + 2
        assert (kinds[:length] != Slot.EMPTY).all() and not kinds[length:].any()


def test_check_19_cache_of_an_insertion() -> None:
    settings, keys = v.sampler(invoke=VARIANTS["free"].invoke), jax.random.split(jax.random.key(5), 4)
    state = v.last_state(v.SPEC, base(), VARIANTS["free"].memory, v.kept_rows(), settings, keys, v.GROUP)
    rolled, held = v.rolled(state), (np.asarray(state.cache.tail.segments) > 0).sum(-1)
    # The last token of a continuation that ended or ran out of slots was never read, unless a memory ended there.
    read = rolled.lengths - (np.take_along_axis(rolled.kinds, rolled.lengths[..., None] - 1, -1)[..., 0] != Slot.END)
    np.testing.assert_array_equal(held, read)
    reserve = insertion.columns(v.CONFIG, VARIANTS["free"].invoke)
    in_reserve = (np.asarray(state.cache.tail.segments)[..., :reserve] > 0).sum(-1)
    inserted = [sum(call.end - call.slot for call in v.calls(rolled, *one)) for one in members(rolled)]
    assert in_reserve.ravel().tolist() == inserted


def visual_by_hand(name: str, batch: Any, row: int) -> np.ndarray:
    """[Y, D] what memories of a prompt are formed of beside text."""
    config, content = VARIANTS[name].config, VARIANTS[name].invoke.content
    row = (row + 1) % 4 if content == "shuffle" else row
    whole = hidden_of(batch) if config.visual_source == "llm_last" else embeddings_of(batch)
    tokens, chosen = np.asarray(batch.tokens)[row], []
    for place in np.flatnonzero(np.asarray(batch.segments)[row] > 0):
        if tokens[place] in (w.START, w.END, w.IMAGE, w.VIDEO):
            chosen.append(place)
        if tokens[place] == w.END and config.visual_spans == "first":
            break
    if len(chosen) > config.visual_cap:
        chosen = [chosen[at * len(chosen) // config.visual_cap] for at in range(config.visual_cap)]
    return np.asarray(whole)[row][chosen]


def hidden_of(batch: Any) -> Any:
    return w.quick_hidden(Spec(v.BACKBONE), base(), {}, batch)  # "llm_last" is never played beside another memory


def embeddings_of(batch: Any) -> Any:
    return w.read_prompt(Spec(v.BACKBONE), base(), {}, batch).x


def formed_by_hand(name: str, one: tuple[int, int], call: v.Call) -> np.ndarray:
    """A memory from the states that the rule of section 1.3 names, by numpy."""
    config = VARIANTS[name].config
    text = states(name)[one][call.first : call.slot + 2][-config.text_cap :]
    visual = visual_by_hand(name, v.kept_rows(), one[0])
    params = weights(config)
    return vismem_oracle.memory(config, v.BACKBONE, base(), params, call.formed, visual, text)


@pytest.mark.parametrize("name", ["free", "reverse", "official"])
def test_check_20_what_memories_are_formed_of(name: str) -> None:
    """n tokens and the invocation behind the last memory give n + 2 states, of which the last `text_cap` count."""
    rolled, config = played(name), VARIANTS[name].config
    counts = []
    for one in members(rolled):
        for nth, call in enumerate(v.calls(rolled, *one, config)):
            known = formed_by_hand(name, one, call)
            np.testing.assert_allclose(rolled.memories[one][nth, : len(known)], known, atol=2e-4)
            counts.append(call.slot + 2 - call.first)
            tokens = rolled.kinds[one][call.first : call.slot]
            assert (tokens == Slot.TEXT).all() and counts[-1] == len(tokens) + 2
    assert name != "free" or (min(counts) <= 3 and max(counts) > config.text_cap)


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_of_the_record_names_the_same_states(name: str) -> None:
    """`locate` and `embeddings`, which training uses, against the record read by hand."""
    rolled, config = played(name), VARIANTS[name].config
    most = VARIANTS[name].invoke.max_invocations
    found = splicing.locate(config, rolled.tokens, rolled.kinds, rolled.permits, most)
    x = splicing.embeddings(
        VARIANTS[name].spec, base(), VARIANTS[name].memory, rolled.tokens, rolled.memories, found.place
    )
    np.testing.assert_array_equal(x, v.embedded_by_hand(config, base(), VARIANTS[name].memory, rolled))
    for one in members(rolled):
        called = v.calls(rolled, *one, config)
        types = [call.formed for call in called]
        assert found.types[one].tolist() == types + [-1] * (most - len(types))
        for nth, call in enumerate(called):
            text = found.text[one][nth]
            known = np.arange(call.first, call.slot + 2)[-config.text_cap :] if call.end >= 0 else []
            assert text[text >= 0].tolist() == list(known)


@pytest.mark.parametrize("name", VARIANTS)
def test_check_21_the_end_token_is_that_of_the_memory(name: str) -> None:
    rolled, invoke = played(name), VARIANTS[name].invoke
    kinds = set()
    for one in members(rolled):
        for call in v.calls(rolled, *one):
            if vismem.TYPES[call.kind] in invoke.disabled:
                assert call.end == -1 and invoke.disabled_mode == "skip"
            else:
                assert call.formed == (1 - call.kind if invoke.reverse else call.kind)
            kinds.add(call.kind)
    assert kinds == ({1} if name == "official" else {0, 1})


@pytest.mark.parametrize("name", VARIANTS)
def test_check_22_what_could_be_sampled_follows_the_rules(name: str) -> None:
    rolled, config, invoke = played(name), VARIANTS[name].config, VARIANTS[name].invoke
    allowed = permitted_by_hand(name, rolled)
    recorded = np.stack([rolled.permits & 1, rolled.permits >> 1], -1).astype(bool)
    np.testing.assert_array_equal(recorded, allowed & (invoke.mode == "free"))
    is_end, is_invoke = (np.isin(rolled.tokens, ids) for ids in (config.end_ids, config.invoke_ids))
    np.testing.assert_array_equal(is_end, rolled.kinds == Slot.END)
    np.testing.assert_array_equal(is_invoke, np.isin(rolled.kinds, (Slot.INVOKE, Slot.FORCED)))
    assert (rolled.kinds == (Slot.FORCED if invoke.mode == "free" else Slot.INVOKE)).sum() == 0
    for one in members(rolled):
        called = v.calls(rolled, *one)
        assert len(called) <= invoke.max_invocations
        for call in called:
            assert allowed[one][call.slot, call.kind]
        for call, after in zip(called, called[1:], strict=False):
            assert after.slot - max(call.end, call.slot) > invoke.min_gap
        assert (rolled.kinds[one] == Slot.END).sum() == sum(call.end >= 0 for call in called)


def test_check_22_an_insertion_may_take_the_last_slots() -> None:
    """Where places are random and no gap is asked for, some continuation ends with an end token."""
    rolled = played("anywhere")
    ends = [call.end for one in members(rolled) for call in v.calls(rolled, *one)]
    assert v.NEW - 1 in ends and len(ends) > 36


def test_check_22_room_for_an_insertion() -> None:
    """N + 2 slots are enough, one fewer is not; a reversed type needs the other's."""
    zero = jnp.zeros((1, 1), jnp.int32)
    room = lambda invoke, limit: fitting(v.CONFIG, invoke, zero, zero, zero + 9, limit)[0, 0].tolist()  # noqa: E731
    assert [room(v.FREE, limit) for limit in (3, 4, 5, 6)] == [[False, False], [True, False], [True, False], [True] * 2]
    swapped = InvokeConfig(reverse=True)
    assert [room(swapped, limit) for limit in (3, 4, 5, 6)] == [[False] * 2, [False, True], [False, True], [True] * 2]
    skipped = InvokeConfig(disabled=("long",))
    assert [room(skipped, limit) for limit in (1, 2, 4)] == [[False, False], [False, True], [True, True]]


def test_check_23_rows_equal_their_single_runs() -> None:
    whole, batch, keys = played("free"), v.kept_rows(), jax.random.split(jax.random.key(5), 4)
    for row in range(4):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        one = v.play(alone, v.FREE, base=base(), memory=VARIANTS["free"].memory, keys=keys[row : row + 1], group=1)
        for name in ("tokens", "kinds", "lengths", "permits"):
            np.testing.assert_array_equal(getattr(one, name)[0, 0], getattr(whole, name)[row, 0])
        np.testing.assert_allclose(one.logprobs[0, 0], whole.logprobs[row, 0], atol=1e-4)
    starts = {tuple(call.slot for call in v.calls(whole, *one)) for one in members(whole)}
    assert len(starts) > 5


def test_check_12_rows_at_once_and_kept_prefixes_do_not_matter() -> None:
    """One row at a time behind a prefix cache, or four without one and with formers of several text sizes."""
    one, four = played("free"), played("apart")
    np.testing.assert_array_equal(one.tokens, four.tokens)
    np.testing.assert_array_equal(one.kinds, four.kinds)
    np.testing.assert_allclose(one.logprobs, four.logprobs, atol=1e-4)
    np.testing.assert_allclose(one.memories, four.memories, atol=1e-4)


def test_check_24_finished_rows_emit_pads_alone() -> None:
    ended = 0
    for name in VARIANTS:
        rolled = played(name)
        for one in members(rolled):
            length, behind = rolled.lengths[one], slice(rolled.lengths[one], None)
            assert (rolled.tokens[one][behind] == v.PAD).all() and not rolled.permits[one][behind].any()
            stops = rolled.tokens[one][:length] == v.STOP
            stops &= rolled.kinds[one][:length] == Slot.TEXT
            assert not stops[:-1].any()
            assert rolled.truncated[one] == (not stops[-1]) and (stops[-1] or length == v.NEW)
            ended += stops[-1]
    assert ended > 5


def test_check_25_a_skipped_type_adds_no_slots() -> None:
    """The token stays, text follows at once, and the other type's memories are formed across it."""
    rolled, across = played("skip"), 0
    for one in members(rolled):
        called = v.calls(rolled, *one)
        for nth, call in enumerate(called):
            if call.kind == 1:
                assert rolled.kinds[one][call.slot + 1] == Slot.TEXT
                assert not rolled.memories[one][nth].any()
            else:
                known = formed_by_hand("skip", one, call)
                np.testing.assert_allclose(rolled.memories[one][nth, : len(known)], known, atol=2e-4)
                across += any(call.first <= other.slot < call.slot for other in called)
    assert across


@pytest.mark.parametrize(("name", "unused"), [("skip", "long"), ("official", "short")])
def test_check_10_an_adapter_that_forms_no_memory_changes_no_bit(name: str, unused: str) -> None:
    """Nor does it change what the policy thinks of any token; the other one does."""
    whole, params = played(name), weights(VARIANTS[name].config)
    used = {"long": "short", "short": "long"}[unused]
    for adapter, same in ((unused, True), (used, False)):
        edited = {**params, adapter: jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, params[adapter])}
        after = play(name, memory={"vismem": edited})
        equal = [np.array_equal(getattr(after, leaf), getattr(whole, leaf)) for leaf in ("logprobs", "memories")]
        assert equal == [same] * 2
    first = min(v.calls(whole, *one)[0].slot for one in members(whole) if v.calls(whole, *one))
    np.testing.assert_array_equal(after.logprobs[:, :, : first + 1], whole.logprobs[:, :, : first + 1])


def test_contents_that_tell_information_from_computation() -> None:
    """Zeros; noise of each vector's size, of the continuation's own key; memories of the next prompt's images."""
    zero, noise = played("anywhere"), played("delimiters")
    assert not zero.memories.any() and (zero.kinds == Slot.MEMORY).any()
    sizes, seen = [], []
    for one in members(noise):
        for nth, call in enumerate(v.calls(noise, *one)):
            made = noise.memories[one][nth, : v.CONFIG.sizes[call.formed]]
            known = formed_by_hand("delimiters", one, call)
            sizes.append(np.sqrt((made**2).mean(-1)) / np.sqrt((known**2).mean(-1)))
            seen.append(made[0] / np.linalg.norm(made[0]))
    ratio = np.concatenate(sizes)
    assert np.mean(ratio**2) == pytest.approx(1, abs=4 / np.sqrt(len(ratio) * 24)) and ratio.std() > 0.02
    close = np.abs(np.stack(seen) @ np.stack(seen).T - np.eye(len(seen)))
    assert close.max() < 0.7  # directions in 48 dimensions that have nothing in common
    assert VARIANTS["official"].invoke.content == "shuffle"  # what its memories are formed of is tested above


def test_shuffled_memories_of_a_single_prompt_are_refused() -> None:
    alone = jax.tree.map(lambda leaf: leaf[:1], v.kept_rows())
    with pytest.raises(ConfigError, match="at least two prompts"):
        v.play(alone, free(content="shuffle"), base=base(), memory=VARIANTS["free"].memory)


def test_bfloat16_weights_with_float32_memories() -> None:
    """Every loop carries what it began with: shapes alone, traced."""
    narrow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), base())
    batch, keys = v.kept_rows(), jax.random.split(jax.random.key(0), (4, 3))
    for name in ("free", "delimiters"):
        settings, memory = v.sampler(invoke=VARIANTS[name].invoke), VARIANTS[name].memory
        start = functools.partial(generate.start.__wrapped__, v.SPEC, settings, w.TOKENS + v.NEW)
        proceed = functools.partial(generate.proceed.__wrapped__, v.SPEC, settings)
        state = jax.eval_shape(start, narrow, memory, batch, keys)
        after = jax.eval_shape(proceed, narrow, memory, state, jnp.int32(v.NEW))
        assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
        assert after.insertions.memories.dtype == jnp.bfloat16
