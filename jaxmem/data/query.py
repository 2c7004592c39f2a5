"""Chats for two readers: an encoder that sees, and a model that answers and may not (CoMEM's transfer).

The encoder reads the *prompt*, and its last hidden states stand in front of the answering model's own row:

    [vectors of the items ; states of the prompt ; the whole chat as text]

The prompt ends where the first answer starts, with the opening of its turn. It is all that the encoder ever reads of a
chat, in training as in generation, so that no state can tell of an answer before it is predicted. (The released code
lets the encoder read the answers too: arXiv 2505.17670, section 4.)

Axis letters: T tokens of a row, Q tokens of its prompt as the encoder reads it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmem.data import knowledge
from jaxmem.data.example import Example
from jaxmem.data.messages import Message, take_apart
from jaxmem.data.processor import Processor
from jaxmem.errors import DataError
from jaxmem.memory.comem import CoMEMConfig


def encode_row(
    processor: Processor,
    config: CoMEMConfig | None,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    newline: bool = False,
    where: str = "the chat",
) -> Example:
    """A chat as the model that answers reads it, behind the encoder's states of the prompt where it has an encoder.

    Args:
      processor: of the model that answers; with `encoder`, that of the encoder, where `config` has one.
      config: of CoMEM; None without one.
      messages, add_generation_prompt, newline, where: as for `Processor.encode`.

    Raises:
      DataError: as `Processor.encode`, or an image behind the first answer, where nobody would see it.
    """
    if config is None or config.encoder is None:
        return processor.encode(messages, add_generation_prompt, newline=newline, where=where)
    chat = messages if processor.config.vision is not None else text_of(messages, where)
    row = processor.encode(chat, add_generation_prompt, newline=newline, where=where)
    if not config.query:
        return row
    prompt = prompt_of(messages)
    if chat is not messages and _media(messages[len(prompt) :], where):
        raise DataError(
            f"{where} has an image behind its first answer, where neither model sees it: the encoder reads what stands"
            f" in front of that answer, and {processor.config.model_type} has no vision tower; show all images before"
        )
    return behind_query(row, processor.reader.encode(prompt, True, where=where), processor.pad_token)


def prompt_of(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages in front of the first answer."""
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))


def text_of(messages: Sequence[Message], where: str = "the chat") -> list[Message]:
    """The chat without its images and videos, every content one text: texts on the two sides of an image become lines.

    Raises:
      DataError: messages that are none (`take_apart`).
    """
    chat, _ = take_apart(messages, None, where)
    return [{**message, "content": _words(message["content"])} for message in chat]


def _words(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    runs = itertools.groupby(content, lambda part: part["type"] == "text")
    return "\n".join("".join(part["text"] for part in run) for is_text, run in runs if is_text)


def _media(messages: Sequence[Message], where: str) -> bool:
    """Do some messages of a chat show something?"""
    return bool(messages) and bool(take_apart(messages, None, where)[1])


def behind_query(example: Example, query: Example, pad_token: int) -> Example:
    """A row [T] behind the states of its prompt [Q], which is encoded with it: [Q + T].

    Items' vectors go in front of both, so this comes before `knowledge.behind_items`.
    """
    row = knowledge.moved(example, len(query), pad_token)
    rows = np.concatenate([np.arange(len(query)), np.full(len(example), -1)]).astype(np.int32)
    return dataclasses.replace(row, query_rows=rows, query=query)
