"""VisMem's control tokens: acceptance checks 13 to 16."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxmem import model as functions
from jaxmem.data import control
from jaxmem.errors import ConfigError
from jaxmem.memory import vismem
from jaxmem.memory.vismem import CONTROL
from tests.backbones.prompts import PROMPTS, image, text, user
from tests.helpers import SPECIAL_TOKENS
from tests.memory import world as w
from tests.memory.vismem_folder import BUCKETS, KNOWN, SMALL, pair, with_vismem

ROWS = 512  # of the backbone's table
init = jax.jit(vismem.init, static_argnames="config")
CHATS = [PROMPTS["text"], PROMPTS["wide_and_tall"]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def bare(request: pytest.FixtureRequest) -> Any:
    """A tiny model whose table has more rows than its tokenizer has tokens, as published."""
    return pair(request.param)[0]


@pytest.fixture(scope="module")
def untied() -> Any:
    return pair()[0]


@pytest.fixture(scope="module")
def attached(untied: Any) -> Any:
    return untied.attach("vismem", **SMALL)


def test_check_13_control_tokens_are_single_ids(untied: Any, tmp_path: Path) -> None:
    plain = untied.processor.tokenizer
    longer = control.with_control_tokens(plain)
    assert len(plain) == KNOWN and not set(CONTROL) & set(plain.get_vocab())
    longer.save_pretrained(tmp_path)
    for tokenizer in (longer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert control.control_ids(tokenizer) == {token: KNOWN + at for at, token in enumerate(CONTROL)}
        ids = tokenizer("the<ms_I>quick <ml_E>\n<ml_I><ms_E>fox", add_special_tokens=False)["input_ids"]
        assert [id_ for id_ in ids if id_ >= KNOWN] == [KNOWN, KNOWN + 3, KNOWN + 2, KNOWN + 1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "thequick \nfox"
        assert set(SPECIAL_TOKENS) <= {token.content for token in tokenizer.added_tokens_decoder.values()}
        for token in SPECIAL_TOKENS:
            assert tokenizer.decode(tokenizer.convert_tokens_to_ids([token]), skip_special_tokens=True) == ""
    with pytest.raises(ConfigError, match="no control tokens <ms_I>, <ms_E>, <ml_I>, <ml_E>"):
        control.control_ids(plain)


def test_check_13_ids_follow_the_tokenizer(attached: Any) -> None:
    config = attached.spec.vismem
    assert (config.vocab, config.invoke_ids, config.end_ids) == (KNOWN, (KNOWN, KNOWN + 2), (KNOWN + 1, KNOWN + 3))


def test_check_13_text_that_spells_a_control_token_is_text(attached: Any) -> None:
    """Of users and assistants, in part or whole: no id of a control token enters a prompt."""
    words = "say <ms_I> and <ml_E><ml_I>, then <ms_E"
    chat = [*user(text(words), image(64, 32)), {"role": "assistant", "content": words}, *user(text(words))]
    encoded = attached.processor.encode(chat, add_generation_prompt=True)
    assert encoded.tokens.max() < KNOWN
    assert attached.processor.decode(encoded.tokens).count(words) == 3


def test_check_13_a_tokenizer_with_control_tokens_is_refused(untied: Any, attached: Any, tmp_path: Path) -> None:
    """One that was exported with a memory: attaching, and restoring onto it."""
    attached.save(tmp_path)
    exported = control.with_control_tokens(untied.processor.tokenizer)
    clash = dataclasses.replace(untied, processor=dataclasses.replace(untied.processor, tokenizer=exported))
    message = r"<ms_I> \(id 500\), <ms_E> \(id 501\), <ml_I> \(id 502\), <ml_E> \(id 503\).*load the original backbone"
    for act in (
        lambda: clash.attach("vismem", **SMALL),
        lambda: clash.attach(vismem.create(untied.spec.backbone, vocab=KNOWN, **SMALL)),
        lambda: clash.restore(tmp_path),
    ):
        with pytest.raises(ConfigError, match=message):
            act()
    one = copy.deepcopy(untied.processor.tokenizer)
    one.add_tokens(["<ml_I>"])
    with pytest.raises(ConfigError, match=r"has the control tokens <ml_I> \(id 500\) already"):
        control.settings_for(one, {})


def test_check_13_a_tokenizer_of_another_length_is_refused(untied: Any, attached: Any, tmp_path: Path) -> None:
    attached.save(tmp_path)
    restored = untied.restore(tmp_path)
    assert restored.spec == attached.spec
    jax.tree.map(np.testing.assert_array_equal, restored.memory, attached.memory)
    longer = copy.deepcopy(untied.processor.tokenizer)
    longer.add_tokens(["<extra>"])
    other = dataclasses.replace(untied, processor=dataclasses.replace(untied.processor, tokenizer=longer))
    for act in (lambda: other.restore(tmp_path), lambda: other.attach(attached.spec.vismem)):
        with pytest.raises(ConfigError, match="have the ids 500 to 503, but this tokenizer has 501 tokens"):
            act()


def test_check_14_logits_of_everything_that_can_be_sampled(bare: Any) -> None:
    """The tokenizer's rows and four; the backbone's other rows stand for no token."""
    model = with_vismem(bare, eagerness=20.0)
    hidden = jax.random.normal(jax.random.key(0), (3, 2, 64))
    scores = np.asarray(functions.next_logits(model.spec, model.base, model.memory, hidden))
    assert scores.shape == (3, 2, KNOWN + 4) and model.spec.vocab == KNOWN + 4
    head = np.asarray(model.base["embed" if bare.spec.backbone.text.tied else "head"])
    assert head.shape == (ROWS, 64)
    rows = model.memory["vismem"]["rows"]
    own = rows["embed" if bare.spec.backbone.text.tied else "unembed"]
    four = np.stack([own["invoke"][0], own["end"][0], own["invoke"][1], own["end"][1]])
    np.testing.assert_allclose(scores, np.asarray(hidden) @ np.concatenate([head[:KNOWN], four]).T, atol=1e-4)


def test_check_15_rows_start_as_those_of_a_token(bare: Any) -> None:
    """Input and output rows each from their own matrix; a tied model has the input's alone."""
    tied = bare.spec.backbone.text.tied
    preset, token = ("paper", ".") if tied else ("official", "<|im_end|>")
    settings = control.settings_for(bare.processor.tokenizer, {"preset": preset, **SMALL})
    config = vismem.create(bare.spec.backbone, **settings)
    id_ = bare.processor.tokenizer.convert_tokens_to_ids(token)
    assert (config.vocab, config.row_id, config.row_token) == (KNOWN, id_, token) and id_ is not None
    params = init(jax.random.key(0), config, bare.base)
    rows = params["rows"]
    assert set(rows) == ({"embed"} if tied else {"embed", "unembed"})
    for name, matrix in {"embed": "embed", "unembed": "head"}.items():
        if name in rows:
            away = np.stack([rows[name][end] for end in ("invoke", "end")]) - np.asarray(bare.base[matrix][id_])
            assert away.shape == (2, 2, 64) and np.sqrt(np.mean(away**2)) == pytest.approx(1e-3, rel=0.15)
            assert np.abs(np.corrcoef(away.reshape(4, -1)) - np.eye(4)).max() < 0.5  # noise of its own in each
    for path, leaf in jax.tree_util.tree_leaves_with_path([params["short"], params["long"]]):
        assert (leaf == 0).all() == (path[-1].key == "lora_b")  # formers start as the frozen decoder


def test_check_15_a_new_memory_of_a_model_starts_so(attached: Any) -> None:
    rows, id_ = attached.memory["vismem"]["rows"], attached.spec.vismem.row_id
    assert attached.processor.decode([id_]) == "."
    for name, matrix in {"embed": "embed", "unembed": "head"}.items():
        for row in (*rows[name]["invoke"], *rows[name]["end"]):
            assert 0 < np.abs(row - attached.base[matrix][id_]).max() < 5e-3


def test_check_15_embeddings_of_all_tokens(untied: Any) -> None:
    model = with_vismem(untied, eagerness=20.0)
    embedded = functions.embed_tokens(model.spec, model.base, model.memory, jnp.arange(KNOWN + 4)[None])
    rows = model.memory["vismem"]["rows"]["embed"]
    four = np.stack([rows["invoke"][0], rows["end"][0], rows["invoke"][1], rows["end"][1]])
    np.testing.assert_array_equal(embedded[0], np.concatenate([np.asarray(model.base["embed"])[:KNOWN], four]))


def test_a_row_token_that_is_none(untied: Any) -> None:
    with pytest.raises(ConfigError, match="vismem.row_token: 'no such token' is no token"):
        untied.attach("vismem", row_token="no such token", **SMALL)


def test_check_16_without_memory_the_backbone_speaks(untied: Any) -> None:
    """Greedy, token for token, however eager the invocation rows are."""
    head = untied.base["head"].at[KNOWN:].set(0.0)  # rows of no token; the bare backbone does not know that
    model = dataclasses.replace(with_vismem(untied, eagerness=20.0), base={**untied.base, "head": head})
    settings = {"max_new_tokens": 20, "buckets": BUCKETS, "stop_tokens": ()}
    known = model.without_memory().generate(CHATS, **settings)
    ours = model.generate(CHATS, invoke={"mode": "off"}, **settings)
    for one, bare in zip(ours, known, strict=True):
        assert one.tokens == bare.tokens and len(one.tokens) == 20
        assert one.text == bare.text and one.events == ()
    hidden = w.quick_hidden(model.spec, model.base, model.memory, model.batch(CHATS, buckets=BUCKETS))
    wanted = functions.next_logits(model.spec, model.base, model.memory, hidden[0, 0])
    assert np.argmax(wanted) >= KNOWN or float(jax.nn.softmax(wanted)[KNOWN:].sum()) > 0.5


def test_delimiters_are_ordinary_tokens_that_end_with_one(untied: Any) -> None:
    tokenizer = untied.processor.tokenizer
    found = control.delimiter_ids(tokenizer)
    special = set(tokenizer.added_tokens_decoder)
    known = {id_ for id_ in range(KNOWN) if id_ not in special and tokenizer.decode([id_])[-1:] in {",", ".", "\n"}}
    assert set(found) == known and {tokenizer.decode([id_]) for id_ in found} >= {",", ".", "\n"}
    assert set(control.delimiter_ids(tokenizer, ("!",))) == set(tokenizer.convert_tokens_to_ids(["!"]))
