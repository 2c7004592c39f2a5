"""Records of a configured dataset to batches of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.data import records
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.boards import Board
from jaxmem.data.processor import Processor
from jaxmem.training.settings import DataConfig

Encode = Callable[[Any], Any]
Assemble = Callable[[Sequence[Any]], Batch]


def open_source(data: DataConfig, batch_size: int) -> Sequence[Any]:
    """The records of a dataset; DataError when there are none."""
    if data.source == "jsonl":
        return records.JsonlRecords(data.path)
    return data.boards if data.boards.group > 1 else dataclasses.replace(data.boards, group=batch_size)


def encoders(data: DataConfig, processor: Processor, backbone: BackboneConfig) -> tuple[Encode, Assemble]:
    """(record -> example, examples -> Batch) for `Pipeline`.

    Boards for a backbone like the embedded one skip the general processor, with the same result in less time.
    """
    if data.source == "boards" and (batcher := _board_batcher(processor, backbone)) is not None:
        return lambda board: board, lambda boards: _narrowest(batcher, boards, data.buckets)

    def encode(record: Any) -> Any:
        return processor.encode(records.messages_of(record), add_generation_prompt=False)

    return encode, lambda examples: collate(examples, data.buckets, processor.pad_token)


def _board_batcher(processor: Processor, backbone: BackboneConfig) -> BoardBatcher | None:
    """The short way from boards to batches, if the chat template and the tower are the embedded model's."""
    template = resources.files("jaxmem") / "assets" / "chat_template.jinja"
    if processor.chat_template != template.read_text(encoding="utf-8"):
        return None
    try:
        return BoardBatcher(processor.tokenizer.backend_tokenizer, backbone)
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
