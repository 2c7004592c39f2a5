"""Answers of the bare backbone that has the keys of knowledge items in some of its layers ("VLM-as-Memory",
arXiv 2505.17670): how items are written, and from chats to completions.

Axis letters: B rows, K items of a row, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones.batch import Array, Batch
from jaxmem.data import knowledge
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.messages import take_apart
from jaxmem.data.processor import Processor
from jaxmem.distributed import hosts
from jaxmem.distributed.mesh import current
from jaxmem.errors import ConfigError, DataError
from jaxmem.sampling.cache import require_room
from jaxmem.sampling.item_decoding import answer
from jaxmem.sampling.item_prefix import KeysConfig, item_keys, nothing

if TYPE_CHECKING:
    from jaxmem.api import Completion, Model

_item_keys = jax.jit(item_keys, static_argnames=("spec", "config"))


def generate(
    model: Model,
    chats: Sequence[Any],
    items: Sequence[Sequence[Any]],
    config: KeysConfig | None = None,
    *,
    key: Array | None = None,
    buckets: Buckets | None = None,
    **settings: Any,
) -> list[Completion]:
    """Answers every chat with the keys of its items in some of the layers.

    Args:
      model: a backbone without memories.
      chats: list of chats, or one.
      items: per chat its knowledge items (`{"image": ..., "text": ...}`), maybe none; their order does not matter.
      config: `KeysConfig()` when None.
      key: random key; fixed when None.
      buckets: allowed lengths.
      **settings: of `SamplerConfig`.

    Raises:
      ConfigError: a model with memories, settings that do not exist, or layers that the backbone does not have.
      DataError: chats or items that cannot be used, lists of different lengths, or too many tokens.
    """
    from jaxmem.api import Completion

    options, spec, config = model.sampler(**settings), model.spec, config or KeysConfig()
    config.check(spec)
    if spec.memories:
        names = ", ".join(memory.name for memory in spec.memories)
        raise ConfigError(
            f"item keys are a memory of the bare backbone and the model has {names}; use without_memory()"
        )
    batch = read_rows(model, [chats] if isinstance(chats[0], dict) else chats, items, config, buckets or Buckets())
    (rows, width), new = batch.tokens.shape, options.max_new_tokens
    require_room(spec, width, new, options.cache_size or width + new)
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, rows) if jnp.ndim(key) == 0 else key
    with current(model.mesh):
        bare = batch.items is None
        prefix = nothing(spec, config, model.base, rows) if bare else _item_keys(spec, config, model.base, batch.items)
        batch = dataclasses.replace(batch, items=None, prefix_rows=None)
        found = hosts.fetch(answer(spec, options, config.layers, model.base, batch, prefix, keys))
    completions = []
    for tokens, logprobs, count in zip(*found, strict=True):
        ids = tuple(tokens[:count].tolist())
        stopped = bool(ids) and ids[-1] in options.stop_tokens
        completions.append(Completion(model.processor.decode(ids), ids, tuple(logprobs[:count].tolist()), stopped))
    return completions


def read_rows(
    model: Model, chats: Sequence[Any], items: Sequence[Sequence[Any]], config: KeysConfig, buckets: Buckets
) -> Batch:
    """The questions as a batch, and in its `items` what is known of each (None when nothing is known of any)."""
    if len(items) != len(chats):
        raise DataError(f"there are {len(chats)} chats and items for {len(items)}; give a list for each, maybe empty")
    rows = [model.processor.encode(chat, add_generation_prompt=True, where=f"chat {i}") for i, chat in enumerate(chats)]
    if any(len(own) for own in items):
        limit = model.spec.backbone.text.max_positions
        rows = [
            dataclasses.replace(
                row,
                prefix_rows=np.full(len(row), -1, np.int32),
                items=tuple(_read_items(model.processor, config, chat, own, f"chat {i}", limit)),
            )
            for i, (row, chat, own) in enumerate(zip(rows, chats, items, strict=True))
        ]
    return collate(rows, buckets, model.processor.pad_token)


def _read_items(
    processor: Processor, config: KeysConfig, chat: Any, items: Sequence[Any], where: str, limit: int
) -> list[Example]:
    """The items of a chat as rows of their own, of at most `limit` tokens."""
    read = []
    for place, written in enumerate(item_chats(config, chat, items, where)):
        read.append(processor.encode(written, where=f"item {place} of {where}"))
        if len(read[-1]) > limit:
            raise DataError(
                f"item {place} of {where} has {len(read[-1])} tokens and the backbone {limit} positions; lower"
                " text_limit or the images' max_pixels"
            )
    return read


def item_chats(config: KeysConfig, chat: Sequence[Any], items: Sequence[Any], where: str) -> list[list[dict[str, Any]]]:
    """How items are written: a user turn each with the question, the labelled text and the images.

    Args:
      config: static.
      chat: gives the question, the text of its last user message.
      items: knowledge items.
      where: how errors call the chat.

    Raises:
      DataError: an item with neither images nor text.
    """
    question, chats = _question(chat, where) if config.with_question else "", []
    for turn in knowledge.in_prompt((), items, where):
        known = [part["text"][: config.text_limit] for part in turn["content"] if part["type"] == "text"]
        lines = [*([question] if question else []), *(f"{config.label} {text}" for text in known)]
        shown = [part for part in turn["content"] if part["type"] != "text"]
        written = [{"type": "text", "text": "\n".join(lines)}] if lines else []
        chats.append([{"role": "user", "content": [*written, *shown]}])
    return chats


def _question(chat: Sequence[Any], where: str) -> str:
    """The text of the last user message; "" without one."""
    asked = [message["content"] for message in take_apart(chat, where=where)[0] if message["role"] == "user"]
    if not asked or isinstance(asked[-1], str):
        return asked[-1].strip() if asked else ""
    return " ".join(part["text"].strip() for part in asked[-1] if part["type"] == "text")
