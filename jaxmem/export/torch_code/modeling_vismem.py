"""VisMem (arXiv 2511.11007): a backbone that calls for short and long latent memories while it generates.

The vocabulary has four more tokens. When the model emits <ms_I> or <ml_I>, hidden states of the images and of the text
since the last memory become queries, the decoder itself with one of two adapters forms N vectors of them, these are
read behind the invocation, <ms_E> or <ml_E> follows by itself, and the next token is drawn from its state.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs, max_new_tokens=256)      # calls for memories where it wants to
    model.use_memory = False                          # the backbone alone

With the memory, `forward` returns logits of the tokenizer's V tokens and of the four control tokens behind them, so
that a column is a token: [B, T, V + 4]. Rows of the backbone's tables that stand for no token are left out. Those
tables stay as they are, the control tokens' rows are tensors of the memory. `forward` inserts nothing: control tokens
among `input_ids` are embedded, vectors are `generate`'s. Without the memory, logits are the backbone's.

Letters: B rows of a batch, T tokens, Y visual and Z text states, N vectors of a memory, D model width.
"""

import functools
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from transformers import DynamicCache

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig
from .ports_jaxmem import rms_normalise, visual_tokens
from .vismem_decoding import CACHE, Answers, Continuation, Reader, Rules, draw, stream, watched
from .vismem_layers import KINDS, VisMem


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with a VisMem.

    Attributes:
      use_memory: False leaves exactly the backbone, which knows no control tokens.
      settings: of the memory; `size`, `invocation` and `end` are by its types, "short" and "long".
    """

    config_class = JaxMemConfig
    use_memory = True
    _can_compile_fullgraph = False  # how long an answer's cache becomes depends on what it calls for

    def __init__(self, config):
        super().__init__(config)
        self.settings = settings = SimpleNamespace(**config.jaxmem["memory"])
        settings.size = {"short": settings.short, "long": settings.long}
        settings.invocation = {"short": settings.vocab, "long": settings.vocab + 2}
        settings.end = {"short": settings.vocab + 1, "long": settings.vocab + 3}
        self.memory = VisMem(settings, self._decoder)
        self._rules, self._control = Rules(), None
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
        if not self.use_memory:
            return None
        control = args[0] - self.settings.vocab
        hidden = (control >= 0) & (control < 4)
        self._control = control.masked_fill(~hidden, -1)
        return (args[0].masked_fill(hidden, 0), *args[1:])

    def _embed_control(self, table, args, out):
        """Behind it: their rows."""
        control, self._control = self._control, None
        if control is None:
            return out
        control, rows = control.to(out.device), self.memory.embeddings().to(out)
        return torch.where(control[..., None] >= 0, rows[control.clamp(min=0)], out)

    def _score_control(self, head, args, out):
        """Behind the head: [..., rows of the backbone] -> [..., V + 4]."""
        if not self.use_memory:
            return out
        scores = nn.functional.linear(args[0], self.memory.unembeddings().to(args[0])).to(out)
        bias = self.settings.invoke_bias * scores.new_tensor([1, 0, 1, 0])
        return torch.cat([out[..., : self.settings.vocab], scores + bias], dim=-1)

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
        slots = self.memory.slots(kind).to(hidden)
        x = torch.cat([hidden, self.memory.query_builder(hidden), slots])[None]
        places = torch.arange(x.shape[1], device=x.device)[None]
        with self.memory.adapter(kind):
            out = self._decoder(inputs_embeds=x, position_ids=places, use_cache=False).last_hidden_state
        memory = out[0, -len(slots) :]
        if self.memory.out_scale is None:
            return memory
        even = rms_normalise(memory, self.config.get_text_config().rms_norm_eps).to(memory.dtype)
        return even * self.memory.out_scale.to(memory)

    def _visual_states(self, tokens, shown, mask, states):
        """Of every row [Y, D]: its images with the tokens around them, of all images or of the first.

        Args:
          tokens: [B, T].
          shown: [B, T] which of them stand for images; None in a call without any.
          mask: [B, T].
          states: [B, T, D].
        """
        if shown is None:
            return [states[0, :0]] * len(tokens)
        end = tokens == self.settings.vision_end
        inside = (shown | (tokens == self.settings.vision_start) | end) & mask.bool()
        if self.settings.visual_spans == "first":
            inside = inside & (end.cumsum(1) - end.long() == 0)
        return [row[here.to(row.device)][self._kept(int(here.sum()))] for row, here in zip(states, inside, strict=True)]

    def _kept(self, count):
        """Which of so many visual states: all, or at a uniform stride as many as there is room for."""
        settings = self.settings
        room = settings.builder_length - settings.text_cap - settings.queries
        if count <= room:
            return slice(None)
        if settings.overflow == "error":
            raise ValueError(f"{count} visual states, and memories are formed of at most {room}; show smaller images")
        told = f"{count} visual states, and memories are formed of {room}: they are taken at a uniform stride"
        warnings.warn(told, stacklevel=2)
        return torch.arange(room) * count // room

    # ------------------------------------------------------------------------------------------------- generation

    def generate(self, *args, max_invocations=5, min_gap=1, disabled=(), disabled_mode="skip", **kwargs):
        """As the backbone's, greedily or by sampling, with memories.

        `max_new_tokens` counts places in the context: tokens, and the vectors of memories, which are not returned.
        The rows of a batch share one cache; their memories are formed one by one.

        Args:
          args, kwargs: transformers' own. Beam search, assisted generation and a cache that holds something are
            refused.
          max_invocations: per answer.
          min_gap: ordinary tokens between the end of a memory and the next invocation.
          disabled: types ("short", "long") that are switched off.
          disabled_mode: "skip": their invocations stay, nothing follows; "mask": they cannot be called for.

        Returns:
          [B, T + most new tokens] token ids, or `Answers` with `return_dict_in_generate`.
        """
        self._rules = Rules(max_invocations, min_gap, tuple(disabled), disabled_mode)
        return super().generate(*args, **kwargs)

    def _beam_search(self, *args, **kwargs):
        return _refuse("beam search") if self.use_memory else super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        return _refuse("assisted generation") if self.use_memory else super()._assisted_decoding(*args, **kwargs)

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
        rows, reader, hidden = self._begin(input_ids, generation_config, model_kwargs)
        while going := [row for row in rows if row.going]:
            for row, scores in zip(rows, self.lm_head(hidden).float(), strict=True):
                if row.going:
                    scores = logits_processor(row.ids[None], row.permitted(scores)[None])[0]
                    row.take(draw(scores, generation_config.do_sample))
                    row.going = row.going and not bool(stopping_criteria(row.ids[None], None))
            stream(streamer, going)
            if any(row.going for row in rows):
                hidden = self._read_last(rows, reader)
                calling = [row for row in rows if row.called]
                hidden = self._insert(rows, reader, hidden) if calling else hidden
                stream(streamer, calling)
        if streamer is not None:
            streamer.end()
        pad = generation_config._pad_token_tensor
        ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], True, 0 if pad is None else int(pad))
        return Answers(ids, [row.memories for row in rows]) if generation_config.return_dict_in_generate else ids

    def _begin(self, input_ids, generation_config, model_kwargs):
        """Reads the prompts: their continuations, a Reader behind them, and their last states [B, D]."""
        given = model_kwargs.pop(CACHE, None)
        if given is not None and given.get_seq_length():
            raise ValueError("VisMem reads a prompt from its first token on: give no cache that holds something")
        own = {CACHE: DynamicCache(config=self.config.get_text_config()), "use_cache": True, "logits_to_keep": 1}
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **(model_kwargs | own))
        with watched(self._decoder) as seen:
            self(**inputs, return_dict=True)
        states, places, mask = seen["states"], seen["position_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        source = seen["inputs_embeds"] if self.settings.visual_source == "vision_merger" else states
        visual = self._visual_states(input_ids, visual_tokens(self.config, (), inputs), mask, source)
        room = generation_config.max_length - input_ids.shape[1]
        rows = [
            Continuation(self._rules, self.settings, ids, room, image, [state])
            for ids, image, state in zip(input_ids, visual, states[:, -1], strict=True)
        ]
        axes = (places[-3:] if places.dim() == 3 else places[None]) * mask.to(places.device)
        return rows, Reader(self._decoder, own[CACHE], mask, axes.amax((0, 2)) + 1), states[:, -1]

    def _read_last(self, rows, reader):
        """Reads every row's last token: states [B, D]."""
        last = torch.stack([row.ids[-1] for row in rows])
        going = torch.tensor([row.going for row in rows], device=last.device)
        hidden = reader(self._decoder.embed_tokens(last.masked_fill(~going, 0)[:, None]), going[:, None])[:, -1]
        for row, state in zip(rows, hidden, strict=True):
            row.text.append(state)
        return hidden

    def _insert(self, rows, reader, hidden):
        """Forms the memories that rows call for and reads them with their end tokens: the states [B, D] behind."""
        called, ends = {at: row.called for at, row in enumerate(rows) if row.called}, self.memory.embeddings()[1::2]
        longest = 1 + max(self.settings.size[kind] for kind in called.values())
        block = hidden.new_zeros(len(rows), longest, hidden.shape[-1])
        used = torch.zeros(len(rows), longest, dtype=torch.bool, device=hidden.device)
        for at, kind in called.items():
            size, text = self.settings.size[kind], rows[at].text[-self.settings.text_cap :]
            block[at, :size] = self.form(kind, rows[at].visual, torch.stack(text))
            block[at, size], used[at, : size + 1] = ends[KINDS.index(kind)].to(block), True
        states, hidden = reader(block, used), hidden.clone()
        for at, kind in called.items():
            size = self.settings.size[kind]
            hidden[at] = states[at, size]
            rows[at].insert(kind, block[at, :size], hidden[at])
        return hidden


def _refuse(what):
    raise ValueError(f"VisMem has no {what}: generate greedily or by sampling, or set model.use_memory = False")


def _loss(own, logits, labels, vocab_size, **kwargs):
    """The backbone's loss, over as many columns as there are."""
    return own(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
