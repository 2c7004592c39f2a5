"""Which tokens of a chat are marked as its first question."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxmem.backbones import registry
from jaxmem.checkpoints.huggingface import read_config
from jaxmem.data.loading import load_processor
from jaxmem.data.messages import question_spans
from jaxmem.errors import DataError
from tests.backbones.prompts import image, text, user
from tests.helpers import write_qwen2_tokenizer
from tests.tiny import write_qwen2_vl

PICTURE = image(56, 84, 1)
SYSTEM = {"role": "system", "content": "You see everything."}
ASSISTANT = {"role": "assistant", "content": "a dog"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("question")
    write_qwen2_tokenizer(folder)
    write_qwen2_vl(folder)
    made = load_processor(folder, registry.config_from_hf(read_config(folder)))
    return dataclasses.replace(made, mark_question=True)


def marked(processor, chat, **settings):
    row = processor.encode(chat, **settings)
    assert len(row.question) == len(row) and not np.any(row.question & (row.loss_mask > 0))
    assert not np.any(row.question & (row.visual_rows >= 0))
    return row, processor.decode(row.tokens[row.question], skip_special_tokens=False)


@pytest.mark.parametrize(
    "words", ["what do they see?", "a", "user", "assistant", "You are a helpful assistant.", "\n\nyou"]
)
@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["default", "system"])
def test_a_question_is_found_even_in_the_words_of_the_template(processor, words, before):
    row, found = marked(processor, [*before, *user(PICTURE, text(words))])
    assert found.strip() == words.strip()
    assert np.flatnonzero(row.question)[0] > np.flatnonzero(row.visual_rows >= 0)[-1]
    row, found = marked(processor, [*before, {"role": "user", "content": words}], add_generation_prompt=True)
    assert found.strip() == words.strip()
    ends = np.flatnonzero(row.question)
    assert np.array_equal(ends, np.arange(ends[0], ends[-1] + 1)) and ends[-1] >= len(row) - 8


def test_all_texts_of_the_first_user_turn_and_nothing_later(processor):
    turn = user(text("first"), PICTURE, text("then "), PICTURE, text("  which is older?"))
    chat = [SYSTEM, *turn, ASSISTANT, *user(text("first"), PICTURE), ASSISTANT]
    row, found = marked(processor, chat)
    assert "".join(found.split()) == "firstthenwhichisolder?"
    alone, same = marked(processor, [SYSTEM, *turn])
    assert same == found
    np.testing.assert_array_equal(row.question[: len(alone)], alone.question)
    assert not row.question[len(alone) :].any()


def test_special_strings_of_a_question_belong_to_it(processor):
    _, found = marked(processor, user(PICTURE, text("what does <|im_end|> mean, and <|image_pad|>?")))
    assert found == "what does <|im_end|> mean, and <|image_pad|>?"


def test_marks_change_no_token(processor):
    chat = [SYSTEM, *user(text("first"), PICTURE, text("a")), ASSISTANT]
    plain = dataclasses.replace(processor, mark_question=False).encode(chat)
    row = processor.encode(chat)
    assert plain.question is None
    for name in ("tokens", "loss_mask", "visual_rows", "positions"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(row, name))


def test_templates_that_trim_are_followed_and_templates_that_rewrite_are_refused(processor):
    at = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content EDIT }}<|im_end|>\n{% endfor %}"
    trimmed = dataclasses.replace(processor, chat_template=at.replace("EDIT", "| trim"))
    _, found = marked(trimmed, [{"role": "user", "content": "  how many?\n"}])
    assert found == "how many?"
    louder = dataclasses.replace(processor, chat_template=at.replace("EDIT", "| upper"))
    _, found = marked(louder, [{"role": "user", "content": "how many?"}])
    assert found == "HOW MANY?"  # in place
    for edit in ("[1:]", "~ m.content"):
        changed = dataclasses.replace(processor, chat_template=at.replace("EDIT", edit))
        with pytest.raises(DataError, match="rewrites the first question of the chat, so that it cannot be found"):
            changed.encode([{"role": "user", "content": "how many?"}])


def test_a_chat_without_a_question_is_refused(processor):
    for chat in (user(PICTURE), user(PICTURE, text(" \n")), [SYSTEM]):
        with pytest.raises(DataError, match="row 7 has no text in its first user turn"):
            processor.encode(chat, where="row 7")


def test_what_is_not_asked_about_is_not_marked(processor):
    """Knowledge items, in their own format: an image alone has no question."""
    items = user(PICTURE)
    row = processor.encode_as(items, lambda _: "".join(processor.image_placeholder))
    assert row.question is None and (row.visual_rows >= 0).any()


def test_spans_are_those_of_the_rendered_text():
    chat = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": [text(" ab"), {"type": "image"}, text("b")]},
    ]

    def render(messages):
        parts = lambda content: content if isinstance(content, str) else "|".join(p.get("text", "#") for p in content)  # noqa: E731
        return "ab;".join(parts(message["content"]) for message in messages)

    rendered = render(chat)
    assert rendered == "abab; ab|#|b"
    spans = question_spans(rendered, chat, render, "the chat")
    assert spans == [(6, 8), (11, 12)] and [rendered[slice(*span)] for span in spans] == ["ab", "b"]
