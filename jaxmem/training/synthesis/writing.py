"""Kept replies to `train.jsonl`, a file for `jaxmem.data.records.JsonlRecords`.

The question's image is what the model saw: a PNG below `images/`, with a path relative to the folder, or the absolute
path of its file where nothing was resized. Items keep the absolute paths of theirs, since encoders resize them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.data.images import load_image
from jaxmem.data.items import Item, ItemFile
from jaxmem.evaluation.knowledge.prompts import prompt
from jaxmem.evaluation.knowledge.shown import RULES, Looks
from jaxmem.retrieval import files
from jaxmem.training.synthesis import finding, translating
from jaxmem.training.synthesis.choosing import Asked
from jaxmem.training.synthesis.journal import encoded
from jaxmem.training.synthesis.settings import SynthesisConfig

TRAIN, IMAGES = "train.jsonl", "images"


def write(
    folder: Path,
    config: SynthesisConfig,
    asked: Sequence[Asked],
    rows: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, str],
    translations: Mapping[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, dict[str, int]]:
    """Writes the samples: in the order of the questions, then their translations.

    Returns:
      Samples and translations by source.

    Raises:
      DataError: a question or an item that changed since it was found.
    """
    items = ItemFile(config.retrieval.items)
    samples: dict[str, dict[str, Any]] = {}
    (folder / IMAGES).mkdir(exist_ok=True)
    for one in asked:
        if one.key in kept:
            finding.check(one, rows[one.key])
            shown = [_image(folder, config.looks, one, at) for at in range(len(one.question.images))]
            known = [_item(item) for item in finding.items_of(rows[one.key], items)]
            texts, language = (prompt(one.question, one.template), kept[one.key]), one.question.language
            samples[one.key] = _sample(one.key, texts, shown, known, one.source, language, one.template.text_first)
    others = [
        _translation(samples[row["key"]], row)
        for row in translations.values()
        if not translating.lost_box(row, kept[row["key"]])
    ]
    files.commit(folder / TRAIN, [encoded([*samples.values(), *others])])
    count = lambda entries, name: sum(entry["source"] == name for entry in entries)  # noqa: E731
    return {name: {"kept": count(samples.values(), name), "translated": count(others, name)} for name in config.sources}


def _sample(
    key: str,
    texts: tuple[str, str],
    images: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    source: str,
    language: str,
    text_first: bool,
) -> dict[str, Any]:
    shown, said = [{"type": "image", "image": path} for path in images], {"type": "text", "text": texts[0]}
    content = [said, *shown] if text_first else [*shown, said]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": texts[1]}]
    return {"id": key, "messages": chat, "items": list(items), "source": source, "language": language}


def _translation(sample: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with other words about the same images."""
    said, reply = row["texts"]
    content = [
        part if part["type"] == "image" else {"type": "text", "text": said} for part in sample["messages"][0]["content"]
    ]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    language = row["language"]
    return {**sample, "id": f"{sample['id']}@{language}", "messages": chat, "language": language}


def _item(item: Item) -> dict[str, Any]:
    """An item with the absolute paths of its images."""
    paths = [path if path.startswith("data:") or "://" in path else os.path.abspath(path) for path in item.images]
    images: dict[str, Any] = {"image": paths[0]} if len(paths) == 1 else {"images": paths}
    return {"id": item.id, "text": item.text, **images}


def _image(folder: Path, looks: Looks, one: Asked, at: int) -> str:
    """The path of a question's image as it was shown."""
    source = one.question.images[at]
    read = load_image(source, f"image {at} of question {one.key}")
    shown = RULES[looks.images](read, looks.side)
    if shown is read and isinstance(source, str | Path) and not str(source).startswith("data:"):
        return os.path.abspath(source)
    name = f"{IMAGES}/{hashlib.sha256(one.key.encode()).hexdigest()[:24]}_{at}.png"
    if not (folder / name).is_file():
        data = io.BytesIO()
        shown.save(data, "PNG")
        files.commit(folder / name, [data.getvalue()])
    return name
