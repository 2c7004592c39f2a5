"""Acceptance checks 12 to 20 of Vision Remember: what it changes in a model, what it may depend on, and its costs."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.batching import widen
from jaxmem.memory import vision_remember
from tests.memory import vision_world as v
from tests.memory import world as w

PRESETS = pytest.mark.parametrize("preset", v.PRESETS)
TEXTS = ("question_mean", "last_prompt_token", "attn_pool")
LAYERS = v.SMALL["layers"]


def same(one: Any, two: Any) -> None:
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def world(preset: str, gate: float | None = None, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """The model, the settings, what is computed, and random parameters."""
    backbone = v.llava()
    config = v.config_of(backbone, preset, **settings)
    return backbone, config, v.spec_of(backbone, config), v.memory_of(config, gate=gate)


@PRESETS
def test_check_12_rows_without_images_are_the_backbone(preset):
    backbone, _, spec, memory = world(preset)
    batch = v.batch_of(backbone)
    ours, bare = w.hidden(spec, backbone.base, memory, batch), w.hidden(v.spec_of(backbone), backbone.base, {}, batch)
    assert np.isfinite(ours).all()
    row = v.ROWS.index("text")
    same(ours[row], bare[row])
    assert np.all(np.abs(np.asarray(ours - bare)).max((1, 2))[[i for i in range(len(v.ROWS)) if i != row]] > 0.1)
    alone = v.batch_of(backbone, ("text",))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, memory)
    same(w.hidden(spec, backbone.base, broken, alone), w.hidden(v.spec_of(backbone), backbone.base, {}, alone))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("preset", "settings"), [("vr_v1", {}), ("vr_v2", {"ffn": True, "gate_shape": "vector"})], ids=["v1", "v2_ffn"]
)
def test_check_13_closed_gates_are_the_backbone_bit_for_bit(preset, settings, padding):
    backbone, _, spec, memory = world(preset, 0.0, **settings)
    batch = v.batch_of(backbone, padding=padding)
    ours, bare = w.hidden(spec, backbone.base, memory, batch), w.hidden(v.spec_of(backbone), backbone.base, {}, batch)
    same(ours, bare)
    same(w.logits(spec, backbone.base, ours), w.logits(spec, backbone.base, bare))


@PRESETS
def test_check_13_a_fresh_one_is_the_backbone_and_can_be_taken_off(preset, tmp_path):
    backbone, chats = v.llava(), [v.CHATS[name] for name in v.ROWS]
    attached = backbone.attach("vision_remember", preset=preset, **v.SMALL)
    one, two = (some.batch(chats, buckets=v.BUCKETS) for some in (attached, backbone))
    same(one.tokens, two.tokens)  # tokens are the projector's: none is added
    assert two.question is None and (one.question is None) == (preset == "vr_v1")
    states = w.hidden(attached.spec, attached.base, attached.memory, one)
    same(states, w.hidden(backbone.spec, backbone.base, {}, two))
    bare = np.asarray(backbone.logits(two))
    np.testing.assert_allclose(attached.logits(one), bare, rtol=0, atol=2e-6 * np.abs(bare).max())
    same(attached.without_memory().logits(one), bare)
    opened = dataclasses.replace(attached, memory=v.memory_of(attached.spec.memories[0]))
    changed = opened.logits(one)
    assert np.abs(np.asarray(changed - bare)).max() > 0.5
    opened.save(tmp_path / preset)
    restored = backbone.restore(tmp_path / preset)
    assert restored.spec == opened.spec
    same(restored.logits(one), changed)


@PRESETS
def test_check_14_text_and_newlines_pass_through(preset):
    backbone, config, spec, memory = world(preset)
    batch = v.batch_of(backbone, padding="left")
    before, after, _ = map(np.asarray, v.watched(spec, backbone.base, memory, batch))
    vision = v.Kinds(batch, config.cells.first).vision
    assert v.Kinds(batch, config.cells.first).newline.any() and not vision[v.ROWS.index("text")].any()
    for layer in range(v.DEPTH):
        same(before[layer][~vision], after[layer][~vision])
        moved = np.abs(after[layer] - before[layer])[vision].max(-1)
        assert moved.min() > 1e-2 if layer in LAYERS else moved.max() == 0


@PRESETS
def test_check_15_vision_rows_reach_the_answers_and_need_the_features(preset):
    backbone, config, spec, memory = world(preset)
    batch = v.batch_of(backbone)
    blind = jax.tree.map(lambda leaf: leaf, memory)
    norm = blind["vision_remember"]["fusion"]["norm"]
    blind["vision_remember"]["fusion"]["norm"] = jax.tree.map(jnp.zeros_like, norm)  # fused features of zero
    scores = lambda spec, memory: np.asarray(  # noqa: E731
        w.logits(spec, backbone.base, w.hidden(spec, backbone.base, memory, batch))
    )
    ours, zeroed, bare = scores(spec, memory), scores(spec, blind), scores(v.spec_of(backbone), {})
    answers = np.asarray(batch.loss_mask[v.ROWS.index("answered")]) > 0
    assert answers.any()
    for one, two in ((ours, bare), (ours, zeroed), (zeroed, bare)):
        assert np.abs(one - two)[v.ROWS.index("answered")][answers].max(-1).min() > 1e-2


@functools.partial(jax.jit, static_argnames="spec")
def influence(spec: Any, base: Any, memory: Any, batch: Any, x: Any, places: Any) -> Any:
    """[L, N, T]: how much the states of N tokens of the one row depend, behind each layer, on each embedding."""
    weights = jax.random.normal(jax.random.key(0), x.shape)

    def found(x: Any) -> Any:
        return (v.watch(spec, base, memory, batch, x)[1] * weights).sum(-1)[:, 0, places]

    return jnp.abs(v.slopes(found, x)).sum(-1).reshape(v.DEPTH, len(places), -1)


def asked(name: str, spec: Any, memory: Any, backbone: Any) -> tuple[Any, np.ndarray]:
    """A batch of one row, and how its vision rows depend on its embeddings: [L, vision tokens, T]."""
    batch = v.batch_of(backbone, (name,))
    x, places = v.embeddings(spec, backbone.base, memory, batch), np.flatnonzero(v.Kinds(batch, 1).vision[0])
    return batch, np.asarray(influence(spec, backbone.base, memory, batch, x, places))


def test_check_17_v1_does_not_depend_on_text_behind_the_image():
    backbone, _, spec, memory = world("vr_v1")
    batch, found = asked("answered", spec, memory, backbone)
    kinds = v.Kinds(batch, 1)
    assert kinds.behind[0].sum() > 15
    assert not found[:, :, kinds.behind[0]].any()
    before = kinds.text[0] & ~kinds.behind[0]
    assert np.all(found[:, :, before].max(1) > 0)  # text in front of it is seen


@pytest.mark.parametrize(
    "settings", [{"text_token": text} for text in TEXTS] + [{"order": "cross_then_self", "layers": (1, 3)}]
)
def test_check_17_v2_depends_on_the_question_and_never_on_answers_or_later_turns(settings):
    backbone, _, spec, memory = world("vr_v2", **settings)
    batch, found = asked("answered", spec, memory, backbone)
    kinds = v.Kinds(batch, 1)
    question, behind, taught = kinds.question[0], kinds.behind[0], np.asarray(batch.loss_mask[0]) > 0
    assert question.sum() == 8 and np.all(behind[question]) and np.all(behind[taught]) and taught.sum() > 6
    later = np.arange(len(question)) > np.flatnonzero(question)[-1]
    assert np.all(later[taught]) and (later & kinds.valid[0]).sum() > 25  # answers, later turns, the template's own
    assert not found[:, :, later].any()  # exactly
    read = found[:, :, question].max(1) > 0  # [L, question tokens]
    first = spec.memories[0].layers[0]
    assert read[first:].all() and not read[:first].any()


def test_check_17_answers_cannot_be_told_from_vision_rows():
    """Other answers, of the same length: every state up to the end of the question stays the same, bit for bit."""
    backbone, _, spec, memory = world("vr_v2")
    batch = v.batch_of(backbone, ("answered",))
    end = int(np.flatnonzero(np.asarray(batch.question[0]))[-1]) + 1
    other = batch.replace(tokens=batch.tokens.at[:, end:].set((batch.tokens[:, end:] + 7) % 400))
    one, two = (v.watched(spec, backbone.base, memory, some)[1] for some in (batch, other))
    same(one[:, :, :end], two[:, :, :end])
    assert np.abs(np.asarray(one - two))[:, :, end:].max() > 1


@functools.partial(jax.jit, static_argnums=0)
def touched(config: Any, params: Any, batch: Any, levels: Any, x: Any) -> Any:
    """[B, T, B, T]: how the states behind one block depend on those in front of it."""
    slopes = v.slopes(lambda x: v.act(config, params, batch, levels, x).sum(-1), x)
    return jnp.abs(slopes).sum(-1).reshape(*x.shape[:2], *x.shape[:2])


@pytest.mark.parametrize("settings", [{}, {"order": "cross_then_self"}, {"text_token": "none"}, {"local": False}])
def test_check_18_tokens_of_an_image_ask_each_other_both_ways_and_nobody_else(settings):
    backbone = v.llava()
    config = v.config_of(backbone, "vr_v2", **settings)
    batch = v.batch_of(backbone, ("several", "square"))
    x = v.stream_like(batch, config.width)
    found = np.asarray(touched(config, v.params_of(config), batch, v.features(config, batch), x)) > 0
    image = np.zeros(x.shape[:2], int)  # by hand: images are runs of visual tokens
    for row, visual in enumerate(np.asarray(batch.is_visual)):
        starts = np.flatnonzero(np.diff(visual.astype(int), prepend=0) == 1)
        image[row] = np.where(visual, np.searchsorted(starts, np.arange(len(visual)), "right"), 0)
    kinds = v.Kinds(batch, 1)
    assert image.max(1).tolist() == [2, 1]
    image = np.where(kinds.vision, image, 0)
    known = (image[:, :, None] == image[:, None]) & (image > 0)[:, :, None]
    if config.asks:
        known |= (image > 0)[:, :, None] & kinds.question[:, None]
    known |= np.eye(x.shape[1], dtype=bool)
    for row in range(2):
        same(found[row, :, row], known[row])
        assert not found[row, :, 1 - row].any()  # another sample


def test_check_18_in_v1_tokens_stay_by_themselves():
    backbone = v.llava()
    config, batch = v.config_of(backbone), v.batch_of(backbone, ("square",))
    found = touched(config, v.params_of(config), batch, v.features(config, batch), v.stream_like(batch, config.width))
    same(np.asarray(found)[0, :, 0] > 0, np.eye(batch.tokens.shape[1], dtype=bool))


CONVERSATIONS = {
    "square": v.answered(v.CHATS["square"], v.ANSWERS[0]),
    "several": v.answered(v.CHATS["several"], "people in streets"),
    "text": v.answered(v.CHATS["text"], "seven rows of numbers"),
    "turns": v.answered(v.CHATS["turns"], "animals and then a dog"),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@PRESETS
def test_check_19_prefill_and_decode_are_the_full_forward(preset, padding):
    """The prompts of decoding have no answers yet: what the forward of training knows of them cannot matter."""
    backbone, _, spec, memory = world(preset)
    prompts = v.batch_of(backbone, [v.CHATS[name] for name in CONVERSATIONS], padding=padding, prompt=True)
    rows = [v.encoded(backbone, chat) for chat in CONVERSATIONS.values()]
    whole = v.batch_of(backbone, list(CONVERSATIONS.values()))
    full = np.asarray(w.hidden(spec, backbone.base, memory, whole))
    lengths = np.asarray(prompts.segments > 0).sum(1)
    steps = min(len(row) - length for row, length in zip(rows, lengths, strict=True))
    assert steps >= 5
    states, kept = w.prefill(spec, backbone.base, memory, prompts, 128)
    for step in range(steps):
        known = full[np.arange(len(rows)), lengths - 1 + step]
        np.testing.assert_allclose(states, known, rtol=0, atol=1e-4)
        tokens = jnp.asarray([row.tokens[length + step] for row, length in zip(rows, lengths, strict=True)])
        states, kept = w.decode(spec, backbone.base, memory, kept, tokens, jnp.ones(len(rows), bool))
    bare = np.asarray(w.hidden(v.spec_of(backbone), backbone.base, {}, whole))
    differs = np.abs(full - bare)[np.arange(len(rows)), lengths + 1].max(-1)
    assert np.all(differs[[0, 1, 3]] > 0.05)  # what answers read was remembered


def decoding(backbone: Any, spec: Any, memory: Any) -> str:
    """The program of one generated token, with the memory's weights closed over: what is not read is not in it."""
    batch = v.batch_of(backbone, prompt=True)
    _, kept = jax.eval_shape(lambda base: w.prefill_and_fork(spec, base, memory, batch, 128), backbone.base)
    step = lambda base, kept: w.decode_step(  # noqa: E731
        spec, base, memory, kept, jnp.zeros(len(v.ROWS), jnp.int32), jnp.ones(len(v.ROWS), bool)
    )
    text = str(jax.make_jaxpr(step)(backbone.base, kept))
    return re.sub("0x[0-9a-f]+", "", text)


@PRESETS
def test_check_19_decoding_has_no_operation_of_it_and_no_image(preset):
    backbone, _, spec, memory = world(preset)
    program = decoding(backbone, spec, memory)
    assert program == decoding(backbone, v.spec_of(backbone), {})
    patches = v.batch_of(backbone).patches.shape
    assert "f32[" in program and f"{patches[1]},{patches[2]}]" not in program


@PRESETS
def test_check_20_larger_buckets_change_nothing(preset):
    backbone, _, spec, memory = world(preset)
    batch = v.batch_of(backbone)
    wide = widen(jax.tree.map(np.asarray, batch), 224, 240)
    valid = np.asarray(batch.segments) > 0
    one = np.asarray(w.hidden(spec, backbone.base, memory, batch))
    two = np.asarray(w.hidden(spec, backbone.base, memory, jax.tree.map(jnp.asarray, wide)))[:, : valid.shape[1]]
    np.testing.assert_allclose(one[valid], two[valid], rtol=0, atol=1e-5)
    for at, name in enumerate(v.ROWS):  # nor does company
        alone = np.asarray(w.hidden(spec, backbone.base, memory, v.batch_of(backbone, (name,))))[0]
        np.testing.assert_allclose(one[at][valid[at]], alone[valid[at]], rtol=0, atol=1e-5)


@PRESETS
def test_what_is_watched_is_what_is_computed(preset):
    backbone, _, spec, memory = world(preset)
    batch = v.batch_of(backbone)
    valid = np.asarray(batch.segments) > 0
    one, two = v.watched(spec, backbone.base, memory, batch)[2], w.hidden(spec, backbone.base, memory, batch)
    np.testing.assert_allclose(np.asarray(one)[valid], np.asarray(two)[valid], rtol=0, atol=2e-5)


def test_generated_tokens_get_no_port():
    config = v.config_of(v.llava(), "vr_v2")
    assert vision_remember.ports(config, None, None, None).after_layer == ()


@PRESETS
def test_in_bfloat16_the_stream_stays_bfloat16_and_closed_gates_stay_closed(preset):
    backbone, _, spec, memory = world(preset)
    base, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), backbone.base), v.batch_of(backbone)
    before, after, out = v.watched(spec, base, memory, batch)
    assert before.dtype == after.dtype == out.dtype == jnp.bfloat16
    known = np.asarray(v.watched(spec, backbone.base, memory, batch)[2], np.float64)
    valid = np.asarray(batch.segments) > 0
    a, b = np.asarray(out, np.float64)[valid].ravel(), known[valid].ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    before, after, _ = v.watched(spec, base, world(preset, 0.0)[3], batch)
    same(before, after)
