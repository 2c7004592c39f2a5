"""A tiny Qwen2.5-VL beside tiny decoders with a tokenizer of their own, and rows for the two."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import jaxmem
from jaxmem.data.batching import Buckets
from jaxmem.training import encoding
from jaxmem.training.settings import DataConfig
from tests.backbones.prompts import image, picture, text, torch_inputs, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer
from tests.llava_folder import write_decoder
from tests.memory import comem_world as w
from tests.memory.test_q_former import oracle
from tests.tiny import write_qwen2_5_vl

BUCKETS = Buckets(tokens=(192,), patches=(96,), items=(3,), item_tokens=(64,), item_patches=(96,), query_tokens=(96,))
SYSTEM = {"role": "system", "content": "answer"}
QUESTIONS = [
    user(image(96, 64, 5), text("what do they see?")),
    user(text("a lazy dog, but which one of them, and when?")),
    [SYSTEM, *user(text("first"), image(32, 64, 6), image(64, 32, 7), text("then?"))],
]
VOCAB = {64: 480, 48: 500}  # the encoder's tokenizer has 512


def write_target(folder: Any, width: int = 64, seed: int = 3) -> Any:
    """A Qwen2 whose tokens have other numbers than the encoder's; the torch model."""
    theirs = write_decoder(Path(folder), "qwen2", seed=seed, hidden_size=width, vocab_size=VOCAB[width])
    write_tokenizer(folder, VOCAB[width])
    (Path(folder) / "preprocessor_config.json").unlink()
    return theirs


def write_encoder(folder: Any, seed: int = 5, **settings: Any) -> Any:
    """The Qwen2.5-VL; the torch model."""
    write_qwen2_tokenizer(folder)
    return write_qwen2_5_vl(folder, seed=seed, **settings)


@functools.cache
def target(width: int = 64) -> tuple[Any, Any]:
    """The bare decoder, ours and theirs."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = write_target(folder, width)
        return jaxmem.load(folder), theirs


def encoder() -> tuple[Any, Any]:
    """The bare encoder, ours and theirs."""
    return w.pair("qwen2_5_vl")


@functools.cache
def model(width: int = 64, lively: bool = True, **settings: Any) -> Any:
    """The decoder behind the encoder; `lively` factors change everything, others are the encoder's backbone."""
    fresh = target(width)[0].with_encoder(encoder()[0]).attach("comem", **(w.SMALL | {"alpha": 2.0} | settings))
    noisy = w.noisy(fresh.memory["comem"])
    kept = noisy if lively else {**noisy, "encoder": fresh.memory["comem"]["encoder"]}
    return dataclasses.replace(fresh, memory={"comem": kept})


def record(question: Any, answer: str, items: Any = ()) -> dict[str, Any]:
    """A row of training data."""
    return {"messages": [*question, {"role": "assistant", "content": answer}], "items": list(items)}


def pipeline(model: Any, **settings: Any) -> tuple[Any, Any]:
    """What training encodes and assembles with."""
    data = DataConfig(path="rows.jsonl", buckets=BUCKETS, newline=True, **settings)
    return encoding.encoders(data, model.processor, model.spec)


def batch_of(model: Any, *records: Any) -> Any:
    """A batch of training rows."""
    encode, assemble = pipeline(model)
    return assemble([encode(one) for one in records])


@functools.cache
def _forward() -> Any:
    from jaxmem.model import hidden_states, logits

    def run(spec: Any, base: Any, memory: Any, batch: Any) -> Any:
        return logits(spec, base, hidden_states(spec, base, memory, batch))

    return jax.jit(run, static_argnums=0)


def logits(model: Any, batch: Any) -> np.ndarray:
    """[B, T, V]."""
    return np.asarray(_forward()(model.spec, model.base, model.memory, batch))


def composed(model: Any, width: int, question: Any, items: Any, words: str | None = None) -> Any:
    """What torch puts in front of the decoder: [1, T, W] of items, prompt and text, of a model whose factors are zero.

    Hidden states come from transformers, vectors from the Q-Former written out in torch, text from `words` (the whole
    chat with its opening turn for None).
    """
    from jaxmem.data import knowledge, query

    config, params, sees, reads = model.spec.comem, model.memory["comem"], encoder()[1], model.processor.encoder
    adapter = np.asarray(params["adapter"]["kernel"]) if "adapter" in params else np.eye(64)

    def states(row: Any) -> np.ndarray:
        with torch.no_grad():
            return sees.model(**torch_inputs("row", row)).last_hidden_state.numpy()

    parts = []
    for item in items:
        hidden = states(knowledge.encode_item(reads, config, item))
        parts.append(oracle(config.q_former, params["q_former"], hidden, np.ones(hidden.shape[:2], bool)) @ adapter)
    if config.query:
        parts.append(states(reads.encode(question, True)) @ adapter)
    row = model.processor.encode(query.text_of(question), True)
    table = target(width)[1].get_input_embeddings()
    parts.append(table(torch.tensor(row.tokens, dtype=torch.long)).detach().numpy()[None])
    return torch.tensor(np.concatenate(parts, axis=1), dtype=torch.float32)


def rows_file(folder: Path, count: int = 4) -> Path:
    """Rows with images and 0, 1, 2, 0, ... items, as users write them."""
    import json

    from PIL import Image

    rows = []
    for number in range(count):
        Image.fromarray(picture(64, 64, number)).save(folder / f"{number}.png")
        known = [{"text": f"a fox and {word}", "image": f"{number}.png"} for word in ("dogs", "wizards")[: number % 3]]
        answer = ("seven dogs", "a lazy fox", "wizards", "rows of numbers")[number % 4]
        rows.append({"prompt": "what is this?", "image": f"{number}.png", "answer": answer, "items": known})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
