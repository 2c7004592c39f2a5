"""Records to prompts: what a completion starts from, and the columns that rewards read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmem.backbones.batch import Batch
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.boards import Board
from jaxmem.data.example import Example
from jaxmem.data.processor import Processor
from jaxmem.data.records import messages_of
from jaxmem.errors import DataError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      example: encoded, up to where the completion starts.
      messages: the chat.
      columns: everything else that the record says, for rewards.
      answer: tokens of the reference answer, the stop token included; None where it was not asked for or is not there.
    """

    example: Example
    messages: list[dict[str, Any]]
    columns: Mapping[str, Any]
    answer: tuple[int, ...] | None = None

    @property
    def images(self) -> list[Any]:
        """The chat's images, as they stand in it."""
        contents = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return [part["image"] for content in contents for part in content if part.get("type") == "image"]

    @property
    def text(self) -> str:
        """What the user says last."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part.get("type") == "text")


def encoder(
    processor: Processor,
    answers: bool = False,
    chat: Callable[[Any, Sequence[Mapping[str, Any]], bool], Example] | None = None,
) -> Callable[[Any], Prompt]:
    """record -> Prompt. A record's last assistant turn is what is asked for, not part of the prompt; it becomes the
    column "solution" unless the record has one, and with `answers` the prompt's `answer`. `chat` is how a record's
    messages become a row (`encoding.chats`); without it they are all that counts."""

    read = chat or (lambda record, messages, prompt: processor.encode(messages, add_generation_prompt=prompt))

    def encode(record: Any) -> Prompt:
        messages, columns, answer = messages_of(record), columns_of(record), None
        whole = messages
        if messages and messages[-1].get("role") == "assistant":
            columns = {"solution": messages[-1]["content"], **columns}
            messages = messages[:-1]
        if not messages:
            raise DataError("a prompt needs at least one message that is not the assistant's")
        example = read(record, messages, True)
        if answers and len(messages) < len(whole):
            full, start = read(record, whole, False), len(example)
            answer = tuple(int(t) for t in full.tokens[start:][full.loss_mask[start:] > 0])
        return Prompt(example, messages, columns, answer)

    return encode


def columns_of(record: Any) -> dict[str, Any]:
    """What a record says beside its chat."""
    if isinstance(record, Board):
        return {"cells": record.cells, "digits": record.digits, "sums": record.sums}
    return {key: value for key, value in record.items() if key != "messages"} if isinstance(record, dict) else {}


def batch_of(
    prompts: Sequence[Prompt],
    buckets: Buckets,
    pad_token: int,
    rows: int | None = None,
    blind: np.ndarray | None = None,
) -> Batch:
    """A batch of `rows` prompts: those given, then copies of the first that count as padding.

    Args:
      prompts: at least one.
      buckets: allowed lengths.
      pad_token: fills up.
      rows: of the batch; as many as prompts when None.
      blind: prompts whose text cannot see the image in the backbone, the first ones of [rows] at least.

    Raises:
      DataError: a prompt exceeds the longest bucket.
    """
    prompts = list(prompts)
    missing = (rows or len(prompts)) - len(prompts)
    batch = collate([prompt.example for prompt in prompts + prompts[:1] * missing], buckets, pad_token)
    segments = np.array(batch.segments)
    segments[len(prompts) :] = 0
    hidden = np.zeros(len(segments), bool)
    if blind is not None:
        hidden[: len(prompts)] = blind[: len(prompts)]
    return dataclasses.replace(batch, segments=segments, blind=hidden)
