"""One template for training and evaluation, in six languages."""

import dataclasses

import pytest

from jaxmem.data.messages import take_apart
from jaxmem.errors import ConfigError
from jaxmem.evaluation.knowledge.languages import LANGUAGES
from jaxmem.evaluation.knowledge.prompts import Template, messages, prompt
from tests.evaluation.knowledge.worlds import open_question

CHOICES = ("terrier", "poodle", "cat", "cow")


def choice(language="en"):
    return dataclasses.replace(open_question(kind="choice", language=language), choices=CHOICES)


def test_an_open_question_in_english():
    assert prompt(open_question("this"), Template("open")).splitlines() == [
        "Question: What is this?",
        "Work out the answer step by step.",
        "Write your reply in this form:",
        "Reasoning process: every step of your thinking",
        r"Final answer: \boxed{the answer in a few words}",
    ]
    assert "short and concise" in prompt(open_question(), Template("short"))
    assert "short and concise" not in prompt(open_question(), Template("open"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_all_parts(language):
    words = LANGUAGES[language]
    one = open_question("this", language=language)
    for style in ("open", "short"):
        plain, given = (prompt(one, Template(style, given)) for given in (False, True))
        assert words.think in plain and words.think_given in given and words.think_given not in plain
        assert (words.short in plain) == (style == "short")
        assert plain.startswith(f"{words.question}: What is this?")
        assert plain.splitlines()[-1] == rf"{words.final}: \boxed{{{words.brief}}}"
    numbered = prompt(choice(language), Template("numbers"))
    assert f"{words.options}: 1. terrier 2. poodle 3. cat 4. cow" in numbered and words.number in numbered
    assert numbered.endswith(r"\boxed{1-4}")
    assert len({other.think for other in LANGUAGES.values()}) == 6


def test_letters_come_on_lines_behind_the_question():
    plain, given = (prompt(choice(), Template("letters", given)).splitlines() for given in (False, True))
    assert "letter of the right choice, and nothing else" in plain[0] and "given information" in given[0]
    assert plain[1:] == ["Question: What is q?", "Choices:", "A: terrier", "B: poodle", "C: cat", "D: cow"]
    assert given[1:] == plain[1:]


def test_the_image_comes_first_unless_asked_otherwise():
    kinds = lambda template: [part["type"] for part in messages(open_question(), template)[0]["content"]]  # noqa: E731
    assert kinds(Template("open")) == ["image", "text"] and kinds(Template("open", text_first=True)) == [
        "text",
        "image",
    ]
    asked = messages(open_question(), Template("open"))
    taught = messages(open_question(), Template("open"), r"\boxed{Paris}")
    assert taught[:1] == asked and taught[1] == {"role": "assistant", "content": r"\boxed{Paris}"}
    stored = dataclasses.replace(open_question(), images=({"bytes": b"x", "path": None}, "b.png"))
    chat, media = take_apart(messages(stored, Template("open")))
    assert [one.source for one in media] == list(stored.images) and chat[0]["content"][2]["text"].startswith("Question")


def test_the_record_tells_templates_apart():
    records = [Template(style, given, first).record for style in ("open", "short", "letters", "numbers")
               for given in (False, True) for first in (False, True)]  # fmt: skip
    assert len({str(record) for record in records}) == 16 and len({record["digest"] for record in records}) == 8
    assert records[0] == {"style": "open", "given": False, "text_first": False, "digest": records[0]["digest"]}


def test_faults_are_named():
    with pytest.raises(ConfigError, match="unknown style 'opne' of a prompt"):
        Template("opne")
    with pytest.raises(ConfigError, match="unknown language of prompts 'fr'"):
        prompt(open_question(language="fr"), Template("open"))
    with pytest.raises(ConfigError, match="question q has no choices, which a prompt of style 'letters' lists"):
        prompt(open_question(), Template("letters"))
