"""VisMem (arXiv 2511.11007): a backbone that calls for short and long latent memories while it generates.

The vocabulary has four more tokens. When the model emits <ms_I> or <ml_I>, hidden states of the images and of the text
since the last memory become queries, the decoder itself with one of two adapters forms N vectors of them, these are
read behind the invocation, <ms_E> or <ml_E> follows by itself, and the next token is drawn from its state.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs, max_new_tokens=256)      # calls for memories where it wants to
    model.use_memory = False                          # the backbone alone

With the memory, logits have the columns of the tokenizer's V tokens and of the four control tokens behind them, so that
a column is a token: rows of the backbone's tables that stand for no token are left out. Those tables stay as they are;
the control tokens' rows are tensors of the memory. Without it, logits are the backbone's.

Letters: B rows of a batch, T tokens, Y visual and Z text states, N vectors of a memory, D model width.
"""

import contextlib
import dataclasses
import functools
import inspect
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig
from .ports_jaxmem import rms_normalise, visual_tokens
from .vismem_layers import KINDS, VisMem

CACHE = "cache" if "cache" in inspect.signature(Backbone.forward).parameters else "past_key_values"
"""What the release of transformers calls the cache of keys and values."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """When a continuation may call for a memory; see `generate`."""

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
      sequences: [B, T + most new tokens] prompts and answers with their control tokens, padded on the right. The
        vectors of memories are no tokens and not among them.
      memories: per row a list of the memories [N, D] that were inserted, in order.
    """

    sequences: torch.LongTensor = None
    memories: list = None


@dataclasses.dataclass
class Continuation:
    """One answer while it is generated.

    Attributes:
      ids: prompt and answer so far.
      visual: [Y, D] states of its images.
      text: states [D] since the last memory.
      slots: places taken: tokens, and vectors of memories.
      invoked: invocations so far.
      gap: ordinary tokens since the last memory; None before the first.
      memories: what was inserted.
      going: is it not finished?
    """

    ids: torch.LongTensor
    visual: torch.Tensor
    text: list
    slots: int = 0
    invoked: int = 0
    gap: int | None = None
    memories: list = dataclasses.field(default_factory=list)
    going: bool = True


class Reader:
    """The decoder behind prompts that it has read: rows go on at places of their own, in one cache.

    Attributes:
      mask: [B, S] which slots of the cache hold something.
      place: [B] rotary position of the next token, equal on all axes.
    """

    def __init__(self, decoder, cache, mask, place):
        self.decoder, self.cache, self.mask, self.place = decoder, cache, mask, place

    def __call__(self, x, used):
        """Reads embeddings x [B, T, D], in each row as many as are `used` [B, T], from the first on: states [B, T, D]."""
        self.mask = torch.cat([self.mask, used.to(self.mask)], dim=1)
        places = self.place[:, None] + (used.long().cumsum(1) - 1).clamp(min=0)
        given = {"attention_mask": self.mask, "position_ids": places, CACHE: self.cache}
        out = self.decoder(inputs_embeds=x, use_cache=True, **given)
        self.place = self.place + used.sum(1)
        return out.last_hidden_state


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with a VisMem.

    Attributes:
      use_memory: False leaves exactly the backbone, which knows no control tokens.
    """

    config_class = JaxMemConfig
    use_memory = True
    _can_compile_fullgraph = False  # how long an answer's cache becomes depends on what it calls for

    def __init__(self, config):
        super().__init__(config)
        self.settings = settings = SimpleNamespace(**config.jaxmem["memory"])
        self.invocations = [settings.vocab, settings.vocab + 2]
        self.ends = [settings.vocab + 1, settings.vocab + 3]
        self.memory = VisMem(settings, self._decoder)
        self.rules, self._control = Rules(), None
        self._decoder.embed_tokens.register_forward_pre_hook(self._hide_control)
        self._decoder.embed_tokens.register_forward_hook(self._embed_control)
        self.lm_head.register_forward_hook(self._score_control)
        self.loss_function = functools.partial(_loss, self.loss_function)
        self.post_init()

    @property
    def _decoder(self):
        return self.model.language_model

    # ------------------------------------------------------------------------------------------ the control tokens

    def _hide_control(self, table, args):
        """In front of the backbone's table, which has no rows of control tokens."""
        self._control = None
        if self.use_memory:
            control = args[0] - self.settings.vocab
            hidden = (control >= 0) & (control < 4)
            self._control = control.masked_fill(~hidden, -1)
            return (args[0].masked_fill(hidden, 0), *args[1:])

    def _embed_control(self, table, args, out):
        control, self._control = self._control, None
        if control is None:
            return out
        rows = self.memory.embeddings().to(out)
        return torch.where(control[..., None].to(out.device) >= 0, rows[control.clamp(min=0).to(out.device)], out)

    def _score_control(self, head, args, out):
        """[..., rows of the backbone] -> [..., V + 4]."""
        if not self.use_memory:
            return out
        scores = nn.functional.linear(args[0], self.memory.unembeddings().to(args[0]))
        bias = self.settings.invoke_bias * torch.tensor([1.0, 0.0, 1.0, 0.0])
        return torch.cat([out[..., : self.settings.vocab], scores.to(out) + bias.to(out)], dim=-1)

    # ------------------------------------------------------------------------------------------------ the memories

    def form(self, kind, visual, text):
        """A memory (equations 4 to 6).

        Args:
          kind: "short" or "long".
          visual: [Y, D] states of the images; Y may be 0.
          text: [Z, D] states of the text since the last memory.

        Returns:
          [N, D].
        """
        hidden = torch.cat([visual, text.to(visual)])
        parts = [hidden, self.memory.query_builder(hidden), self.memory.slots(kind).to(hidden)]
        x = torch.cat(parts)[None]
        with self.memory.adapter(kind):
            places = torch.arange(x.shape[1], device=x.device)[None]
            out = self._decoder(inputs_embeds=x, position_ids=places, use_cache=False).last_hidden_state
        memory = out[0, -len(parts[-1]) :]
        if self.memory.out_scale is None:
            return memory
        scale = self.memory.out_scale.to(memory)
        return rms_normalise(memory, self.config.get_text_config().rms_norm_eps).to(memory.dtype) * scale

    def _visual_states(self, tokens, visual, mask, states):
        """Of every row [Y, D]: its images with the tokens around them, of all images or of the first.

        Args:
          tokens: [B, T].
          visual: [B, T] which of them show images; None in a call without any.
          mask: [B, T].
          states: [B, T, D].
        """
        if visual is None:
            return [states[0, :0]] * len(tokens)
        end = tokens == self.settings.vision_end
        inside = (visual | (tokens == self.settings.vision_start) | end) & mask.bool()
        if self.settings.visual_spans == "first":
            inside = inside & (end.cumsum(1) - end.long() == 0)
        return [row[here.to(row.device)][self._strided(int(here.sum()))] for row, here in zip(states, inside)]

    def _strided(self, count):
        """Which of so many visual states are kept: all, or at a uniform stride as many as there is room for."""
        settings = self.settings
        room = settings.builder_length - settings.text_cap - settings.queries
        if count <= room:
            return slice(None)
        if settings.overflow == "error":
            raise ValueError(f"{count} visual states, and memories are formed of at most {room}; show smaller images")
        warnings.warn(f"{count} visual states, and memories are formed of {room}: they are taken at a uniform stride")
        return torch.arange(room) * count // room

    # ------------------------------------------------------------------------------------------------- generation

    def generate(self, *args, max_invocations=5, min_gap=1, disabled=(), disabled_mode="skip", **kwargs):
        """As the backbone's, greedily or by sampling, with memories.

        `max_new_tokens` counts places in the context: tokens, and the vectors of memories, which are not returned.
        Batches share one cache; memories are formed row by row.

        Args:
          args, kwargs: transformers' own. Beam search, assisted generation and a cache that holds something are refused.
          max_invocations: per answer.
          min_gap: ordinary tokens between the end of a memory and the next invocation.
          disabled: types ("short", "long") that are switched off.
          disabled_mode: "skip": their invocations stay, nothing follows; "mask": they cannot be called for.

        Returns:
          [B, T + most new tokens] token ids, or `Answers` with `return_dict_in_generate`.
        """
        self.rules = Rules(max_invocations, min_gap, tuple(disabled), disabled_mode)
        return super().generate(*args, **kwargs)

    def _beam_search(self, *args, **kwargs):
        return self._refused("beam search") if self.use_memory else super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        return self._refused("assisted generation") if self.use_memory else super()._assisted_decoding(*args, **kwargs)

    def _refused(self, what):
        raise ValueError(f"VisMem has no {what}: generate greedily or by sampling, or set model.use_memory = False")

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """The loop that transformers' `generate` calls when everything else is prepared."""
        if not self.use_memory:
            given = logits_processor, stopping_criteria, generation_config, synced_gpus, streamer
            return super()._sample(input_ids, *given, **model_kwargs)
        limit = generation_config.max_length - input_ids.shape[1]
        rows, reader, hidden = self._begin(input_ids, model_kwargs)
        while True:
            for row, scores in zip(rows, self.lm_head(hidden).float()):
                if row.going:
                    scores = logits_processor(row.ids[None], self._permitted(row, scores, limit)[None])[0]
                    self._take(row, _draw(scores, generation_config.do_sample))
                    row.going = row.slots < limit and not bool(stopping_criteria(row.ids[None], None))
            _stream(streamer, rows)
            if not any(row.going for row in rows):
                break
            hidden = self._read_last(rows, reader)
            calling = {at: kind for at, row in enumerate(rows) if row.going and (kind := self._called(row))}
            if calling:
                hidden = self._insert(rows, calling, reader, hidden)
                _stream(streamer, [rows[at] for at in calling])
        if streamer is not None:
            streamer.end()
        pad = generation_config._pad_token_tensor
        sequences = [row.ids for row in rows]
        sequences = nn.utils.rnn.pad_sequence(sequences, True, 0 if pad is None else int(pad))
        kept = [row.memories for row in rows]
        return Answers(sequences, kept) if generation_config.return_dict_in_generate else sequences

    def _begin(self, input_ids, model_kwargs):
        """Reads the prompts: their continuations, a Reader behind them, and their last states [B, D]."""
        cache = model_kwargs.pop(CACHE, None)
        if cache is not None and cache.get_seq_length():
            raise ValueError("VisMem reads a prompt from its first token on: give no cache that holds something")
        inputs = self.prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=True,
            **{CACHE: DynamicCache(config=self.config.get_text_config())},
            **(model_kwargs | {"use_cache": True, "logits_to_keep": 1}),
        )
        with _watched(self._decoder) as seen:
            self(**inputs, return_dict=True)
        states, places = seen["states"], seen["position_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        shown = visual_tokens(self.config, (), inputs)
        source = seen["inputs_embeds"] if self.settings.visual_source == "vision_merger" else states
        visual = self._visual_states(input_ids, shown, mask, source)
        rows = [Continuation(ids, image, [state]) for ids, image, state in zip(input_ids, visual, states[:, -1])]
        axes = (places[-3:] if places.dim() == 3 else places[None]) * mask.to(places.device)
        return rows, Reader(self._decoder, inputs[CACHE], mask, axes.amax((0, 2)) + 1), states[:, -1]

    def _permitted(self, row, scores, limit):
        """[V + 4] without end tokens, and without invocations that have no place."""
        scores, rules = scores.clone(), self.rules
        scores[self.ends] = -torch.inf
        allowed = row.invoked < rules.max_invocations and (row.gap is None or row.gap >= rules.min_gap)
        for kind, token in zip(KINDS, self.invocations):
            needed = 2 if rules.skips(kind) else getattr(self.settings, kind) + 2
            if not allowed or rules.masks(kind) or limit - row.slots < needed:
                scores[token] = -torch.inf
        return scores

    def _take(self, row, token):
        """Writes a token down."""
        invokes = int(token) in self.invocations
        row.ids = torch.cat([row.ids, token.to(row.ids)[None]])
        row.slots += 1
        row.invoked += invokes
        row.gap = 0 if invokes else None if row.gap is None else row.gap + 1

    def _read_last(self, rows, reader):
        """Reads every row's last token: states [B, D]."""
        last = torch.stack([row.ids[-1] for row in rows])
        going = torch.tensor([row.going for row in rows], device=last.device)
        hidden = reader(self._decoder.embed_tokens(last.masked_fill(~going, 0)[:, None]), going[:, None])[:, -1]
        for row, state in zip(rows, hidden):
            row.text.append(state)
        return hidden

    def _called(self, row):
        """The memory type that a row's last token calls for, or None."""
        kinds = dict(zip(self.invocations, KINDS))
        kind = kinds.get(int(row.ids[-1]))
        return None if kind is None or self.rules.skips(kind) else kind

    def _insert(self, rows, calling, reader, hidden):
        """Forms the memories of the rows that are `calling` {row: type} and reads them: the states [B, D] behind."""
        longest = max(getattr(self.settings, kind) for kind in calling.values()) + 1
        block = hidden.new_zeros(len(rows), longest, hidden.shape[-1])
        used = torch.zeros(len(rows), longest, dtype=torch.bool, device=hidden.device)
        ends = self.memory.embeddings()[1::2]
        for at, kind in calling.items():
            text = torch.stack(rows[at].text[-self.settings.text_cap :])
            memory = self.form(kind, rows[at].visual, text)
            rows[at].memories.append(memory)
            whole = torch.cat([memory, ends[KINDS.index(kind)][None].to(memory)])
            block[at, : len(whole)], used[at, : len(whole)] = whole, True
        states, hidden = reader(block, used), hidden.clone()
        for at, kind in calling.items():
            row, size = rows[at], getattr(self.settings, kind)
            hidden[at] = states[at, size]
            row.text, row.slots = [hidden[at]], row.slots + size + 1
            row.ids = torch.cat([row.ids, row.ids.new_tensor([self.ends[KINDS.index(kind)]])])
        return hidden


def _draw(scores, sampled):
    """A token of scores [V + 4]."""
    return torch.multinomial(scores.softmax(-1), 1)[0] if sampled else scores.argmax(-1)


def _stream(streamer, rows):
    """The latest tokens."""
    if streamer is not None:
        streamer.put(torch.stack([row.ids[-1] for row in rows]).cpu())


def _loss(own, logits, labels, vocab_size, **kwargs):
    """The backbone's loss, over as many columns as there are."""
    return own(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)


@contextlib.contextmanager
def _watched(decoder):
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
