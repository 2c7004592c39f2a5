"""What the slots of a continuation hold."""

from __future__ import annotations

import enum
from typing import Any


class Slot(enum.IntEnum):
    """What a slot of a continuation holds, and so whether the policy answers for it: TEXT and INVOKE were sampled."""

    EMPTY = 0
    TEXT = 1
    FORCED = 2  # an invocation token that was put there
    MEMORY = 3
    INVOKE = 4  # an invocation token that the policy chose
    END = 5


def text_tokens(tokens: Any, kinds: Any, length: int) -> list[int]:
    """The text of a continuation [N]: its tokens without memories and the control tokens around them."""
    return [int(tokens[slot]) for slot in range(length) if kinds[slot] == Slot.TEXT]
