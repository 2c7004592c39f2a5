"""The steps in turn: choose questions, find items, answer behind them, keep what is right, translate, write.

Every step leaves a file, so that running the same again goes on where it stopped, and the folder of a run that died
equals, byte for byte, that of one that did not.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.api import Model
from jaxmem.errors import DataError
from jaxmem.retrieval import files
from jaxmem.retrieval.index import Embedder
from jaxmem.training.synthesis import choosing, finding, manifest, rollouts, translating, writing
from jaxmem.training.synthesis.choosing import Asked
from jaxmem.training.synthesis.rollouts import Report
from jaxmem.training.synthesis.settings import SynthesisConfig


def synthesise(
    config: SynthesisConfig,
    *,
    model: Model | None = None,
    embedder: Embedder | None = None,
    report: Report = lambda step, done, total: None,
) -> dict[str, Any]:
    """Makes the training data, or goes on with it.

    Args:
      config: the synthesis.
      model: answers instead of the folder `rollout.model`, whose fingerprint the manifest has nevertheless.
      embedder: likewise instead of `retrieval.embedder`.
      report: told (step, done, all).

    Returns:
      The manifest (see `manifest.header`), with counts by source and the checksums of the results.

    Raises:
      ConfigError: the folder was begun with other inputs or settings.
      DataError: inputs that do not fit or changed, no reply that is right, a full disk.
    """
    folder = Path(config.output)
    with files.locked(folder):
        asked, mixture = choosing.choose(config)
        begun = manifest.opened(folder, manifest.header(config, asked, mixture))
        if begun["finished"]:
            manifest.check_outputs(folder, begun)
            return begun
        files.clear(folder, ("*",))
        rows = finding.found(folder, config.retrieval, asked, lambda: embedder or _embedder(config))
        said = rollouts.replies(folder, config, asked, rows, lambda: model or _model(config), report)
        kept = rollouts.kept(config, asked, said)
        if not kept:
            raise DataError(_nothing(folder, said))
        translations = translating.translated(folder, config, asked, kept, report)
        written = writing.write(folder, config, asked, rows, kept, translations)
        counts = _counts(config, asked, rows, said, translations, written)
        outputs = [finding.QUESTIONS, rollouts.ROLLOUTS, *([translating.TRANSLATIONS] if translations else [])]
        return manifest.finish(folder, begun, counts, [*outputs, writing.TRAIN])


def _model(config: SynthesisConfig) -> Model:
    from jaxmem import api

    return api.load(config.rollout.model or api.TINY, config.rollout.dtype)


def _embedder(config: SynthesisConfig) -> Embedder:
    from jaxmem.retrieval.clip_embedder import ClipEmbedder

    return ClipEmbedder(config.retrieval.embedder)  # pyrefly: ignore


def _nothing(folder: Path, said: Mapping[Any, Mapping[str, Any]]) -> str:
    cut = sum(not row["stopped"] for row in said.values())
    return (
        f"none of {len(said)} replies can be kept: {cut} were cut off, the others are wrong; read "
        f"{folder / rollouts.ROLLOUTS}, and take a larger max_new_tokens, another model, or a lower judge.threshold"
    )


def _counts(
    config: SynthesisConfig,
    asked: Sequence[Asked],
    rows: Mapping[str, Mapping[str, Any]],
    said: Mapping[tuple[Any, ...], Mapping[str, Any]],
    translations: Mapping[tuple[Any, ...], Mapping[str, Any]],
    written: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, int]]:
    """What every step did, by source."""
    source = {one.key: one.source for one in asked}
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in config.sources}
    for one in asked:
        row = rows[one.key]
        fewer = len(row["items"]) < config.retrieval.k
        found[one.source].update(
            questions=1, items=len(row["items"]), items_lost=len(row["lost"]), questions_with_fewer_items=int(fewer)
        )
    for row in said.values():
        right = row["score"] >= config.judge.threshold
        found[source[row["key"]]].update(
            replies=1,
            right=int(right),
            cut_off=int(not row["stopped"]),
            right_but_cut_off=int(right and not row["stopped"]),
        )
    for row in translations.values():
        found[source[row["key"]]]["translations"] += 1
    names = ("questions", "items", "items_lost", "questions_with_fewer_items", "replies", "right", "cut_off")
    names += ("right_but_cut_off", "translations")
    return {
        name: {key: counter[key] for key in names}
        | dict(written[name])
        | {"translations_without_box": counter["translations"] - written[name]["translated"]}
        for name, counter in found.items()
    }
