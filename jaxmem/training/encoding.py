"""Records of a configured dataset to batches of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.backbones.batch import Batch
from jaxmem.data import knowledge, query, records
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.boards import Board
from jaxmem.data.example import Example
from jaxmem.data.processor import Processor
from jaxmem.errors import ConfigError, DataError
from jaxmem.model import Spec
from jaxmem.training.settings import DataConfig

Encode = Callable[[Any], Any]
Assemble = Callable[[Sequence[Any]], Batch]


def open_source(data: DataConfig, batch_size: int) -> Sequence[Any]:
    """The records of a dataset; DataError when there are none."""
    if data.source == "jsonl":
        return records.JsonlRecords(data.path)
    if data.source == "facts":
        return data.facts if data.facts.group > 1 else dataclasses.replace(data.facts, group=batch_size)
    return data.boards if data.boards.group > 1 else dataclasses.replace(data.boards, group=batch_size)


def encoders(data: DataConfig, processor: Processor, spec: Spec) -> tuple[Encode, Assemble]:
    """(record -> example, examples -> Batch) for `Pipeline`; knowledge items go where `data.items` says.

    Boards for a backbone like the embedded one skip the general processor, with the same result in less time.
    """
    if data.source == "boards" and (batcher := _board_batcher(processor, spec)) is not None:
        return lambda board: board, lambda boards: _narrowest(batcher, boards, data.buckets)

    chat = chats(data, processor, spec)

    def encode(record: Any) -> Any:
        return chat(record, records.messages_of(record), False)

    return encode, lambda examples: collate(examples, data.buckets, processor.pad_token)


def chats(
    data: DataConfig, processor: Processor, spec: Spec
) -> Callable[[Any, Sequence[Mapping[str, Any]], bool], Example]:
    """(record, its messages or some of them, whether an answer is to follow) -> Example, with the record's items.

    Raises:
      ConfigError: items shall go to a memory, and the model has none for them.
    """
    config = spec.comem
    if data.items == "memory" and config is None and data.source == "facts":
        raise ConfigError(
            'data.items is "memory" and the model has no CoMEM: set memory.name to "comem", or data.items'
        )

    def encode(record: Any, messages: Sequence[Mapping[str, Any]], prompt: bool) -> Example:
        items = records.items_of(record)
        if items and data.items == "prompt":
            messages = knowledge.in_prompt(messages, items, turns=data.item_turns)
        example = query.encode_row(processor, config, messages, prompt, newline=data.newline)
        if not items or data.items != "memory":
            return example
        if config is None:
            raise DataError(
                'the record has items and the model has no CoMEM for them; set data.items to "prompt" or "none"'
            )
        read = [knowledge.encode_item(processor.reader, config, item, f"item {i}") for i, item in enumerate(items)]
        return knowledge.behind_items(example, read, config, processor.pad_token)

    return encode


def _board_batcher(processor: Processor, spec: Spec) -> BoardBatcher | None:
    """The short way from boards to batches, if the chat template and the tower are the embedded model's."""
    template = resources.files("jaxmem") / "assets" / "chat_template.jinja"
    beside = spec.comem is not None and spec.comem.encoder is not None
    if beside or spec.backbone.vision is None or processor.chat_template != template.read_text(encoding="utf-8"):
        return None
    try:
        return BoardBatcher(processor.tokenizer.backend_tokenizer, spec.backbone)
    except ValueError:
        return None


def _narrowest(batcher: BoardBatcher, boards: Sequence[Board], buckets: Buckets) -> Batch:
    """The batch in the shortest bucket that holds all boards; ValueError when none does."""
    for width in buckets.tokens[:-1]:
        try:
            return batcher(boards, width)
        except ValueError:
            continue
    return batcher(boards, buckets.tokens[-1])
