"""Keys of items as a memory (B15): against transformers with the keys put there by hand, and what order, padding,
company and an absence of items promise."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jaxmem.data.batching import Buckets
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import comem
from jaxmem.model import next_logits
from jaxmem.sampling import item_decoding, item_prefix
from jaxmem.sampling.item_answers import generate, item_chats, read_rows
from jaxmem.sampling.item_prefix import KeysConfig, Prefix
from tests.backbones.prompts import image, picture, text, torch_inputs, user
from tests.memory import comem_world as w

BUCKETS = Buckets(tokens=(128,), patches=(96,), items=(3,), item_tokens=(160,), item_patches=(96,))
KNOWN = [w.ITEMS[:3], [], [w.ITEMS[3]]]
PLAIN = KeysConfig(layers=(1,))
NEW = 6
FREE = {"max_new_tokens": NEW, "stop_tokens": (), "buckets": BUCKETS}
CONFIGS = {
    "plain": ("qwen3_vl", PLAIN),
    "selected": ("qwen2_5_vl", KeysConfig(layers=(0, 1), keep=0.25, with_question=False)),
    "selected_and_pooled": ("qwen3_vl", KeysConfig(layers=(0,), keep=0.7, attention="first", pool=3, scale=1.0)),
}
_keys = jax.jit(item_prefix.item_keys, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_logits(spec: Any, layers: Any, base: Any, batch: Any, prefix: Any) -> Any:
    return next_logits(spec, base, {}, item_decoding.prefill(spec, layers, base, batch, prefix)[0])


def rows(model: Any, config: KeysConfig, known: Any, chats: Any = w.QUESTIONS, buckets: Buckets = BUCKETS) -> Any:
    """The questions, and the keys in front of them."""
    batch = read_rows(model, chats, known, config, buckets)
    prefix = _keys(model.spec, config, model.base, batch.items)
    return dataclasses.replace(batch, items=None, prefix_rows=None), prefix


def first_logits(model: Any, config: KeysConfig, known: Any, **settings: Any) -> np.ndarray:
    """[B, V] behind the questions."""
    return np.asarray(_first_logits(model.spec, config.layers, model.base, *rows(model, config, known, **settings)))


@functools.cache
def torch_model(family: str) -> Any:
    """A copy of the oracle that may be changed."""
    return copy.deepcopy(w.pair(family)[1])


def torch_items(family: str, config: KeysConfig, chat: Any, items: Any) -> list[Any]:
    """What transformers keeps and looks at of each item: its own pass with a cache, attention matrices and all."""
    model, theirs = w.pair(family)[0], torch_model(family)
    theirs.set_attn_implementation("eager")
    found = []
    for written in item_chats(config, chat, items, "the chat"):
        inputs = torch_inputs("item", model.processor.encode(written))
        with torch.no_grad():
            found.append(theirs(**inputs, use_cache=True, output_attentions=True))
    return found


def front(config: KeysConfig, passes: list[Any]) -> dict[int, Any]:
    """Per chosen layer keys and values [1, heads, P, width] by plain loops over tokens."""
    layers: dict[int, Any] = {layer: ([], []) for layer in config.layers}
    for seen in passes:
        attended = [layer[0].double().mean((0, 1)).numpy() for layer in seen.attentions]
        score = np.mean(attended if config.attention == "all" else attended[:1], axis=0)
        count = int(len(score) * config.keep)
        chosen = sorted(np.argsort(-score, kind="stable")[:count].tolist())
        groups = [chosen[at : at + config.pool] for at in range(0, count, config.pool)]
        for layer, parts in layers.items():
            held = seen.past_key_values.layers[layer]
            for part, kept in zip(parts, (held.keys, held.values), strict=True):
                part += [config.scale * kept[:, :, group].mean(2, keepdim=True) for group in groups]
    return {layer: tuple(torch.cat(part, 2) for part in parts) for layer, parts in layers.items() if parts[0]}


@contextlib.contextmanager
def behind(theirs: Any, prefixes: dict[int, Any]) -> Any:
    """transformers' decoder with foreign keys in front of some layers' own, seen by all."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        size, shared = query.shape[2], query.shape[1] // key.shape[1]
        sees = torch.ones(size, size, dtype=torch.bool).tril()
        if module.layer_idx in prefixes:
            keys, values = prefixes[module.layer_idx]
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
            sees = torch.cat([torch.ones(size, keys.shape[2], dtype=torch.bool), sees], 1)
        key, value = (leaf.repeat_interleave(shared, 1) for leaf in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    ALL_ATTENTION_FUNCTIONS.register("behind_items", attention)
    theirs.model.language_model.config._attn_implementation = "behind_items"
    yield
    theirs.set_attn_implementation("eager")


def torch_answer(family: str, config: KeysConfig, chat: Any, items: Any) -> tuple[list[np.ndarray], list[int]]:
    """Logits in front of every token of the greedy answer, and the answer: each from a forward over the whole."""
    model, theirs = w.pair(family)[0], torch_model(family)
    inputs = torch_inputs("question", model.processor.encode(chat, add_generation_prompt=True))
    prefixes = front(config, torch_items(family, config, chat, items))
    more = {"input_ids": 0, "mm_token_type_ids": 0, "attention_mask": 1}
    logits, answer = [], []
    with torch.no_grad(), behind(theirs, prefixes):
        for _ in range(NEW):
            logits.append(theirs(**inputs, use_cache=False).logits[0, -1].numpy())
            allowed = logits[-1].copy()
            allowed[list(model.spec.backbone.media_tokens)] = -np.inf
            answer.append(int(allowed.argmax()))
            for name, value in (more | {"input_ids": answer[-1]}).items():
                inputs[name] = torch.cat([inputs[name], torch.tensor([[value]], dtype=inputs[name].dtype)], 1)
    return logits, answer


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_with_the_keys_put_there_by_hand(name: str) -> None:
    """A batch with three items, none and one, against single rows: first logits, greedy tokens, their probabilities."""
    family, config = CONFIGS[name]
    model = w.pair(family)[0]
    theirs = [torch_answer(family, config, *row) for row in zip(w.QUESTIONS, KNOWN, strict=True)]
    ours = first_logits(model, config, KNOWN)
    np.testing.assert_allclose(ours, [logits[0] for logits, _ in theirs], rtol=0, atol=1e-4)
    for answer, (logits, tokens) in zip(generate(model, w.QUESTIONS, KNOWN, config, **FREE), theirs, strict=True):
        assert list(answer.tokens) == tokens and not answer.stopped
        assert answer.text == model.processor.decode(tokens)
        wanted = [torch.tensor(row).log_softmax(-1)[token].item() for row, token in zip(logits, tokens, strict=True)]
        np.testing.assert_allclose(answer.logprobs, wanted, rtol=0, atol=1e-4)
    bare = np.asarray(first_logits(model, config, [w.ITEMS[3:], w.ITEMS[:1], []]))
    assert (np.abs(ours - bare).max(1) > 0.01).all()  # items matter in every row


def test_without_items_it_is_the_model_itself() -> None:
    """Token for token, drawn with the same keys: all that a greedy answer promises, and more."""
    model = w.pair("qwen3_vl")[0]
    drawn = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "key": jax.random.key(3)}
    settings = FREE | drawn | {"max_new_tokens": 16}
    ours = generate(model, w.QUESTIONS, [[], [], []], PLAIN, **settings)
    for own, plain in zip(ours, model.generate(w.QUESTIONS, **settings), strict=True):
        assert own.tokens == plain.tokens and own.text == plain.text
        np.testing.assert_allclose(own.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def test_a_batch_equals_its_single_rows() -> None:
    model = w.pair("qwen3_vl")[0]
    together = generate(model, w.QUESTIONS, KNOWN, PLAIN, **FREE)
    for row, (chat, items) in enumerate(zip(w.QUESTIONS, KNOWN, strict=True)):
        (alone,) = generate(model, chat, [items], PLAIN, **FREE)
        assert alone.tokens == together[row].tokens
        np.testing.assert_allclose(alone.logprobs, together[row].logprobs, rtol=0, atol=1e-5)


def test_the_order_of_items_does_not_matter_and_other_rows_do_not() -> None:
    model, config = w.pair("qwen3_vl")[0], PLAIN
    whole = first_logits(model, config, KNOWN)
    for order in ((2, 0, 1), (1, 2, 0), (2, 1, 0)):
        moved = first_logits(model, config, [[w.ITEMS[i] for i in order], [], KNOWN[2]])
        np.testing.assert_allclose(moved, whole, rtol=0, atol=1e-5)
    other = first_logits(model, config, [KNOWN[0], [], w.ITEMS[:2]])
    np.testing.assert_allclose(other[:2], whole[:2], rtol=0, atol=1e-5)
    assert np.abs(other[2] - whole[2]).max() > 0.01


def test_padding_is_never_seen() -> None:
    """Neither what stands in it nor how much of it there is."""
    model = w.pair("qwen3_vl")[0]
    config = CONFIGS["selected_and_pooled"][1]
    batch, prefix = rows(model, config, KNOWN)
    valid = np.asarray(prefix.valid)
    lengths = [
        [-(-int(len(model.processor.encode(chat)) * 0.7) // 3) for chat in item_chats(config, question, items, "a")]
        for question, items in zip(w.QUESTIONS, KNOWN, strict=True)
    ]
    assert valid.sum(1).tolist() == [sum(row) for row in lengths] and not valid.all()
    loud = lambda leaf: jnp.where(valid[None, :, :, None, None], leaf, 50.0)  # noqa: E731
    poisoned = Prefix(loud(prefix.keys), loud(prefix.values), prefix.valid)
    found = [_first_logits(model.spec, config.layers, model.base, batch, one) for one in (prefix, poisoned)]
    np.testing.assert_array_equal(*found)
    wide = dataclasses.replace(BUCKETS, tokens=(192,), items=(5,), item_tokens=(224,), item_patches=(128,))
    np.testing.assert_allclose(first_logits(model, config, KNOWN, buckets=wide), found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, dataclasses.replace(PLAIN, with_question=False)])
def test_questions_are_part_of_items_only_where_they_shall_be(config: KeysConfig) -> None:
    model = w.pair("qwen3_vl")[0]
    ask = lambda words: user(text(words), image(32, 64, 5))  # noqa: E731
    chats, known = [ask("what do they see?"), ask("which is older?"), ask("seven")], [w.ITEMS[:1]] * 3
    keys = np.asarray(rows(model, config, known, chats)[1].keys)
    assert (np.abs(keys - keys[:, :1])[:, 1:].max() > 0.01) == config.with_question


def test_items_are_written_behind_the_question_with_their_label() -> None:
    shown = picture(32, 32, 1)
    chat = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        *user(text(" how "), text("so?")),
    ]
    items = [{"text": "Fox: an animal", "images": [shown, shown]}, {"text": "", "image": shown}]
    content = lambda config: [one[0]["content"] for one in item_chats(config, chat, items, "chat 0")]  # noqa: E731
    first, second = content(PLAIN)
    assert first[0] == {"type": "text", "text": "how so?\nGiven Information: Fox: an animal"}
    assert [part["type"] for part in first] == ["text", "image", "image"]
    assert second[0]["text"] == "how so?" and len(second) == 2
    cut = dataclasses.replace(PLAIN, with_question=False, text_limit=3, label="Known:")
    assert content(cut)[0][0]["text"] == "Known: Fox" and [part["type"] for part in content(cut)[1]] == ["image"]
    assert item_chats(PLAIN, [{"role": "user", "content": " so? "}], [{"text": "a"}], "")[0][0]["content"][0] == {
        "type": "text",
        "text": "so?\nGiven Information: a",
    }


def test_attention_received_equals_numpy() -> None:
    """Softmax rows by hand in float64; rows of a batch have different lengths, padded on either side."""
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(3, 9, heads, 8)).astype(np.float32) for heads in (6, 2))
    spans = [(0, 9), (0, 4), (5, 9)]
    mask = np.zeros((3, 9, 9), bool)
    wanted = np.zeros((3, 9))
    for row, (start, end) in enumerate(spans):
        mask[row, start:end, start:end] = np.tri(end - start, dtype=bool)
        for head in range(6):
            for place in range(start, end):
                scores = key[row, start : place + 1, head // 3].astype(float) @ query[row, place, head] / 8**0.5
                weights = np.exp(scores - scores.max())
                wanted[row, start : place + 1] += weights / weights.sum() / (6 * (end - start))
    found = jax.jit(item_prefix.received)(query, key, mask)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(found, 1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [0.25, 0.3, 0.55, 1.0])
def test_the_tokens_that_get_most_attention_stay(keep: float) -> None:
    rng = np.random.default_rng(4)
    scores, lengths = rng.permuted(np.arange(80.0).reshape(4, 20), axis=1).astype(np.float32), (20, 11, 3, 0)
    scores[0, 3:9] = 7.0  # equals: the earlier ones stay
    valid = np.arange(20) < np.array(lengths)[:, None]
    valid[1] = valid[1, ::-1]
    places, stays = jax.jit(item_prefix.most_received, static_argnums=2)(scores, valid, keep)
    assert places.shape == (4, int(20 * keep))
    for row, length in enumerate(lengths):
        own = np.flatnonzero(valid[row])
        best = own[np.argsort(-scores[row, own], kind="stable")[: int(length * keep)]]
        assert np.asarray(places[row])[np.asarray(stays[row])].tolist() == sorted(best.tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_groups_are_means(size: int) -> None:
    rng = np.random.default_rng(2)
    leaves = rng.normal(size=(2, 2, 3, 7, 2, 4)).astype(np.float32)
    lengths = (7, 4, 0)
    valid = np.arange(7) < np.array(lengths)[:, None]
    pair, kept = jax.jit(item_prefix.pooled, static_argnums=2)(tuple(leaves), valid, size)
    assert kept.shape == (3, -(-7 // size)) and np.sum(kept, 1).tolist() == [-(-length // size) for length in lengths]
    for leaf, found in zip(leaves, pair, strict=True):
        for row, length in enumerate(lengths):
            for group, start in enumerate(range(0, length, size)):
                mean = leaf[:, row, start : min(start + size, length)].mean(1)
                np.testing.assert_allclose(found[:, row, group], mean, rtol=0, atol=1e-6)


def test_scale_is_that_of_keys_and_values() -> None:
    model = w.pair("qwen3_vl")[0]
    paper = dataclasses.replace(PLAIN, scale=1.0)
    plain, scaled = (rows(model, config, KNOWN)[1] for config in (paper, PLAIN))
    for one, other in ((plain.keys, scaled.keys), (plain.values, scaled.values)):
        np.testing.assert_allclose(1.5 * np.asarray(one), other, rtol=1e-6)
    change = np.abs(first_logits(model, paper, KNOWN) - first_logits(model, PLAIN, KNOWN)).max(1)
    assert change[0] > 0.01 and change[1] < 1e-6 and change[2] > 0.01


def test_rows_end_alone_and_programs_are_few() -> None:
    model = w.pair("qwen3_vl")[0]
    free = generate(model, w.QUESTIONS, KNOWN, PLAIN, **FREE)
    stop = free[0].tokens[2]
    before = item_decoding.answer._cache_size()
    for known in (KNOWN, [w.ITEMS[1:2], w.ITEMS[:2], []]):
        ended = generate(model, w.QUESTIONS, known, PLAIN, **(FREE | {"stop_tokens": (stop,)}))
        if known is KNOWN:
            for full, cut in zip(free, ended, strict=True):
                length = full.tokens.index(stop) + 1 if stop in full.tokens else NEW
                assert cut.tokens == full.tokens[:length] and cut.logprobs == full.logprobs[:length]
                assert cut.stopped == (stop in full.tokens)
    assert item_decoding.answer._cache_size() == before + 1


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match=r"has 2 decoder layers, 0 to 1, and layers names \[17, 18, 19\]"):
        generate(w.pair("qwen3_vl")[0], w.QUESTIONS, KNOWN)
    for wrong, message in (
        ({"layers": ()}, r"layers \(\) must be at least one"),
        ({"layers": (-1,)}, r"layers \(-1,\) must"),
        ({"layers": (2, 1)}, r"layers \(2, 1\) must be at least one, ascending"),
        ({"scale": 0.0}, "scale 0.0 must be above 0"),
        ({"keep": 1.5}, "keep 1.5 must be above 0 and at most 1"),
        ({"attention": "last"}, "attention 'last' is neither 'all' nor 'first'"),
        ({"pool": 0}, "pool 0 must be at least 1"),
        ({"text_limit": 0}, "text_limit 0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            KeysConfig(**wrong)


def test_rows_that_cannot_be_used_are_named() -> None:
    model = w.pair("qwen3_vl")[0]
    with_comem = dataclasses.replace(model.spec, memories=(comem.create(model.spec.backbone, **w.SMALL),))
    run = lambda known, **more: generate(model, w.QUESTIONS, known, PLAIN, **(FREE | more))  # noqa: E731
    with pytest.raises(DataError, match="3 chats and items for 2"):
        run(KNOWN[:2])
    with pytest.raises(DataError, match="item 1 of chat 2 has neither an image nor a text"):
        run([[], [], [w.ITEMS[0], {"text": " "}]])
    with pytest.raises(DataError, match=r"item 0 of chat 1 has \d+ tokens and the backbone 4096 positions"):
        run([[], [{"text": "0123456789 " * 450}], []])
    with pytest.raises(DataError, match="exceed the cache of 130"):
        run(KNOWN, cache_size=130)
    with pytest.raises(ConfigError, match=r"the model has comem; use without_memory\(\)"):
        generate(dataclasses.replace(model, spec=with_comem), w.QUESTIONS, KNOWN, PLAIN)
