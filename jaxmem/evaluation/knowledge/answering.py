"""A model that answers questions bare, behind the memory of items from a bank, or behind the items themselves.

Items are looked up once for all questions and never encoded again: what stands before a question comes mapped from the
bank. The bare backbone answers without items, and behind items as text and images (vanilla retrieval-augmented
generation, arXiv 2505.17670, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem import api
from jaxmem import config as configs
from jaxmem.api import Model
from jaxmem.checkpoints.identity import weights_fingerprint
from jaxmem.data import knowledge
from jaxmem.data.batching import Buckets
from jaxmem.data.items import ItemFile
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import shown
from jaxmem.evaluation.knowledge.lookup import Lookup, bank_digest
from jaxmem.evaluation.knowledge.prompts import Template, messages
from jaxmem.evaluation.knowledge.questions import Question
from jaxmem.evaluation.knowledge.shown import Looks
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.encoder import ItemEncoder
from jaxmem.retrieval.index import Embedder
from jaxmem.sampling import keys

DECODING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 1000},
    "comem": {"temperature": 0.1, "top_p": 0.001, "repetition_penalty": 1.05, "max_new_tokens": 1000},
}
"""Ways to generate by name; "comem" is how the released code decodes."""
_REMEMBERED = ("memory", "shuffled")


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What `cli.main` asks (`running.Answering`); made by `build`.

    Attributes:
      model: with a CoMEM where a condition needs one.
      lookup: finds items; None where no condition needs any.
      items: texts and images of items, for "rag".
      looks: how prompts show images and texts.
      decode: settings of the sampler, `DECODING` or alike.
      decoding: their name.
      seed: of sampling; greedy decoding has no use for it.
      batch_size: rows that a call fills up to, so that one program serves the last batch too.
      buckets: lengths of prompts.
    """

    model: Model
    lookup: Lookup | None = None
    items: ItemFile | None = None
    looks: Looks = Looks()
    decode: Mapping[str, Any] = dataclasses.field(default_factory=lambda: DECODING["greedy"])
    decoding: str = "greedy"
    seed: int = 0
    batch_size: int = 8
    buckets: Buckets = Buckets()

    def answer(self, questions: Sequence[Question], condition: str, template: Template) -> list[str]:
        """A reply to each question.

        Args:
          questions: a batch; `meta["items_of"]` names the question whose items are used.
          condition: of `conditions.CONDITIONS`.
          template: of the prompts.

        Raises:
          DataError: an image that cannot be read, an item that the file or the bank lacks, a prompt that is too long.
        """
        if not questions:
            return []
        chats = [messages(self.looks.question(question), template) for question in questions]
        known = None
        if condition == "rag":
            chats = [self._behind_items(chat, one) for chat, one in zip(chats, questions, strict=True)]
        elif condition in _REMEMBERED:
            bank = self._lookup.bank
            assert bank is not None, "checked by build"
            known = [bank.get(self._ids(question)) for question in questions]
        count, names = len(questions), [question.id for question in questions]
        fill = lambda rows: [*rows, *[rows[-1]] * (self._rows(count) - count)]  # noqa: E731
        replies = self._of(condition).generate(
            fill(chats),
            key=keys.named(self.seed, fill(names)),
            items=None if known is None else fill(known),
            buckets=self.buckets,
            **self.decode,
        )
        return [reply.text for reply in replies[:count]]

    def facts(self, condition: str) -> dict[str, Any]:
        """What the answers depend on, for `running.settings_of`."""
        model = f"{self.model.folder.name} {weights_fingerprint(self.model.folder)[:16]}"
        extra: dict[str, Any] = {"query_images": self.looks.images, "dtype": str(self.model.base["embed"].dtype)}
        if self.looks.images in ("squash", "square"):
            extra["side"] = self.looks.side
        decode = {"name": self.decoding, **self.decode} | ({"seed": self.seed} if self.decode["temperature"] else {})
        found: dict[str, Any] = {"model": model, "order": "rank", "decode": decode, "extra": extra}
        if condition == "none":
            return found
        bank = self._lookup.bank
        assert bank is not None, "checked by build"
        found |= {"bank_size": len(bank), "bank_digest": bank_digest(bank), "index": self._lookup.record}
        if condition == "rag":
            items = {
                "items": self._items.fingerprint[:16],
                "side": self.looks.side,
                "text_limit": self.looks.text_limit,
            }
            return found | {"extra": extra | items | self._gaps}
        encoder = ItemEncoder(self.model)
        return found | {"memory": encoder.digest[:16], "order": encoder.config.order}

    def _of(self, condition: str) -> Model:
        """The model that answers."""
        return self.model if condition in _REMEMBERED else self._bare

    @functools.cached_property
    def _bare(self) -> Model:
        return self.model.without_memory()

    def _rows(self, count: int) -> int:
        """Rows of a batch that holds `count` questions."""
        return max(count, min(self.batch_size, 1 << (count - 1).bit_length()))

    @property
    def _lookup(self) -> Lookup:
        if self.lookup is None:
            raise ConfigError("there is no index to find items in; name one with its embedder")
        return self.lookup

    @property
    def _items(self) -> ItemFile:
        if self.items is None:
            raise ConfigError("condition rag needs --items, the file with the items' texts and images")
        return self.items

    @functools.cached_property
    def _gaps(self) -> dict[str, str]:
        """Which of the items that are used lack a text or an image."""
        return shown.gaps(self._items.find(list(dict.fromkeys(name for row in self._lookup.hits.ids for name in row))))

    def _ids(self, question: Question) -> tuple[str, ...]:
        """Ids of the items that stand before a question, best first."""
        other = question.meta.get("items_of")
        if other not in self._lookup.ids:
            raise DataError(f"question {question.id}: no items were looked up for {other!r}, whose it is to use")
        return self._lookup.ids[other]

    def _behind_items(self, chat: list[dict[str, Any]], question: Question) -> list[Any]:
        items = [self.looks.item(item) for item in self._items.find(self._ids(question))]
        return knowledge.in_prompt(chat, items, f"question {question.id}")


def build(
    *,
    questions: Sequence[Question],
    model: str | Path | Model | None,
    memory: str | Path | None,
    bank: str | Path | None,
    index: str | Path | None,
    k: int,
    conditions: Sequence[str],
    encoder: str | Path | None = None,
    items: str | Path | None = None,
    embedder: str | Path | Embedder | None = None,
    query_images: str = "squash",
    decode: str = "greedy",
    max_new_tokens: int = 0,
    dtype: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    buckets: Buckets | None = None,
) -> Answers:
    """Loads what the conditions need.

    Args:
      questions: all that will be asked.
      model: a Hugging Face folder; None is the shipped tiny backbone. Or a model, with its memory.
      memory: folder of a trained CoMEM.
      bank: its memory bank.
      index: of the bank's items.
      k: items per question.
      conditions: of `conditions.CONDITIONS`.
      encoder: folder of the model that reads items for the CoMEM, where it is another one.
      items: the file that bank and index were made from, for "rag": neither of them holds texts or images.
      embedder: folder of the CLIP that made the index, or the embedder itself.
      query_images: rule of `shown.RULES` for the images of questions.
      decode: of `DECODING`.
      max_new_tokens: replaces that of `decode`; 0 keeps it.
      dtype: of the weights; None as stored.
      batch_size, seed, buckets: see `Answers`.

    Raises:
      ConfigError: something that a condition needs is not given, or an unknown name.
      DataError: bank, index, items, memory and embedder do not belong together.
    """
    settings = dict(configs.choose(DECODING, decode, "way to decode"))
    settings |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    _need(conditions, bank=bank, index=index, embedder=embedder, items=items)
    looks, remembered = Looks(query_images), any(name in _REMEMBERED for name in conditions)
    if not isinstance(model, Model):
        memory, encoder = (memory, encoder) if remembered else (None, None)
        model = api.load(model or api.TINY, dtype, memory=memory, encoder=encoder)
    source = None if items is None or "rag" not in conditions else ItemFile(items)
    found = None
    if any(name != "none" for name in conditions) and bank is not None and index is not None and embedder is not None:
        opened = Bank.open(bank, ItemEncoder(model) if remembered else None)
        finder = _embedder(embedder)
        found = Lookup(tuple(questions), Path(index), finder, opened, k)
        _ = found.index  # another embedder's is refused before anything is asked
    return Answers(model, found, source, looks, settings, decode, seed, batch_size, buckets or Buckets())


def _need(conditions: Sequence[str], **given: Any) -> None:
    """ConfigError that names the flags which a condition lacks."""
    for name in conditions:
        wanted = () if name == "none" else ("bank", "index", "embedder", *(("items",) if name == "rag" else ()))
        if missing := [f"--{flag}" for flag in wanted if not given[flag]]:
            raise ConfigError(f"condition {name} needs {', '.join(missing)}")


def _embedder(embedder: str | Path | Embedder) -> Embedder:
    if not isinstance(embedder, str | Path):
        return embedder
    from jaxmem.retrieval.clip_embedder import ClipEmbedder

    return ClipEmbedder(embedder)  # pyrefly: ignore
