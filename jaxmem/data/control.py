"""Control tokens of VisMem and a tokenizer: what they are called, who must not know them, and what delimiters are.

While jaxmem runs, the tokenizer does not know the control tokens: text that spells one is plain text, and only the
policy, or a forced invocation, can call for a memory. `with_control_tokens` makes the tokenizer that an exported
checkpoint carries.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

from jaxmem.errors import ConfigError
from jaxmem.memory.vismem import CONTROL, VisMemConfig

DELIMITERS = (",", ".", "\n")
"""Of MemGen, whose protocol of random invocation VisMem cites."""


def settings_for(tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a new VisMem with `vocab` and `row_id` of a tokenizer; what is given stays.

    Raises:
      ConfigError: the tokenizer has one of the control tokens, or not the one that rows are copied from.
    """
    _refuse(tokenizer)
    official = settings.get("preset") == "official"
    token = settings.get("row_token", "<|im_end|>" if official else ".")
    id_ = tokenizer.get_vocab().get(token)
    if token is None:
        return {"vocab": len(tokenizer), **settings}
    if id_ is None:
        raise ConfigError(
            f"vismem.row_token: {token!r} is no token of the tokenizer; name one whose rows may be copied"
        )
    return {"vocab": len(tokenizer), "row_id": int(id_), **settings}


def check(tokenizer: Any, config: VisMemConfig) -> None:
    """Raises ConfigError unless a stored VisMem's control tokens stand right behind this tokenizer's."""
    _refuse(tokenizer)
    if len(tokenizer) != config.vocab:
        raise ConfigError(
            f"the memory's control tokens {', '.join(CONTROL)} have the ids {config.vocab} to {config.vocab + 3}, but "
            f"this tokenizer has {len(tokenizer)} tokens; load the backbone that the memory was trained on"
        )


def _refuse(tokenizer: Any) -> None:
    vocab = tokenizer.get_vocab()
    if there := [f"{token} (id {vocab[token]})" for token in CONTROL if token in vocab]:
        raise ConfigError(
            f"the tokenizer has the control tokens {', '.join(there)} already: it was exported with a VisMem folded "
            "into its vocabulary; load the original backbone and restore the memory onto it"
        )


def with_control_tokens(tokenizer: Any) -> Any:
    """A copy of the tokenizer with the four control tokens as special tokens, behind its last one.

    Other additional special tokens stay.
    """
    longer = copy.deepcopy(tokenizer)
    from transformers import AddedToken  # heavy: only when a tokenizer is exported

    longer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL], special_tokens=True)
    return longer


def without_control_tokens(tokenizer: Any) -> Any:
    """The tokenizer that `with_control_tokens` made longer; any other as it is."""
    if not set(CONTROL) <= set(tokenizer.get_vocab()):
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in CONTROL]
    shorter = copy.deepcopy(tokenizer)
    shorter._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return shorter


def control_ids(tokenizer: Any) -> dict[str, int]:
    """{control token: id} of an extended tokenizer, resolved by their strings.

    Raises ConfigError for a tokenizer that lacks one.
    """
    vocab = tokenizer.get_vocab()
    if missing := [token for token in CONTROL if token not in vocab]:
        raise ConfigError(f"the tokenizer has no control tokens {', '.join(missing)}; see with_control_tokens")
    return {token: vocab[token] for token in CONTROL}


def delimiter_ids(tokenizer: Any, delimiters: Sequence[str] = DELIMITERS) -> tuple[int, ...]:
    """Ids of all ordinary tokens whose text ends with one of the delimiters."""
    return _delimiter_ids(tokenizer, tuple(delimiters))


@functools.lru_cache(maxsize=8)
def _delimiter_ids(tokenizer: Any, delimiters: tuple[str, ...]) -> tuple[int, ...]:
    special = set(tokenizer.added_tokens_decoder)
    texts = ((id_, tokenizer.decode([id_])) for id_ in range(len(tokenizer)) if id_ not in special)
    return tuple(id_ for id_, text in texts if text.endswith(delimiters))
