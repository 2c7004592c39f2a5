r"""The one template of a question, for training and for evaluation: what CoMEM asks (arXiv 2505.17670), in own words.

Open questions ask for reasoning and a last line with \boxed{answer}; MRAG-Bench asks for a letter alone, CVQA for the
number of an option, boxed. Released code puts the image in front of the words in training and behind them in
inference; here one order holds for both, the image in front unless `text_first`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

from jaxmem import config as configs
from jaxmem.errors import ConfigError
from jaxmem.evaluation.knowledge.languages import LANGUAGES, Words
from jaxmem.evaluation.knowledge.questions import LETTERS, NUMBERS, Question

Style = Literal["open", "short", "letters", "numbers"]
STYLES = ("open", "short", "letters", "numbers")
_LETTER = (
    "Answer the question about the image. The final answer must be the letter of the right choice, and nothing else."
)
_LETTER_GIVEN = "Use the given information where it helps."


@dataclasses.dataclass(frozen=True)
class Template:
    r"""How a question becomes a user's turn.

    Attributes:
      style: "open", "short" (few words), "letters" or "numbers" (choices).
      given: a memory or retrieved items stand before the question, and the words point to them.
      text_first: the image behind the words.
    """

    style: Style
    given: bool = False
    text_first: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"unknown style {self.style!r} of a prompt{configs.suggestion(self.style, STYLES)}")

    @property
    def record(self) -> dict[str, Any]:
        """The settings and a digest of all words in all languages, for result files."""
        blank = Question("", "{}", (), (), "", "choice", ("{}", "{}"))
        kinds = [dataclasses.replace(blank, meta={"language": language}) for language in sorted(LANGUAGES)]
        digest = hashlib.sha256("\0".join(prompt(one, self) for one in kinds).encode()).hexdigest()
        return {**dataclasses.asdict(self), "digest": digest[:16]}


def prompt(question: Question, template: Template) -> str:
    """The words of a user's turn, in the question's language.

    Raises:
      ConfigError: a language without words, or a style for choices where there are none.
    """
    words = configs.choose(LANGUAGES, question.language, "language of prompts")
    if template.style in ("letters", "numbers") and not question.choices:
        raise ConfigError(f"question {question.id} has no choices, which a prompt of style {template.style!r} lists")
    if template.style == "letters":
        return _letters(question, template.given)
    lines = [f"{words.question}: {question.text}"]
    if template.style == "numbers":
        options = (f"{number}. {text}" for number, text in zip(NUMBERS, question.choices, strict=False))
        lines.append(f"{words.options}: {' '.join(options)}")
    lines.append(_task(words, template))
    return "\n".join(
        [*lines, words.form, words.reasoning, f"{words.final}: \\boxed{{{_box(words, question, template)}}}"]
    )


def _task(words: Words, template: Template) -> str:
    """What to do: reason, and in which way to answer."""
    think = words.think_given if template.given else words.think
    manner = {"short": words.short, "numbers": words.number}.get(template.style)
    return think if manner is None else f"{think} {manner}"


def _box(words: Words, question: Question, template: Template) -> str:
    """What the form shows in the box."""
    return f"1-{len(question.choices)}" if template.style == "numbers" else words.brief


def _letters(question: Question, given: bool) -> str:
    choices = [f"{letter}: {text}" for letter, text in zip(LETTERS, question.choices, strict=False)]
    task = f"{_LETTER} {_LETTER_GIVEN}" if given else _LETTER
    return "\n".join([task, f"Question: {question.text}", "Choices:", *choices])


def messages(question: Question, template: Template, answer: str | None = None) -> list[dict[str, Any]]:
    """The chat of a question, as `jaxmem.data.messages` reads it: one user turn, and the answer where it is trained on.

    Raises:
      ConfigError: see `prompt`.
    """
    images = [{"type": "image", "image": image} for image in question.images]
    text = {"type": "text", "text": prompt(question, template)}
    content = [text, *images] if template.text_first else [*images, text]
    chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return chat if answer is None else [*chat, {"role": "assistant", "content": answer}]
