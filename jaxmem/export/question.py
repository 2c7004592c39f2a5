"""How torch finds the first question among a prompt's tokens: by the marks that the chat template sets around it."""

from __future__ import annotations

from typing import Any

from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError

_FIRST, _ANSWER, _SECOND = (chr(0xE000 + number) for number in range(3))


def marks(processor: Processor) -> dict[str, list[int]]:
    """What stands around the text of a user turn.

    Returns:
      Token ids: "start", what opens a user turn; "end", what stands behind its text; "blank", all tokens that are white
      space alone.

    Raises:
      ConfigError: the chat template shows no mark in front of a user turn, or none behind it.
    """
    roles = zip(("user", "assistant", "user"), (_FIRST, _ANSWER, _SECOND), strict=True)
    chat = [{"role": role, "content": text} for role, text in roles]
    closing = _rendered(processor, chat[:2], False).partition(_ANSWER)[2]
    whole, asked = (_rendered(processor, chat, prompt) for prompt in (False, True))
    start = whole.partition(_ANSWER)[2].partition(_SECOND)[0].removeprefix(closing).strip()
    end = whole.partition(_SECOND)[2].strip() or asked.partition(_SECOND)[2].strip()
    if not start or not end:
        raise ConfigError(
            "the chat template sets no marks around the words of a user, so that torch could not find the question"
            " that vision_remember reads; use text_token='none', or another template"
        )
    return {"start": _ids(processor, start), "end": _ids(processor, end), "blank": _blank(processor.tokenizer)}


def _rendered(processor: Processor, chat: list[dict[str, Any]], prompt: bool) -> str:
    """The template's text."""
    return processor.tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=prompt
    )


def _ids(processor: Processor, text: str) -> list[int]:
    """Its tokens."""
    return [int(id_) for id_ in processor.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _blank(tokenizer: Any) -> list[int]:
    """All tokens that are white space alone."""
    texts = tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [id_ for id_, text in enumerate(texts) if text and not text.strip()]
