"""`jaxmem eval --benchmark=NAME`: a model with and without memory on a knowledge benchmark."""

from __future__ import annotations

import dataclasses
import functools
import json as json_lib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError
from jaxmem.evaluation.knowledge import conditions
from jaxmem.evaluation.knowledge.benchmarks import BENCHMARKS, prepare
from jaxmem.evaluation.knowledge.prompts import Template
from jaxmem.evaluation.knowledge.questions import Source
from jaxmem.evaluation.knowledge.running import Answering, Outcome, evaluate, settings_of
from jaxmem.evaluation.knowledge.summary import Pair, pair


def main(
    *,
    benchmark: str | None,
    questions: Sequence[str],
    annotations: Sequence[str],
    images: str | None,
    subset: str | None,
    model: str | None,
    memory: str | None,
    bank: str | None,
    index: str | None,
    k: int,
    condition: Sequence[str],
    out: str | None,
    limit: int,
    json: bool,
    language: str = "en",
    text_first: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    encoder: str | None = None,
    items: str | None = None,
    embedder: str | None = None,
    query_images: str = "squash",
    decode: str = "greedy",
    max_new_tokens: int = 0,
    dtype: str | None = None,
) -> int:
    """Answers the questions under every condition, and prints the scores side by side.

    Args:
      benchmark: a name in `benchmarks.BENCHMARKS`.
      questions: its question files.
      annotations: files that belong to them: InfoSeek's types, OK-VQA's answers, OVEN's titles.
      images: the folder of the images; None is that of the first question file.
      subset: a file with the ids to ask.
      model, memory, bank, index: what answers, for `answering.build`.
      k: items per question.
      condition: names in `conditions.CONDITIONS`; () is "none", and "memory" and "shuffled" where a memory is given.
      out: folder of the result files; running the same command again asks what they lack.
      limit: the first so many questions; 0 asks all.
      json: print one JSON object and nothing else.
      language: of InfoSeek's translated files.
      text_first: put the words before the image.
      batch_size: questions that are answered together.
      seed: of the shuffling, and of sampling.
      encoder, items, embedder, query_images, decode, max_new_tokens, dtype: for `answering.build`.

    Returns:
      0.

    Raises:
      ConfigError: flags are missing or do not fit; or the result files have other settings.
      DataError: files do not fit; see `benchmarks.prepare` and `running.evaluate`.
    """
    name, folder = _given(benchmark, "benchmark"), Path(_given(out, "out"))
    names = _conditions(condition, memory, bank, k)
    files = _source(questions, annotations, images, subset, limit, language)
    asked, score = prepare(name, files)
    for one in names:  # before a model is loaded
        conditions.assign(asked.questions, one, seed)
    from jaxmem.evaluation.knowledge.answering import build

    answering: Answering = build(
        questions=asked.questions,
        model=model,
        memory=memory,
        bank=bank,
        index=index,
        k=k,
        conditions=names,
        encoder=encoder,
        items=items,
        embedder=embedder,
        query_images=query_images,
        decode=decode,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
    )
    outcomes = {}
    for one in names:
        template = Template(BENCHMARKS[name].style, given=one != "none", text_first=text_first)
        settings = settings_of(asked, one, template, k, answering.facts(one), seed)
        answer = functools.partial(answering.answer, condition=one, template=template)
        outcomes[one] = evaluate(asked, answer, settings, folder, score, batch_size, functools.partial(_report, one))
    print(json_lib.dumps(as_json(name, outcomes), ensure_ascii=False) if json else as_text(name, outcomes))
    return 0


def _given(value: str | None, flag: str) -> str:
    if not value:
        known = f" of {', '.join(BENCHMARKS)}" if flag == "benchmark" else ""
        raise ConfigError(f"eval needs --{flag}{known}")
    return value


def _source(
    questions: Sequence[str],
    annotations: Sequence[str],
    images: str | None,
    subset: str | None,
    limit: int,
    language: str,
) -> Source:
    if not questions:
        raise ConfigError("eval needs --questions=FILE, once or more")
    optional = lambda path: None if path is None else Path(path)  # noqa: E731
    files, extra = tuple(map(Path, questions)), tuple(map(Path, annotations))
    return Source(files, extra, optional(images), optional(subset), limit, language)


def _conditions(wanted: Sequence[str], memory: str | None, bank: str | None, k: int) -> tuple[str, ...]:
    """The conditions to run, each with what it needs; whether an index is needed, `answering.build` knows."""
    names = tuple(dict.fromkeys(wanted)) or (("none", "memory", "shuffled") if memory else ("none",))
    for name in names:
        if name not in conditions.CONDITIONS:
            raise ConfigError(f"unknown condition {name!r}; there are {', '.join(conditions.CONDITIONS)}")
        needed = {"memory": memory} if name in ("memory", "shuffled") else {}
        needed |= {} if name == "none" else {"bank": bank}
        if missing := [f"--{flag}" for flag, value in needed.items() if not value]:
            raise ConfigError(f"condition {name} needs {', '.join(missing)}")
        if name != "none" and k < 1:
            raise ConfigError(f"condition {name} needs --k of at least 1, got {k}")
    return names


def _report(condition: str, done: int, total: int) -> None:
    """Progress, on standard error."""
    print(f"{condition}: {done} of {total} answered", file=sys.stderr, flush=True)


def as_json(benchmark: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """{"benchmark", "conditions": {name: {"path", "asked", "summary"}}, "pairs": {"memory - none": {metric: ...}}}."""
    found = {
        name: {"path": str(one.path), "asked": one.asked, "summary": one.summary} for name, one in outcomes.items()
    }
    apart = {
        label: {
            metric: {split: dataclasses.asdict(one) for split, one in splits.items()} for metric, splits in by.items()
        }
        for label, by in pairs(outcomes).items()
    }
    return {"benchmark": benchmark, "conditions": found, "pairs": apart}


def pairs(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, dict[str, Pair]]]:
    """Every later condition minus every earlier one, by metric and split."""
    names = list(outcomes)
    found = {}
    for at, first in enumerate(names):
        for second in names[:at]:
            metrics = outcomes[first].summary["metrics"]
            rows = (outcomes[first].rows, outcomes[second].rows)
            found[f"{first} - {second}"] = {metric: pair(*rows, metric) for metric in metrics}
    return found


def as_text(benchmark: str, outcomes: Mapping[str, Outcome]) -> str:
    """One table per metric: a line per split with its questions, a column per condition, and paired differences."""
    first = next(iter(outcomes.values()))
    lines = [f"{benchmark}: {first.summary['questions']} questions"]
    apart = pairs(outcomes)
    for metric in first.summary["metrics"]:
        lines += ["", *_table(metric, outcomes, {label: by[metric] for label, by in apart.items()})]
    lines.append("")
    for name, one in outcomes.items():
        flags = "".join(f", {count} {flag}" for flag, count in one.summary["flags"].items())
        lines.append(f"{name}: {one.summary['unanswered']} without an answer{flags}; {one.path}")
    notes = dict.fromkeys(note for one in outcomes.values() for note in one.summary["notes"])
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _table(metric: str, outcomes: Mapping[str, Outcome], apart: Mapping[str, Mapping[str, Pair]]) -> list[str]:
    sizes = next(iter(outcomes.values())).summary["split_sizes"]
    scores = [one.summary["metrics"][metric] for one in outcomes.values()]
    lines = [f"{metric:22s}{'questions':>10s}" + "".join(f"{name:>10s}" for name in outcomes) + _heads(apart)]
    for split, size in [*sizes.items(), ("all", sum(sizes.values()))]:
        values = [one["all"] if split == "all" else one["splits"][split] for one in scores]
        gaps = "".join(f"{_gap(splits[split]):>26s}" for splits in apart.values())
        lines.append(f"{split:22s}{size:10d}" + "".join(f"{value:10.2f}" for value in values) + gaps)
    finals = ["–" if one["final"] is None else f"{one['final']:.2f}" for one in scores]
    return [*lines, f"{'final':22s}{'':10s}" + "".join(f"{final:>10s}" for final in finals)]


def _heads(apart: Mapping[str, Any]) -> str:
    return "".join(f"{label:>26s}" for label in apart)


def _gap(one: Pair) -> str:
    """Difference, its error, and how many questions got better and worse."""
    error = "" if one.error is None else f" ± {one.error:.2f}"
    return f"{one.difference:+.2f}{error} (+{one.better} -{one.worse})"
