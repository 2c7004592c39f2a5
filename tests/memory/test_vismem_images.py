"""What VisMem sees of images: acceptance checks 26 and 27, sources, spans, caps and several turns."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from jaxmem.errors import DataError
from jaxmem.memory import former
from jaxmem.memory.former import Seen
from jaxmem.memory.vismem import VisMemConfig
from jaxmem.model import Spec
from jaxmem.sampling import generate
from tests.backbones.prompts import PROMPTS
from tests.memory import vismem_world as v
from tests.memory import world as w
from tests.memory.vismem_folder import BUCKETS, pair, with_vismem
from tests.sampling.insertion_world import VARIANTS, base, played

BARE = Spec(v.BACKBONE)
MERGER, LAST = v.CONFIG, dataclasses.replace(v.CONFIG, visual_source="llm_last")
gather = jax.jit(former.gather, static_argnames="config")
joined = jax.jit(former.joined, static_argnames="config")


def first(config: VisMemConfig) -> VisMemConfig:
    return dataclasses.replace(config, visual_spans="first")


def capped(config: VisMemConfig, cap: int) -> VisMemConfig:
    return dataclasses.replace(config, builder_length=cap + config.text_cap + config.queries)


def places(tokens: np.ndarray, valid: np.ndarray, config: VisMemConfig) -> list[int]:
    """Places of the visual states of a row, by a loop over its tokens."""
    found, inside = [], False
    for place in np.flatnonzero(valid):
        inside = inside or tokens[place] == w.START
        if inside:
            found.append(int(place))
        if tokens[place] == w.END:
            inside = False
            if config.visual_spans == "first":
                break
    cap = config.visual_cap
    return found if len(found) <= cap else [found[nth * len(found) // cap] for nth in range(cap)]


def by_hand(config: VisMemConfig, batch: Any, states: Any) -> list[np.ndarray]:
    rows = zip(np.asarray(batch.tokens), np.asarray(batch.segments) > 0, np.asarray(states), strict=True)
    return [kept[places(tokens, valid, config)] for tokens, valid, kept in rows]


def packed(seen: Seen) -> list[np.ndarray]:
    """The valid states of every row, which must stand first; zeros behind them."""
    found = []
    for rows, valid in zip(np.asarray(seen.rows), np.asarray(seen.valid), strict=True):
        count = int(valid.sum())
        assert valid[:count].all() and not rows[count:].any()
        found.append(rows[:count])
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("source", [MERGER, LAST], ids=["vision_merger", "llm_last"])
def test_check_26_states_of_all_images(source: VisMemConfig, padding: str) -> None:
    """y = sum of (merged patches + 2), of images and frames of a video alike; the sources are the model's own."""
    batch = v.kept_rows(padding)
    seen = v.read(Spec(v.BACKBONE, (source,)), base(), VARIANTS["free"].memory, batch).states["vismem"]
    assert np.asarray(seen.valid).sum(1).tolist() == [(6 + 2) + (2 + 2), 3 + 2, 0, 1 + 2]
    embedded = w.read_prompt(BARE, base(), {}, batch).x
    states = embedded if source is MERGER else w.quick_hidden(BARE, base(), {}, batch)
    for ours, known in zip(packed(seen), by_hand(source, batch, states), strict=True):
        np.testing.assert_allclose(ours, known, atol=1e-5)


def numbers(batch: Any) -> np.ndarray:
    """[B, T, 1] states that say where they stand."""
    return np.arange(1, batch.tokens.size + 1, dtype=np.float32).reshape(*batch.tokens.shape, 1)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_check_26_the_first_image_alone(padding: str) -> None:
    batch = v.kept_rows(padding)
    seen = gather(first(MERGER), batch, numbers(batch))
    assert np.asarray(seen.valid).sum(1).tolist() == [8, 5, 0, 3]
    for ours, known in zip(packed(seen), by_hand(first(MERGER), batch, numbers(batch)), strict=True):
        np.testing.assert_array_equal(ours, known)


@pytest.mark.parametrize("cap", [1, 3, 5, 7, 11, 12])
@pytest.mark.parametrize("spans", ["all", "first"])
def test_more_states_than_there_is_room_for_are_taken_at_a_uniform_stride(cap: int, spans: str) -> None:
    config = dataclasses.replace(capped(MERGER, cap), visual_spans=spans)
    assert config.visual_cap == cap
    batch = v.kept_rows()
    seen = gather(config, batch, numbers(batch))
    assert seen.rows.shape[1] == cap
    for ours, known in zip(packed(seen), by_hand(config, batch, numbers(batch)), strict=True):
        np.testing.assert_array_equal(ours, known)
        assert len(known) <= cap and (np.diff(known[:, 0]) > 0).all()


def test_check_27_a_prompt_without_images() -> None:
    """Alone, with no room for an image in its program, and among prompts with images: the same continuations."""
    text = w.batch_of([w.rows_of(3)[2]], padding="left")
    assert text.patches.shape[1] == 0
    memory, keys = VARIANTS["free"].memory, jax.random.split(jax.random.key(5), 4)
    assert v.read(v.SPEC, base(), memory, text).states["vismem"] is None
    alone, whole = v.play(text, v.FREE, base=base(), memory=memory, keys=keys[2:3]), played("free")
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2])
    np.testing.assert_array_equal(alone.kinds[0], whole.kinds[2])
    np.testing.assert_allclose(alone.logprobs[0], whole.logprobs[2], atol=1e-4)
    np.testing.assert_allclose(alone.memories[0], whole.memories[2], atol=1e-4)
    assert sum(len(v.calls(alone, 0, member)) for member in range(v.GROUP)) > 0


def test_several_turns_are_seen_as_one_prompt_would_be() -> None:
    """A later turn's images come behind."""
    spec, memory = Spec(v.BACKBONE, (LAST,)), VARIANTS["free"].memory
    one, two = w.rows_of(3), w.rows_of(4)
    two = [two[at] for at in (1, 0, 3, 2)]  # an image first, two images, one visual token, text alone
    _, kept = w.quick_prefill(spec, base(), memory, w.batch_of(one), w.SLOTS)
    _, kept = w.extend(spec, base(), memory, kept, w.batch_of(two))
    whole = w.batch_of([w.join(*pair) for pair in zip(one, two, strict=True)], tokens=2 * w.TOKENS, patches=72)
    known = packed(v.read(spec, base(), memory, whole).states["vismem"])
    assert [len(row) for row in known] == [12 + 5, 5 + 12, 3, 3]
    for ours, row in zip(packed(kept.states["vismem"]), known, strict=True):
        np.testing.assert_allclose(ours, row, atol=1e-4)


def test_the_first_image_of_several_turns() -> None:
    """A row that has an image keeps it alone; one without takes the next turn's first."""
    batches = [w.batch_of(w.rows_of(3)), w.batch_of([w.rows_of(4)[at] for at in (1, 0, 3, 2)])]
    config = first(MERGER)
    one, two = (gather(config, batch, numbers(batch)) for batch in batches)
    found = packed(joined(config, one, two))
    assert [len(row) for row in found] == [8, 5, 3, 3]
    for row, (of_one, of_two, kept) in enumerate(zip(packed(one), packed(two), found, strict=True)):
        np.testing.assert_array_equal(kept, of_two if row == 2 else of_one)


def test_several_turns_stay_within_the_cap() -> None:
    """What the query builder has room for is room for all turns together."""
    state = lambda start, counts, width: Seen(  # noqa: E731
        np.where(np.arange(width) < np.array(counts)[:, None], start + np.arange(width), 0.0)[..., None],
        np.arange(width) < np.array(counts)[:, None],
    )
    config = capped(MERGER, 6)
    found = packed(joined(config, state(10, (4, 6, 0), 6), state(50, (5, 1, 0), 5)))
    both = [10, 11, 12, 13, 50, 51, 52, 53, 54]
    assert found[0][:, 0].tolist() == [both[at * 9 // 6] for at in range(6)]
    assert found[1][:, 0].tolist() == [[10, 11, 12, 13, 14, 15, 50][at * 7 // 6] for at in range(6)]
    assert len(found[2]) == 0
    assert former.joined(config, None, None) is None
    only = state(1, (2,), 3)
    assert former.joined(config, only, None) is only and former.joined(config, None, only) is only


def test_check_26_frames_of_a_video() -> None:
    """Through the processor: every frame's own span counts, and the pair around the whole video; the time that stands
    between frames does not."""
    model = with_vismem(pair()[0])
    config = model.spec.vismem
    batch = model.batch([PROMPTS["video"], PROMPTS["three_interleaved"]], buckets=BUCKETS)
    inside = former.spans(config, batch)
    assert inside.sum(1).tolist() == [3 * (2 * 3 + 2) + 2, (9 + 2) + (2 * 5 + 2) + (4 + 2)]
    assert former.spans(first(config), batch).sum(1).tolist() == [1 + 2 * 3 + 2, 9 + 2]
    backbone = model.spec.backbone
    media = (*backbone.media_tokens, backbone.vision_start_token, backbone.vision_end_token)
    np.testing.assert_array_equal(inside, np.isin(batch.tokens, media) & (batch.segments > 0))


OVER = capped(MERGER, 4)


def test_too_many_states_are_refused_before_anything_is_computed() -> None:
    strict = dataclasses.replace(OVER, overflow="error")
    message = (
        r"row 0 has 12, row 1 has 5 visual states, and memories are formed of at most 4 \(visual_cap\); .*max_pixels"
        r'.*text_cap.*builder_length, or set vismem.overflow="subsample"'
    )
    with pytest.raises(DataError, match=message):
        former.check_spans(strict, v.kept_rows())
    with pytest.raises(DataError, match="row 0 has 8, row 1 has 5 visual states"):
        former.check_spans(first(strict), v.kept_rows())
    spec = Spec(v.BACKBONE, (strict,))
    before = generate.start._cache_size()
    with pytest.raises(DataError, match="row 0 has 12"):
        v.play(v.kept_rows(), v.FREE, base=base(), memory=None, spec=spec)
    assert generate.start._cache_size() == before


def test_too_many_states_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="row 0 has 12, row 1 has 5 visual states.*4 .*uniform stride") as caught:
        former.check_spans(OVER, v.kept_rows("right"))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        former.check_spans(MERGER, v.kept_rows())
        former.check_spans(capped(MERGER, 12), jax.tree.map(np.asarray, v.kept_rows()))


def test_answers_of_a_model_say_so_too() -> None:
    strict = with_vismem(pair()[0], builder_length=30, overflow="error")
    with pytest.raises(DataError, match=r"row 1 has 34 visual states.*at most 15 \(visual_cap\)"):
        strict.generate([PROMPTS["text"], PROMPTS["wide_and_tall"]], max_new_tokens=4)
