"""Acceptance checks 15 to 19 of CoMEM: vectors in front of prompts, their positions, decoding behind them, switches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model as functions
from jaxmem.data import knowledge
from jaxmem.data.batching import Buckets, collate
from jaxmem.errors import DataError
from jaxmem.sampling.generate import said
from tests.memory import comem_world as w

BUCKETS = Buckets(tokens=(256,), patches=(96,), items=(1, 2, 3, 10, 50), item_tokens=(64,), item_patches=(96,))
NEW = 6


def logits(model, batch):
    """[B, T, V] of every token."""
    return np.asarray(model.logits(batch))


def known(model, count, seed=0):
    """Embeddings of some items, as a bank would give them: no encoder runs."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, model.spec.backbone.text.width)).astype(np.float32)


def followed(model, batch, tokens):
    """The batch with generated tokens [B, N] behind each row's prompt, at the positions that follow (right-padded)."""
    batch = jax.tree.map(np.array, batch)
    after = np.asarray(functions.next_position(model.spec, batch))
    for row, new in enumerate(tokens):
        start = int((batch.segments[row] > 0).sum())
        span = slice(start, start + len(new))
        batch.tokens[row, span] = new
        batch.segments[row, span] = 1
        batch.positions[row, :, span] = after[row] + np.arange(len(new))
    return batch


@pytest.mark.parametrize("count", [1, 3, 10])
def test_check_15_length_places_and_positions(count):
    model = w.model()
    vectors = known(model, count)
    batch = model.batch(w.QUESTIONS, items=[vectors, vectors[:1], []], buckets=BUCKETS)
    bare = model.batch(w.QUESTIONS, buckets=BUCKETS)
    for row, items in enumerate((count, 1, 0)):
        slots, length = 3 * items, int((bare.segments[row] > 0).sum())
        assert (batch.segments[row] > 0).sum() == slots + length
        np.testing.assert_array_equal(batch.prefix_rows[row, :slots], np.arange(slots))
        assert (batch.prefix_rows[row, slots:] == -1).all()
        np.testing.assert_array_equal(batch.positions[row, :, :slots], np.tile(np.arange(slots), (3, 1)))
        own = batch.positions[row, :, slots : slots + length]
        np.testing.assert_array_equal(own, bare.positions[row, :, :length] + slots)
        np.testing.assert_array_equal(batch.tokens[row, slots : slots + length], bare.tokens[row, :length])
        assert not batch.loss_mask[row, :slots].any() and batch.positions.dtype == np.int32


def test_check_15_positions_stay_different_up_to_32k():
    """Behind 10,000 items every text token has its own position, and so its own angle."""
    model = w.model()
    row = knowledge.behind_vectors(model.processor.encode(w.QUESTIONS[1]), known(model, 10_000), "rank", 0)
    assert len(np.unique(row.positions[0])) == len(row) == row.positions.max() + 1 > 30_000
    bf16 = np.asarray(jnp.asarray(row.positions[0]).astype(jnp.bfloat16).astype(jnp.int32))
    assert len(np.unique(bf16)) < 1_500  # what the switch of check 18 does


def test_vectors_say_no_token_that_a_penalty_could_count():
    model = w.model()
    batch = model.batch(w.QUESTIONS, items=[known(model, 3), known(model, 1), []], buckets=BUCKETS)
    found, bare = (said(one, model.spec.vocab) for one in (batch, model.batch(w.QUESTIONS, buckets=BUCKETS)))
    np.testing.assert_array_equal(found, bare)
    assert not found[:, model.processor.pad_token].any() and (found.sum(1) > 5).all()


def test_the_prompt_sees_the_vectors_themselves():
    """Embeddings that equal those of words in front of the prompt give what the words give."""
    model = w.model()
    words = model.processor.tokenizer("fox jumps over", add_special_tokens=False)["input_ids"][:3]
    vectors = np.asarray(model.base["embed"])[np.asarray(words)][None]
    batch = model.batch(w.QUESTIONS[:1], items=[vectors], buckets=BUCKETS)
    spelt = jax.tree.map(np.array, dataclasses.replace(batch, prefix_rows=None, vectors=None))
    spelt.tokens[0, :3] = words
    valid = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(logits(model, batch)[valid], logits(model, spelt)[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 10, 50])
def test_check_16_decoding_equals_one_forward(count):
    model = w.model()
    vectors = known(model, count)
    question = w.QUESTIONS[:1]
    answer = model.generate(question, items=[vectors], buckets=BUCKETS, max_new_tokens=NEW, stop_tokens=())[0]
    batch = model.batch(question, items=[vectors], buckets=BUCKETS)
    bare = model.batch(question, buckets=BUCKETS)
    (after,) = np.asarray(functions.next_position(model.spec, batch))
    assert after == 3 * count + bare.positions[0].max() + 1
    whole = logits(model, followed(model, batch, [answer.tokens]))[0]
    start = int((np.asarray(batch.segments[0]) > 0).sum())
    scores = np.asarray(jax.nn.log_softmax(whole[start - 1 : start - 1 + NEW]))
    np.testing.assert_allclose(scores[np.arange(NEW), list(answer.tokens)], answer.logprobs, rtol=0, atol=1e-4)
    allowed = np.delete(np.arange(scores.shape[1]), list(model.spec.backbone.media_tokens))
    assert [int(allowed[row[allowed].argmax()]) for row in scores] == list(answer.tokens)


def test_check_17_without_items_it_is_the_backbone_bit_for_bit():
    model, bare = w.model(), w.pair("qwen3_vl")[0]
    none = [[], [], []]
    np.testing.assert_array_equal(
        logits(model, model.batch(w.QUESTIONS, items=none, buckets=BUCKETS)),
        logits(bare, bare.batch(w.QUESTIONS, buckets=BUCKETS)),
    )
    ours = model.generate(w.QUESTIONS, items=none, buckets=BUCKETS, max_new_tokens=NEW)
    assert ours == bare.generate(w.QUESTIONS, buckets=BUCKETS, max_new_tokens=NEW)


def test_a_bare_backbone_reads_vectors_of_a_bank():
    """The memory is detachable: whoever has the vectors needs no encoder."""
    model, bare = w.model(), w.pair("qwen3_vl")[0]
    vectors = model.encode_items(w.ITEMS)
    settings = {"items": [vectors, vectors[:2], []], "buckets": BUCKETS}
    np.testing.assert_array_equal(
        logits(model, model.batch(w.QUESTIONS, **settings)), logits(bare, bare.batch(w.QUESTIONS, **settings))
    )


class TestCheck18:
    """Each switch does what the released code does, and is off by default."""

    def test_decode_shift(self):
        """Generated tokens stand `shift` behind the prompt's own end, whatever the number of items."""
        vectors = known(w.model(), 3)
        for shift in (8000, 4000):
            model = w.model(decode_shift=shift)
            batch = model.batch(w.QUESTIONS[:1], items=[vectors], buckets=BUCKETS)
            plain = model.batch(w.QUESTIONS[:1], buckets=BUCKETS)
            (after,) = np.asarray(functions.next_position(model.spec, batch))
            assert after == plain.positions[0].max() + 1 + shift
            assert np.asarray(functions.next_position(model.spec, plain))[0] == plain.positions[0].max() + 1
            answer = model.generate(
                w.QUESTIONS[:1], items=[vectors], buckets=BUCKETS, max_new_tokens=NEW, stop_tokens=()
            )[0]
            whole = logits(model, followed(model, batch, [answer.tokens]))[0]
            start = int((np.asarray(batch.segments[0]) > 0).sum())
            scores = np.asarray(jax.nn.log_softmax(whole[start - 1 : start - 1 + NEW]))
            np.testing.assert_allclose(scores[np.arange(NEW), list(answer.tokens)], answer.logprobs, atol=1e-4)

    def test_bf16_positions(self):
        """Positions above 256 collapse; below they are what they were."""
        model, rounded = w.model(), w.model(bf16_positions=True)
        for count, same in ((3, True), (90, False)):
            vectors = known(model, count)
            batch = model.batch(w.QUESTIONS[1:2], items=[vectors], buckets=Buckets(tokens=(512,)))
            valid = np.asarray(batch.segments) > 0
            found, wanted = logits(rounded, batch)[valid], logits(model, batch)[valid]
            assert np.array_equal(found, wanted) is same
            places = np.asarray(jnp.asarray(batch.positions).astype(jnp.bfloat16).astype(jnp.int32))
            moved = dataclasses.replace(batch, positions=places)
            np.testing.assert_array_equal(found, logits(model, moved)[valid])

    def test_order(self):
        """The released evaluation puts the best item next to the prompt."""
        model, turned = w.model(), w.model(order="reverse")
        vectors = known(model, 4)
        found = logits(turned, turned.batch(w.QUESTIONS[:1], items=[vectors], buckets=BUCKETS))
        wanted = logits(model, model.batch(w.QUESTIONS[:1], items=[vectors[::-1]], buckets=BUCKETS))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        assert turned.spec.comem.order == "reverse" and model.spec.comem.order == "rank"

    def test_query_tower(self):
        """Images of prompts through the encoder's tower: what a backbone with merged tower weights sees."""
        model, other = w.model(), w.model(query_tower="encoder")
        vectors = known(model, 2)
        batch = model.batch(w.QUESTIONS[:1], items=[vectors], buckets=BUCKETS)

        def merged(node, own):
            if "lora_a" in own:
                return {**node, "kernel": node["kernel"] + 16.0 * own["lora_a"] @ own["lora_b"]}
            return {name: merged(child, own[name]) if name in own else child for name, child in node.items()}

        tower = merged(model.base["visual"], other.memory["comem"]["encoder"]["visual"])
        by_hand = dataclasses.replace(model, base={**model.base, "visual": tower})
        found, wanted = logits(other, batch), logits(by_hand, batch)
        valid = np.asarray(batch.segments) > 0
        np.testing.assert_allclose(found[valid], wanted[valid], rtol=0, atol=1e-3)
        assert np.abs(found[valid] - logits(model, batch)[valid]).max() > 0.1
        bare = model.batch(w.QUESTIONS[:1], buckets=BUCKETS)  # without items even this switch changes nothing
        np.testing.assert_array_equal(logits(other, bare), logits(model, bare))

    def test_off_by_default(self):
        config = w.model().spec.comem
        assert (config.decode_shift, config.bf16_positions, config.query_tower) == (None, False, "frozen")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_check_19_batches_equal_single_questions(padding):
    """Different lengths, images and numbers of items; encoded inside the program and brought along."""
    model = w.model()
    counts = [w.ITEMS[:3], w.ITEMS[3:], []]
    batch = model.batch(w.QUESTIONS, items=counts, buckets=BUCKETS, padding=padding)
    found = logits(model, batch)
    for row, (question, items) in enumerate(zip(w.QUESTIONS, counts, strict=True)):
        alone = model.batch([question], items=[items], buckets=BUCKETS)
        wanted = logits(model, alone)[0][np.asarray(alone.segments[0]) > 0]
        np.testing.assert_allclose(found[row][np.asarray(batch.segments[row]) > 0], wanted, rtol=0, atol=2e-5)


def test_items_inside_a_batch_equal_their_vectors():
    """Training encodes items within its program, padded to the row with the most; generation brings vectors."""
    model = w.model()
    counts = [w.ITEMS[:3], w.ITEMS[3:], []]
    pad = model.processor.pad_token
    read = [[knowledge.encode_item(model.processor, model.spec.comem, item) for item in own] for own in counts]
    rows = [
        knowledge.behind_items(model.processor.encode(question, add_generation_prompt=True), own, model.spec.comem, pad)
        for question, own in zip(w.QUESTIONS, read, strict=True)
    ]
    inside = collate(rows, BUCKETS, pad)
    assert inside.items.tokens.shape[:2] == (3, 3) and inside.vectors is None
    assert not inside.items.segments[1, 1:].any() and not inside.items.segments[2].any()
    brought = model.batch(w.QUESTIONS, items=counts, buckets=BUCKETS)
    valid = np.asarray(brought.segments) > 0
    np.testing.assert_allclose(logits(model, inside)[valid], logits(model, brought)[valid], rtol=0, atol=2e-5)


def test_lists_that_do_not_fit_are_refused():
    model = w.model()
    with pytest.raises(DataError, match="3 chats and items for 1"):
        model.batch(w.QUESTIONS, items=[[]])
    with pytest.raises(DataError, match=r"\[items, vectors, width\]"):
        model.batch(w.QUESTIONS[:1], items=[np.ones((3, 64), np.float32)])
    with pytest.raises(DataError, match="row 0 has 4 items and the longest bucket is 3"):
        item = knowledge.encode_item(model.processor, model.spec.comem, w.ITEMS[0])
        row = knowledge.behind_items(model.processor.encode(w.QUESTIONS[1]), [item] * 4, model.spec.comem, 0)
        collate([row], Buckets(items=(1, 3)))
