"""`jaxmem bank build|add|info|search`: memory banks and indexes from the command line."""

from __future__ import annotations

import json as json_lib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem import config as configs
from jaxmem.data.items import Item, ItemFile
from jaxmem.errors import ConfigError
from jaxmem.retrieval import build as building
from jaxmem.retrieval import find
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.index import INFO, KINDS, Embedder, create_index, open_index, read_info
from jaxmem.retrieval.shards import REJECTED

ACTIONS = {"build": "items", "add": "items", "info": "", "search": "index"}
_STEP = 1 << 14  # items that are embedded before they are written


def main(*, action: str, folder: str | None, json: bool, **flags: Any) -> int:
    """Runs one action; the arguments are the verb's flags.

    Args:
      action: build, add, info or search.
      folder: of the bank; search needs none.
      json: print one JSON object and nothing else.
      **flags: of the action.

    Raises:
      ConfigError: an unknown action, or a flag that it needs is missing.
    """
    needed = configs.choose(ACTIONS, action, "action of bank")
    missing = ["folder"] if folder is None and action != "search" else []
    if missing := missing + ([needed] if needed and not flags[needed] else []):
        raise ConfigError(f"bank {action} needs " + " and ".join(f"--{name}=..." for name in missing))
    if action in ("build", "add"):
        found = fill(action, folder or "", **flags)
        text = as_text(found)
    elif action == "info":
        found = info(folder or "", flags["index"])
        text = as_text(found)
    else:
        found = search(folder, **flags)
        text = "\n".join(f"{h['rank']:4d}  {h['score']:7.4f}  {h['id']}  {h['text']}" for h in found["hits"])
    print(json_lib.dumps(found) if json else text)
    return 1 if found.get("faults") else 0


def fill(
    action: str,
    folder: str,
    *,
    items: str,
    model: str | None,
    memory: str | None,
    encoder: str | None,
    dtype: str | None,
    store: str,
    shard_items: int,
    batch: int,
    on_error: str,
    index: str | None,
    index_kind: str,
    embedder: str | None,
    mode: str,
    **_: Any,
) -> dict[str, Any]:
    """Builds a bank or adds to one, and to the index if one is named; returns counts.

    Raises:
      ConfigError: no memory, or an index without an embedder.
    """
    from jaxmem.retrieval.encoder import load_encoder

    if memory is None or (index and embedder is None):
        raise ConfigError(
            f"bank {action} needs " + ("--memory=..." if memory is None else "--embedder=... for an index")
        )
    configs.choose(KINDS, index_kind, "kind of index")
    source, made = ItemFile(items), load_embedder(embedder, mode) if index and embedder else None
    if index and made and (Path(index) / INFO).exists():
        open_index(index, made)  # refuses another embedder before anything is encoded
    reader = load_encoder(model or "", memory, dtype, encoder=encoder, batch=batch)
    say = lambda done, total: print(f"{done} of {total} items", file=sys.stderr)  # noqa: E731
    shared: dict[str, Any] = {"batch": batch, "on_error": on_error, "progress": say}
    if action == "build":
        done = building.build(folder, source, reader, dtype=store, shard_items=shard_items, **shared)
    else:
        done = building.add(folder, source, reader, **shared)
    found: dict[str, Any] = {
        "items": done.items,
        "added": done.added,
        "present": done.present,
        "rejected": len(done.rejected),
    }
    if done.rejected:
        found["see"] = str(Path(folder) / REJECTED)
    if index and made:
        found["indexed"] = embed_into(index, index_kind, source, Bank.open(folder), made)
    return found


def load_embedder(folder: str, mode: str) -> Embedder:
    """CLIP or SigLIP of a folder, reading images, texts or both ("image", "text", "mean")."""
    from jaxmem.retrieval.clip_embedder import ClipEmbedder

    return ClipEmbedder(folder, mode=mode)  # pyrefly: ignore


def embed_into(folder: str, kind: str, items: ItemFile, bank: Bank, embedder: Embedder) -> int:
    """Embeds the items of a file that are in the bank and not in the index, and puts them there; returns how many.

    Args:
      folder: of the index; made when there is none.
      kind: of an index that is made.
      items: the file.
      bank: says which items can be used.
      embedder: makes the vectors.

    Raises:
      DataError: an index of another embedder, or an item that the embedder cannot read.
    """
    opened = open_index(folder, embedder) if (Path(folder) / INFO).exists() else None
    names = [name for name in items.ids if name is not None and name in bank]
    held = set() if opened is None else opened.known(names)
    names = [name for name in names if name not in held]
    whole = (read_info(Path(folder))["kind"] if opened is not None else kind) == "approximate"  # written as a whole
    vectors: list[np.ndarray] = []
    for start in range(0, len(names), _STEP):
        part = names[start : start + _STEP]
        vectors.append(embedder.embed(items.find(part)))
        if whole and start + _STEP < len(names):
            continue
        part = names if whole else part
        if opened is None:
            opened = create_index(kind, folder, part, np.concatenate(vectors), embedder.digest)
        else:
            opened.add(part, np.concatenate(vectors))
        vectors = []
    return len(names)


def info(folder: str, index: str | None = None) -> dict[str, Any]:
    """What a bank holds, and whether its bytes are those that were written; likewise about an index, if named."""
    bank = Bank.open(folder)
    faults = bank.faults()
    found: dict[str, Any] = {
        "bank": folder,
        "items": len(bank),
        "rejected": len(bank.rejected),
        "shards": len(bank.shards),
        "latents": bank.layout.latents,
        "width": bank.layout.width,
        "dtype": bank.layout.dtype,
        "bytes per item": bank.layout.item_bytes,
        "encoder": bank.layout.encoder,
        "template": bank.layout.template,
        "verified": not faults,
        "faults": list(faults),
    }
    if index:
        opened = open_index(index)
        kind = read_info(Path(index))["kind"]
        found["index"] = {"kind": kind, "items": len(opened), "width": opened.width, "embedder": opened.embedder}
    return found


def as_text(found: dict[str, Any]) -> str:
    """A table of two columns; entries of an entry follow under both names."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines.append(as_text({f"{name} {key}": one for key, one in value.items()}))
        else:
            shown = (
                value if isinstance(value, list) else ["yes" if value else "no"] if isinstance(value, bool) else [value]
            )
            lines += [f"{name:16}  {one}" for one in shown]
    return "\n".join(lines)


def search(
    folder: str | None,
    *,
    index: str,
    items: str | None,
    embedder: str | None,
    text: str | None,
    image: Sequence[str],
    k: int,
    **_: Any,
) -> dict[str, Any]:
    """The items nearest to one question, given by its text, its images, or both.

    Raises:
      ConfigError: no question, or no embedder.
      DataError: see `find.search` and `find.fetch`.
    """
    if embedder is None or not (text or image):
        raise ConfigError("bank search needs --embedder=... and --text=... or --image=... (or both)")
    made = load_embedder(embedder, "mean" if text and image else "text" if text else "image")
    question = Item("of the question", text or "", tuple(image))
    bank = Bank.open(folder) if folder else None
    hits = find.search(open_index(index, made), bank, [question], k, made)
    texts = [one.item.text for one in find.fetch(hits, ItemFile(items), images=False)[0]] if items else [""] * k
    scored = zip(hits.ids[0], hits.scores[0].tolist(), texts, strict=False)
    return {"hits": [{"rank": n, "id": i, "score": s, "text": t} for n, (i, s, t) in enumerate(scored, 1)]}
