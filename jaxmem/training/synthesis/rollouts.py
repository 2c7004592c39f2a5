"""The model answers behind the items (vanilla RAG), batch by batch, and its replies are judged and written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.api import Model
from jaxmem.data import knowledge
from jaxmem.data.items import ItemFile
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.prompts import messages
from jaxmem.sampling import keys
from jaxmem.training.synthesis import finding
from jaxmem.training.synthesis.choosing import Asked
from jaxmem.training.synthesis.journal import Journal
from jaxmem.training.synthesis.settings import SynthesisConfig

ROLLOUTS = "rollouts.jsonl"
Request = tuple[Asked, int]
Report = Callable[[str, int, int], None]


def replies(
    folder: Path,
    config: SynthesisConfig,
    asked: Sequence[Asked],
    rows: Mapping[str, Mapping[str, Any]],
    model: Callable[[], Model],
    report: Report,
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What `rollouts.jsonl` says of every reply by (key, sample), once all are there.

    A line is {"key", "sample", "reply", "stopped", "answer", "score"}. Batches are the same however often the process
    dies: one of which a reply is missing is generated again as a whole. Random keys follow from seed, question and
    sample alone.

    Raises:
      DataError: a question or an item that changed, or a reply to another question in the file.
      ConfigError: the scorer has no such metric.
    """
    journal = Journal(folder / ROLLOUTS, ("key", "sample"))
    wanted = [(one, sample) for one in asked for sample in range(config.rollout.samples)]
    if odd := journal.rows.keys() - {(one.key, sample) for one, sample in wanted}:
        raise DataError(f"{journal.path}: has a reply to {min(odd)}, which was not asked; remove the file")
    items, loaded = ItemFile(config.retrieval.items), None
    for batch in _batches(wanted, config.rollout.batch_size):
        missing = [at for at, (one, sample) in enumerate(batch) if (one.key, sample) not in journal.rows]
        if missing:
            loaded = loaded or model()
            said = _generate(config, loaded, batch, rows, items)
            journal.add([said[at] for at in missing])
            report("replies", len(journal.rows), len(wanted))
    return journal.rows


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _generate(
    config: SynthesisConfig,
    model: Model,
    batch: Sequence[Request],
    rows: Mapping[str, Mapping[str, Any]],
    items: ItemFile,
) -> list[dict[str, Any]]:
    """The lines of a batch; the last one is filled up, so that one program serves."""
    filled = [*batch, *[batch[-1]] * (config.rollout.batch_size - len(batch))]
    chats = {one.key: _chat(config, one, rows[one.key], items) for one, _ in batch}
    found = model.generate(
        [chats[one.key] for one, _ in filled],
        key=keys.named(config.seed, [f"{one.key}#{sample}" for one, sample in filled]),
        buckets=config.rollout.buckets,
        **config.rollout.decode,
    )
    return [
        {"key": one.key, "sample": sample, "reply": reply.text, "stopped": reply.stopped}
        | _judged(config, one, reply.text)
        for (one, sample), reply in zip(batch, found, strict=False)
    ]


def _chat(config: SynthesisConfig, one: Asked, row: Mapping[str, Any], items: ItemFile) -> list[Any]:
    """The question behind its items as text and images."""
    finding.check(one, row)
    known = [config.looks.item(item) for item in finding.items_of(row, items)]
    return knowledge.in_prompt(messages(config.looks.question(one.question), one.template), known, one.key)


def _judged(config: SynthesisConfig, one: Asked, reply: str) -> dict[str, Any]:
    judged = one.score(one.question, reply)
    if config.judge.metric not in judged.metrics:
        raise ConfigError(
            f"judge.metric {config.judge.metric!r} is none of the scores of {one.source}: {', '.join(judged.metrics)}"
        )
    return {"answer": judged.answer, "score": judged.metrics[config.judge.metric]}


def kept(
    config: SynthesisConfig, asked: Sequence[Asked], said: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> dict[str, str]:
    """The first right reply of every question that has one, by key. A reply that was cut off is never kept."""
    found: dict[str, str] = {}
    for one in asked:
        for sample in range(config.rollout.samples):
            row = said[one.key, sample]
            if row["stopped"] and row["score"] >= config.judge.threshold:
                found[one.key] = row["reply"]
                break
    return found
