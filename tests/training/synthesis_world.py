"""Questions about greys in two benchmarks' formats, and a model that knows what it is asked most of the time."""

from __future__ import annotations

import json
import re

import jax
import numpy as np

from jaxmem import config as configs
from jaxmem.api import Completion
from jaxmem.training.synthesis.run import synthesise
from jaxmem.training.synthesis.settings import SynthesisConfig
from tests.evaluation.knowledge.lookup_world import Shades, picture, write_index, write_items

VIQUAE = tuple(range(11, 63, 5))
INFOSEEK = (14, 27, 36, 48, 59, 61)


def write_questions(folder):
    """{name: section}: eleven questions of ViQuAE and six of InfoSeek, whose answers are their pictures' greys."""
    for grey in {*VIQUAE, *INFOSEEK}:
        picture(folder / "asked", grey, (700, 64) if grey % 2 else (64, 64))
    viquae = [
        {"id": f"v{grey}", "input": f"what is {grey}?", "image": f"{grey}.png", "output": {"answer": [str(grey)]}}
        for grey in VIQUAE
    ]
    infoseek = [
        {"data_id": f"i{grey}", "image_id": str(grey), "question": f"what is {grey}?", "answer_eval": [str(grey)],
         "data_split": "unseen_entity"} for grey in INFOSEEK
    ]  # fmt: skip
    for name, rows in (("viquae", viquae), ("seek", infoseek)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"questions": [str(folder / "viquae.jsonl")], "images": str(folder / "asked"), "count": 6}
    other = {"questions": [str(folder / "seek.jsonl")], "images": str(folder / "asked"), "benchmark": "infoseek"}
    return {"viquae": one, "seek": other}


def write_world(folder):
    """Sections of a configuration without output."""
    write_index(folder, write_items(folder))
    retrieval = {"index": str(folder / "index"), "items": str(folder / "items.jsonl"), "embedder": "clip", "k": 3}
    rollout = {"batch_size": 3, "samples": 2, "temperature": 1.0, "max_new_tokens": 5}
    translation = {"function": "tests.training.synthesis_world:translate", "languages": ["fr", "ja"], "count": 4}
    return {
        "sources": write_questions(folder),
        "retrieval": retrieval,
        "rollout": rollout,
        "translation": {**translation, "batch": 3},
        "seed": 7,
    }


class Knowing:
    """Knows a number that is asked for with a probability of 0.6, ends one reply in five too late; both by the key."""

    def __init__(self):
        self.calls = []

    def generate(self, chats, *, key, buckets, **decode):
        self.calls.append((chats, np.asarray(jax.random.key_data(key)), decode))
        draws = np.asarray(jax.vmap(lambda one: jax.random.uniform(one, (2,)))(key))
        return [self.reply(chat, *pair) for chat, pair in zip(chats, draws, strict=True)]

    def reply(self, chat, knows, ends):
        asked = re.search(r"what is (\d+)\?", chat[-1]["content"][-1]["text"])
        said = asked[1] if knows < 0.6 else "nothing"
        return Completion(f"It is grey.\n\\boxed{{{said}}}", (1,), (0.0,), bool(ends < 0.8))


def settings(sections, output, **changes):
    """The configuration; `changes` replace values of sections by "section__key", or whole sections."""
    content = json.loads(json.dumps(sections))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content.update({section: value}) if not key else content[section].update({key: value})
    return configs.build(SynthesisConfig, {**content, "output": str(output)}, "config")


def run(sections, output, model=None, **changes):
    return synthesise(settings(sections, output, **changes), model=model or Knowing(), embedder=Shades())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder):
    """{path: bytes} of a folder but for its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


TRANSLATED = []


def translate(texts, language):
    """Marks texts; notes what it was asked; forgets the box of one question in Japanese."""
    TRANSLATED.append((language, len(texts)))
    kept = [text if "what is" in text else text.replace("\\boxed", "box") for text in texts]
    return [f"[{language}] {text}" for text in (kept if language == "ja" else texts)]


def broken(texts, language):
    return texts[1:]
