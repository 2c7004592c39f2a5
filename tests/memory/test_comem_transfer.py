"""CoMEM's transfer to a text-only model: acceptance check 25, and what stands in front of the text, against torch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxmem import model as functions
from jaxmem.backbones import registry
from jaxmem.backbones.published import PUBLISHED
from jaxmem.data import knowledge, query
from jaxmem.data.batching import collate, widen
from jaxmem.distributed import mesh as meshes
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import comem
from jaxmem.retrieval.encoder import ItemEncoder
from jaxmem.sampling.generate import said
from tests.backbones.prompts import image, text, user
from tests.memory import comem_world as w
from tests.memory import transfer_world as t

NEW = 6
torch = pytest.importorskip("torch")


def changed(model, one, other, rows=1):
    """Places whose logits differ between two batches, of those in front of the first token that differs, by row; these
    are the places up to the one that predicts this token."""
    found, wanted = t.logits(model, one), t.logits(model, other)
    places = []
    for row in range(rows):
        (apart,) = np.nonzero(np.asarray(one.tokens[row]) != np.asarray(other.tokens[row]))
        assert len(apart) and one.loss_mask[row, apart[0]] > 0, "the rows differ in their answers"
        different = (found[row] != wanted[row]).any(-1)
        assert different[apart[0] :].any(), "the answer is read"
        places.append(np.nonzero(different[: apart[0]])[0].tolist())
    return places


def perturbed(batch, start):
    """The batch with other tokens from the supervised place `start` of each row on, counted from the first of them."""
    tokens = np.array(batch.tokens)
    for row, mask in enumerate(np.asarray(batch.loss_mask) > 0):
        chosen = np.nonzero(mask)[0][start:]
        tokens[row, chosen] = (tokens[row, chosen] + 1 + np.arange(len(chosen))) % 400
    return dataclasses.replace(batch, tokens=tokens)


class TestCheck25:
    """Perturbing answer tokens changes no logits at or before the place that predicts them: exactly none."""

    ITEMS = (w.ITEMS[:0], w.ITEMS[:1], w.ITEMS[:3])

    @pytest.mark.parametrize("start", [0, 1, 2])
    def test_other_tokens(self, start):
        """Of rows with images and 0, 1 and 3 items, from the first, second and third answer token on."""
        model = t.model()
        rows = [t.record(q, "seven dogs", k) for q, k in zip(t.QUESTIONS, self.ITEMS, strict=True)]
        batch = t.batch_of(model, *rows)
        assert batch.query.patches.shape[1] and batch.items.tokens.shape[:2] == (3, 3)
        assert changed(model, batch, perturbed(batch, start), rows=3) == [[], [], []]

    def test_other_answers(self):
        """From records to logits: neither items, nor the encoder's rows, nor positions tell of an answer."""
        model = t.model()
        answers = ("seven dogs and a fox", "seven dogs"), ("people", "a lazy dog"), ("one by one", "one")
        one, other = (
            t.batch_of(model, *(t.record(q, a[i], k) for q, a, k in zip(t.QUESTIONS, answers, self.ITEMS, strict=True)))
            for i in (0, 1)
        )
        jax.tree.map(np.testing.assert_array_equal, (one.query, one.items), (other.query, other.items))
        assert changed(model, one, other, rows=3) == [[], [], []]

    def test_later_turns(self):
        """A chat that goes on changes nothing of what was there."""
        model, first = t.model(), [*t.QUESTIONS[0], {"role": "assistant", "content": "a fox"}]
        one, other = (
            t.batch_of(model, t.record([*first, *user(text(words))], "seven", w.ITEMS[:1]))
            for words in ("and then?", "and when?")
        )
        jax.tree.map(np.testing.assert_array_equal, one.query, other.query)
        (apart,) = np.nonzero(one.tokens[0] != other.tokens[0])
        found, wanted = (t.logits(model, batch)[0] for batch in (one, other))
        np.testing.assert_array_equal(found[: apart[0]], wanted[: apart[0]])

    def test_a_leaking_row_fails(self):
        """As in the released code, whose encoder reads the answer too: the same assertion finds it."""
        model = t.model()
        processor, config = model.processor, model.spec.comem

        def leaking(answer):
            chat = t.record(t.QUESTIONS[0], answer)["messages"]
            row = processor.encode(query.text_of(chat))
            row = query.behind_query(row, processor.reader.encode(chat), processor.pad_token)
            items = [knowledge.encode_item(processor.reader, config, w.ITEMS[0])]
            return collate([knowledge.behind_items(row, items, config, processor.pad_token)], t.BUCKETS)

        one, other = leaking("seven dogs"), leaking("seven foxs")
        assert one.segments.sum() == other.segments.sum() and one.query.segments.sum() == other.query.segments.sum()
        (places,) = changed(model, one, other)
        assert len(places) > 5  # of the states of the answer in the query on


def test_what_is_sampled_is_what_was_trained():
    """The prompt of generation is the start of the row of training, field by field, and so is the encoder's."""
    model = t.model()
    vectors = model.encode_items(w.ITEMS[:2])
    prompts = model.batch(t.QUESTIONS, items=[vectors] * 3, buckets=t.BUCKETS)
    rows = t.batch_of(model, *(t.record(question, "seven dogs", w.ITEMS[:2]) for question in t.QUESTIONS))
    jax.tree.map(np.testing.assert_array_equal, prompts.query, rows.query)
    for row, length in enumerate(np.asarray(prompts.segments).sum(axis=1)):
        assert rows.loss_mask[row, length] == 1 and not rows.loss_mask[row, :length].any()
        for name in ("tokens", "positions", "prefix_rows", "query_rows"):
            ours, theirs = (np.asarray(getattr(batch, name))[row, ..., :length] for batch in (prompts, rows))
            np.testing.assert_array_equal(ours, theirs)
    valid = np.asarray(prompts.segments) > 0
    found, wanted = (t.logits(model, batch)[valid] for batch in (prompts, rows))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_places_and_positions():
    """Items' vectors, states of the prompt, text: 0, 1, 2, ... over all of them; no image reaches the text."""
    model = t.model()
    batch = t.batch_of(model, t.record(t.QUESTIONS[2], "seven", w.ITEMS[:2]))
    asked, row = int(batch.query.segments.sum()), int(batch.segments.sum())
    np.testing.assert_array_equal(batch.positions[0, :, :row], np.tile(np.arange(row), (3, 1)))
    np.testing.assert_array_equal(np.nonzero(batch.prefix_rows[0] >= 0)[0], np.arange(6))
    np.testing.assert_array_equal(np.nonzero(batch.query_rows[0] >= 0)[0], 6 + np.arange(asked))
    np.testing.assert_array_equal(batch.query_rows[0, 6 : 6 + asked], np.arange(asked))
    assert not batch.loss_mask[0, : 6 + asked].any() and batch.patches.shape[1] == 0
    written = model.processor.decode(batch.tokens[0, 6 + asked : row])
    assert written.split("\n") == ["system", "answer", "user", "first", "then?", "assistant", "seven", ""]
    seen = model.processor.encoder.decode(batch.query.tokens[0, :asked])
    assert seen.split("\n") == ["system", "answer", "user", "firstthen?", "assistant", ""]
    assert (batch.query.visual_rows[0] >= 0).sum() == 4
    counted = np.flatnonzero(said(batch, model.spec.vocab)[0])  # by a repetition penalty: words, no states
    np.testing.assert_array_equal(counted, np.unique(batch.tokens[0, 6 + asked : row]))


@pytest.mark.parametrize(("width", "asks"), [(64, True), (48, True), (64, False)])
def test_logits_equal_a_composition_in_torch(width, asks):
    """The encoder by transformers, the Q-Former in torch, and the decoder by transformers on the joined embeddings."""
    model = t.model(width, lively=False, query=asks)
    assert ("adapter" in model.memory["comem"]) is (width != 64)
    known = [w.ITEMS[:3], w.ITEMS[3:], []]
    batch = model.batch(t.QUESTIONS, items=known, buckets=t.BUCKETS)
    found = t.logits(model, batch)
    for row, (question, items) in enumerate(zip(t.QUESTIONS, known, strict=True)):
        embedded = t.composed(model, width, question, items)
        with torch.no_grad():
            wanted = t.target(width)[1](inputs_embeds=embedded).logits[0].numpy()
        assert len(wanted) == batch.segments[row].sum()
        np.testing.assert_allclose(found[row, : len(wanted)], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [64, 48])
def test_greedy_answers_equal_torch_token_for_token(width):
    model = t.model(width, lively=False)
    known = [w.ITEMS[:3], w.ITEMS[3:], []]
    settings = {"max_new_tokens": NEW, "stop_tokens": (), "buckets": t.BUCKETS}
    for question, items, answer in zip(
        t.QUESTIONS, known, model.generate(t.QUESTIONS, items=known, **settings), strict=True
    ):
        embedded = t.composed(model, width, question, items)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = t.target(width)[1].generate(inputs_embeds=embedded, **options, eos_token_id=None)
        assert list(answer.tokens) == out[0].tolist()


def test_factors_act_on_items_and_prompts_and_nowhere_else():
    """Against weights that were added up; the text is the bare model's."""
    model, still = t.model(), t.model(lively=False)
    config, batch = model.spec.comem, t.batch_of(model, t.record(t.QUESTIONS[0], "a fox", w.ITEMS[:1]))

    def merged(node, own):
        if "lora_a" in own:
            return {**node, "kernel": node["kernel"] + config.alpha / config.rank * own["lora_a"] @ own["lora_b"]}
        return {name: merged(child, own[name]) if name in own else child for name, child in node.items()}

    heavier = merged(model.base["encoder"], model.memory["comem"]["encoder"])
    by_hand = dataclasses.replace(still, base={**still.base, "encoder": heavier})
    valid = np.asarray(batch.segments) > 0
    found = t.logits(model, batch)[valid]
    np.testing.assert_allclose(found, t.logits(by_hand, batch)[valid], rtol=0, atol=1e-3)
    assert np.abs(found - t.logits(still, batch)[valid]).max() > 0.1


def test_without_items_and_query_it_is_the_bare_target_bit_for_bit():
    model, bare = t.model(query=False), t.target()[0]
    chats = [t.QUESTIONS[1], [t.SYSTEM, *user(text("first, then?"))]]
    ours, theirs = (one.batch(chats, buckets=t.BUCKETS) for one in (model, bare))
    assert ours.query is None
    np.testing.assert_array_equal(t.logits(model, ours), t.logits(bare, theirs))
    settings = {"buckets": t.BUCKETS, "max_new_tokens": NEW}
    assert model.generate(chats, **settings) == bare.generate(chats, **settings)
    seen = model.batch(t.QUESTIONS[:1], buckets=t.BUCKETS)  # an image is left out
    np.testing.assert_array_equal(seen.tokens, bare.batch(user(text("what do they see?")), buckets=t.BUCKETS).tokens)
    assert (
        np.array_equal(t.logits(model.without_memory(), theirs), t.logits(bare, theirs))
        and model.without_memory().base.keys() == bare.base.keys()
    )


@pytest.mark.parametrize("padding", ["right", "left"])
def test_batches_equal_single_questions(padding):
    model = t.model()
    known = [w.ITEMS[:3], w.ITEMS[3:], []]
    batch = model.batch(t.QUESTIONS, items=known, buckets=t.BUCKETS, padding=padding)
    found, valid = t.logits(model, batch), np.asarray(batch.segments) > 0
    for row, (question, items) in enumerate(zip(t.QUESTIONS, known, strict=True)):
        alone = model.batch([question], items=[items], buckets=t.BUCKETS)
        wanted = t.logits(model, alone)[0][np.asarray(alone.segments[0]) > 0]
        np.testing.assert_allclose(found[row][valid[row]], wanted, rtol=0, atol=2e-5)
    patches = batch.query.patches.shape[1]
    larger = widen(batch, 208, 0, query=(112, patches + 16))
    assert larger.query.tokens.shape == (3, 112)
    again = t.logits(model, larger)[:, : batch.tokens.shape[1]]
    np.testing.assert_allclose(again[valid], found[valid], rtol=0, atol=2e-5)


def test_an_encoder_brings_its_comem_and_its_bank():
    """A CoMEM of the encoder serves a model of its width as it is; what a bank holds is the same either way."""
    alone, bare = w.model("qwen2_5_vl"), t.target()[0]
    both = bare.with_encoder(alone)
    assert both.spec.comem == dataclasses.replace(alone.spec.comem, encoder=alone.spec.backbone)
    vectors = alone.encode_items(w.ITEMS)
    np.testing.assert_array_equal(both.encode_items(w.ITEMS), vectors)
    assert ItemEncoder(both).digest == ItemEncoder(alone).digest
    assert ItemEncoder(both).template == ItemEncoder(alone).template
    question = [t.QUESTIONS[1]]
    behind = bare.batch(question, items=[vectors], buckets=t.BUCKETS)
    config = dataclasses.replace(both.spec.comem, query=False)
    silent = dataclasses.replace(both, spec=functions.Spec(both.spec.backbone, (config,)))
    ours = silent.batch(question, items=[vectors], buckets=t.BUCKETS)
    np.testing.assert_array_equal(t.logits(silent, ours), t.logits(bare, behind))


def test_a_memory_comes_back_from_its_folder(tmp_path):
    model, bare = t.model(48), t.target(48)[0]
    model.save(tmp_path)
    again = bare.with_encoder(t.encoder()[0]).restore(tmp_path)
    assert again.spec == model.spec
    batch = model.batch(t.QUESTIONS, items=[w.ITEMS[:1], [], []], buckets=t.BUCKETS)
    np.testing.assert_array_equal(t.logits(again, batch), t.logits(model, batch))
    with pytest.raises(
        ValueError, match=r"another model reads items .*model_type qwen2_5_vl, width 64, layers 2\); name"
    ):
        bare.restore(tmp_path)
    with pytest.raises(ValueError, match=r"another encoder: model_type: stored qwen2_5_vl, this run has qwen2_vl"):
        bare.with_encoder(w.pair("qwen2_vl")[0]).restore(tmp_path)


def test_models_that_do_not_fit_are_refused():
    bare, sees = t.target()[0], t.encoder()[0]
    for wrong, words in (
        (
            lambda: t.target(48)[0].with_encoder(w.model("qwen2_5_vl")),
            r"width 64 \(encoder qwen2_5_vl.*qwen2, width 48",
        ),
        (lambda: bare.with_encoder(sees).attach("comem", target_width=48), r"vectors of width 48 .* qwen2, width 64"),
        (lambda: bare.attach("comem", **w.SMALL).with_encoder(sees), "call with_encoder before attach"),
        (lambda: bare.with_encoder(sees).with_encoder(sees), "an encoder already"),
        (lambda: bare.with_encoder(sees.attach("pvm", layers=(0,))), "the memories pvm"),
        (lambda: bare.with_encoder(sees.attach_lora(rank=2)), "merge them first"),
        (lambda: bare.attach("comem", encoder="folder"), "with_encoder"),
        (lambda: bare.with_encoder(sees).attach("comem", query_tower="encoder"), "query_tower, decode_shift and"),
        (lambda: bare.with_encoder(sees).attach("comem", decode_shift=8000), "query_tower, decode_shift and"),
    ):
        with pytest.raises(ConfigError, match=words):
            wrong()


def test_chats_and_batches_that_do_not_fit_are_refused():
    model, bare = t.model(), t.target()[0]
    later = [*t.QUESTIONS[1], {"role": "assistant", "content": "a fox"}, *user(image(64, 64), text("and this?"))]
    with pytest.raises(DataError, match="chat 0 has an image behind its first answer.*qwen2 has no vision tower"):
        model.batch([later])
    batch = model.batch(t.QUESTIONS, buckets=t.BUCKETS)
    with pytest.raises(ConfigError, match="prompts for an encoder to read and the model has no CoMEM"):
        bare.logits(batch)
    with pytest.raises(DataError, match="no prompts that an encoder beside reads"):
        bare.attach("comem", **w.SMALL).logits(batch)
    one, other = (query.encode_row(m.processor, m.spec.comem, t.QUESTIONS[1]) for m in (model, bare))
    with pytest.raises(DataError, match="some rows bring a query"):
        collate([one, other])
    with pytest.raises(DataError, match="qwen2.*leave them out"):
        bare.batch(t.QUESTIONS)


def test_at_the_released_sizes_the_same_trains_as_for_the_encoder_itself():
    """Qwen2.5-VL-7B in front of Qwen2.5-7B-Instruct: 231,719,936 parameters, no map between equal widths."""
    released = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    released |= {"model_type": "qwen2", "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 1e6}
    answers, reads = registry.config_from_hf(released), PUBLISHED["Qwen2.5-VL-7B-Instruct"]
    config = comem.create(answers, encoder=reads)
    tree = jax.eval_shape(lambda: comem.init(jax.random.key(0), config))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 231_719_936 and "adapter" not in tree
    assert comem.shares(config, answers).startswith("231,719,936 parameters train")
    assert comem.shares(config, answers).endswith(": 1.44 % of encoder, target and these")


def test_weights_of_the_encoder_lie_on_a_mesh_as_those_of_a_backbone():
    """Each leaf at base/encoder/... is cut as the same leaf at base/... is."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), meshes.AXES)
    leaves = jax.tree_util.tree_leaves_with_path(t.encoder()[0].base)
    cut = 0
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = meshes.spec_for(f"base/encoder/{name}", leaf.shape, mesh)
        assert spec == meshes.spec_for(f"base/{name}", leaf.shape, mesh), name
        cut += any(axes is not None for axes in spec)
    assert cut > 10
