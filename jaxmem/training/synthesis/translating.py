"""Some samples in other languages, by a function of the user's, each asked for once however often the process dies."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.prompts import prompt
from jaxmem.training.synthesis.choosing import Asked, draw
from jaxmem.training.synthesis.journal import Journal
from jaxmem.training.synthesis.rollouts import Report
from jaxmem.training.synthesis.settings import SynthesisConfig

TRANSLATIONS, BOX = "translations.jsonl", "\\boxed{"
Translate = Callable[[list[str], str], Sequence[str]]


def load(name: str) -> Translate:
    """The function "package.module:function"; ConfigError when there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"translation.function {name!r}: {error}; write package.module:function") from error


def translated(
    folder: Path, config: SynthesisConfig, asked: Sequence[Asked], kept: Mapping[str, str], report: Report
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What `translations.jsonl` says of the chosen samples, by (key, language), once all are there.

    A line is {"key", "language", "texts": [what the user says, what the model answered]}.

    Raises:
      ConfigError: no such function.
      DataError: it returns another number of texts, or something that is no text.
    """
    settings = config.translation
    if not settings.function:
        return {}
    journal = Journal(folder / TRANSLATIONS, ("key", "language"))
    by_key = {one.key: one for one in asked}
    chosen = draw(list(kept), settings.count, config.seed, "translation")
    function: Translate | None = None
    for language in settings.languages:
        for start in range(0, len(chosen), settings.batch):
            names = [key for key in chosen[start : start + settings.batch] if (key, language) not in journal.rows]
            if names:
                function = function or load(settings.function)
                texts = [text for key in names for text in (_said(by_key[key]), kept[key])]
                journal.add(_rows(names, language, _called(function, texts, language, settings.function)))
                report("translations", len(journal.rows), len(chosen) * len(settings.languages))
    return journal.rows


def _said(one: Asked) -> str:
    return prompt(one.question, one.template)


def _called(function: Translate, texts: list[str], language: str, name: str) -> list[str]:
    found = list(function(texts, language))
    if len(found) != len(texts) or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(
            f"{name} made {len(found)} texts of {len(texts)} in {language}, or an empty one; it must return a text "
            "for each"
        )
    return found


def _rows(names: Sequence[str], language: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"key": key, "language": language, "texts": list(texts[2 * at : 2 * at + 2])} for at, key in enumerate(names)
    ]


def lost_box(row: Mapping[str, Any], reply: str) -> bool:
    r"""Did a translation lose the \boxed{...} of the reply? It would teach to answer without."""
    return BOX in reply and BOX not in row["texts"][1]
