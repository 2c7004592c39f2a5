"""`jaxmem generate`: one chat from the command line, streamed to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxmem import api
from jaxmem.data.items import Item, ItemFile
from jaxmem.errors import ConfigError


def main(
    *,
    model: str | None,
    memory: str | None,
    encoder: str | None,
    items: str | None,
    item: Sequence[str],
    prompt: str | None,
    image: Sequence[str],
    system: str | None,
    seed: int,
    dtype: str | None,
    **sampling: Any,
) -> int:
    """Answers one prompt; the arguments are the verb's flags, `sampling` those of SamplerConfig.

    Raises:
      ConfigError: there is neither --prompt nor text on standard input, or items or an encoder, and no CoMEM.
      DataError: the file of items has none of such an id.
    """
    known = None if items is None and not item else [_items(items, item)]
    chat = _chat(prompt if prompt is not None else _standard_input(), image, system)
    loaded = api.load(model or api.TINY, dtype, memory=memory, encoder=encoder)
    if (known or encoder) and loaded.spec.comem is None:
        raise ConfigError("generate: --items and --encoder belong to a CoMEM; name its folder with --memory")
    answers = loaded.stream([chat], key=jax.random.key(seed), items=known, **sampling)
    for piece in pieces(answer[0].text for answer in answers):
        print(piece, end="", flush=True)
    print()
    return 0


def _chat(words: str, images: Sequence[str], system: str | None) -> list[dict[str, Any]]:
    """One user turn with its images in front, after an optional system turn."""
    parts = [{"type": "image", "image": path} for path in images] + [{"type": "text", "text": words}]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": parts}]


def _items(path: str | None, ids: Sequence[str]) -> list[Item]:
    """The items of a file: those that are named, in their order, or all."""
    if path is None:
        raise ConfigError("generate: --item names one of a file's items; give the file with --items")
    file = ItemFile(path)
    return file.find(ids) if ids else [file[row] for row in range(len(file))]


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise ConfigError("generate needs --prompt=... or text on standard input")
    return sys.stdin.read().strip()


def pieces(texts: Iterator[str]) -> Iterator[str]:
    """What each growing text adds; characters that are still incomplete wait for their last byte."""
    shown, text = "", ""
    for text in texts:
        ready = text.rstrip("\ufffd")
        if ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
    yield text[len(shown) :]
