"""How answers with memories are generated: what is known of each, when it may call for a memory, and their cache.

An answer takes places in its context: its tokens, and the vectors of its memories, which are no tokens.
Letters: B rows of a batch, T tokens, V tokens of the tokenizer, Y visual states, N vectors of a memory, D model width.
"""

import contextlib
import dataclasses
import inspect

import torch
from transformers.utils import ModelOutput

from .backbone_jaxmem import Backbone
from .vismem_layers import KINDS

CACHE = "cache" if "cache" in inspect.signature(Backbone.forward).parameters else "past_key_values"
"""What the release of transformers calls the cache of keys and values."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """When an answer may call for a memory; see `generate`."""

    max_invocations: int = 5
    min_gap: int = 1
    disabled: tuple = ()
    disabled_mode: str = "skip"

    def __post_init__(self):
        if not set(self.disabled) <= set(KINDS):
            raise ValueError(f"disabled {self.disabled} may hold {' and '.join(KINDS)} alone")
        if self.disabled_mode not in ("skip", "mask"):
            raise ValueError(f"disabled_mode {self.disabled_mode!r} is neither 'skip' nor 'mask'")
        if self.max_invocations < 0 or self.min_gap < 0:
            raise ValueError("max_invocations and min_gap must not be negative")

    def skips(self, kind):
        """Does nothing follow this type's invocation?"""
        return kind in self.disabled and self.disabled_mode == "skip"

    def masks(self, kind):
        """Can this type never be called for?"""
        return kind in self.disabled and self.disabled_mode == "mask"


@dataclasses.dataclass
class Answers(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
      sequences: [B, T + most new tokens] prompts and answers with their control tokens, padded on the right.
      memories: per row a list of the memories [N, D] that were inserted, in order.
    """

    sequences: torch.LongTensor = None
    memories: list = None


@dataclasses.dataclass
class Continuation:
    """One answer while it is generated.

    Attributes:
      rules, settings: of generation and of the memory.
      ids: prompt and answer so far.
      room: places that are left.
      visual: [Y, D] states of its images.
      text: states [D] since the last memory; the first is that of the prompt's last token, or of the end token.
      invoked: invocations so far.
      gap: ordinary tokens since the last memory; None before the first.
      memories: what was inserted.
      going: is it not finished?
    """

    rules: Rules
    settings: object
    ids: torch.LongTensor
    room: int
    visual: torch.Tensor
    text: list
    invoked: int = 0
    gap: int | None = None
    memories: list = dataclasses.field(default_factory=list)
    going: bool = True

    def permitted(self, scores):
        """Scores [V + 4] without end tokens, and without invocations that have no place here."""
        scores, rules = scores.clone(), self.rules
        allowed = self.invoked < rules.max_invocations and (self.gap is None or self.gap >= rules.min_gap)
        for kind in KINDS:
            needed = 2 if rules.skips(kind) else self.settings.size[kind] + 2  # the token itself, and the end token
            if not allowed or rules.masks(kind) or self.room < needed:
                scores[self.settings.invocation[kind]] = -torch.inf
            scores[self.settings.end[kind]] = -torch.inf
        return scores

    def take(self, token):
        """Writes a token down that was drawn."""
        invokes = token in self.settings.invocation.values()
        self._write(token, 1)
        self.invoked += invokes
        self.gap = 0 if invokes else None if self.gap is None else self.gap + 1

    def insert(self, kind, memory, state):
        """Writes a memory [N, D] down with its end token, whose state [D] begins the text of the next one."""
        self._write(self.settings.end[kind], len(memory) + 1)
        self.memories.append(memory)
        self.text = [state]

    def _write(self, token, places):
        self.ids = torch.cat([self.ids, self.ids.new_tensor([token])])
        self.room -= places
        self.going = self.room > 0

    @property
    def called(self):
        """The type of the memory that the last token calls for, or None."""
        token = int(self.ids[-1])
        kinds = [kind for kind in KINDS if token == self.settings.invocation[kind] and not self.rules.skips(kind)]
        return kinds[0] if kinds and self.going else None


class Reader:
    """The decoder behind prompts that it has read: rows go on at places of their own, in one cache.

    Attributes:
      mask: [B, S] which slots of the cache hold something.
      place: [B] rotary position of the next token, equal on all axes.
    """

    def __init__(self, decoder, cache, mask, place):
        self.decoder, self.cache, self.mask, self.place = decoder, cache, mask, place

    def __call__(self, x, used):
        """Reads x [B, T, D], in each row as many as are `used` [B, T], from the first on: states [B, T, D]."""
        self.mask = torch.cat([self.mask, used.to(self.mask)], dim=1)
        places = self.place[:, None] + (used.long().cumsum(1) - 1).clamp(min=0)
        given = {"attention_mask": self.mask, "position_ids": places, CACHE: self.cache}
        out = self.decoder(inputs_embeds=x, use_cache=True, **given)
        self.place = self.place + used.sum(1)
        return out.last_hidden_state


@contextlib.contextmanager
def watched(decoder):
    """A dict of what a decoder is called with, and its `states`."""
    seen = {}
    hooks = [
        decoder.register_forward_pre_hook(lambda module, args, inputs: seen.update(inputs), with_kwargs=True),
        decoder.register_forward_hook(lambda module, args, out: seen.update(states=out.last_hidden_state)),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def draw(scores, sampled):
    """A token id of scores [V + 4]."""
    return int(torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax(-1))


def stream(streamer, rows):
    """Hands the latest tokens on."""
    if streamer is not None and rows:
        streamer.put(torch.stack([row.ids[-1] for row in rows]).cpu())
