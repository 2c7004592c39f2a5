"""CoMEM (arXiv 2505.17670): knowledge items, each an image with text, as a few vectors in front of the prompt.

The backbone with LoRA factors reads an item, and a Q-Former compresses its last hidden states to M vectors. The vectors
of a row's items stand in front of its prompt with the positions 0, 1, 2, ...; the prompt's own positions follow. There
is one copy of the backbone: the factors act while items are read, and the model that answers is the bare backbone.

    known = model.memory_of(processor, [[{"image": "tower.png", "text": "The tower of Pisa leans."}]])
    answer = model.generate(**inputs, **known, max_new_tokens=64)

Vectors do not depend on questions: keep what `encode_items` gives, and join it with `memory_rows`. Without `memory`,
and with `model.use_memory = False`, the model is exactly the backbone. Written by jaxmem; needs torch and transformers.

Axis letters: B rows, K items of a row, N items, M vectors of an item, S = K * M, T tokens of a prompt, L of an item,
D model width.
"""

import contextlib
import inspect
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BatchFeature

from .backbone_jaxmem import Backbone
from .comem_items import prepare
from .comem_layers import TOWER, Memory, adapted
from .configuration_jaxmem import JaxMemConfig


def with_memory(signature):
    """The signature of the backbone's forward with two arguments more: `generate` asks it what the model takes."""
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("memory", "memory_mask")]
    given = list(signature.parameters.values())
    last = [one for one in given if one.kind is one.VAR_KEYWORD]
    return signature.replace(parameters=[*[one for one in given if one not in last], *own, *last])


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with vectors of knowledge items in front of its prompts; `use_memory` switches them."""

    config_class = JaxMemConfig
    use_memory = True

    def __init__(self, config):
        super().__init__(config)
        self._comem, self._reading = SimpleNamespace(**config.jaxmem["memory"]), False
        self._adapted = adapted(self._comem, self)
        self.memory = Memory(self._comem, self, self._adapted)
        self.post_init()

    # Items

    def prepare_items(self, processor, items):
        """Knowledge items as `encode_items` takes them, written as they were in training.

        Args:
          processor: of this folder (`AutoProcessor`): its tokenizer and image processor are used.
          items: each {"image": ... or "images": [...], "text": ...}; images are paths or PIL images; either may lack.

        Returns:
          input_ids, attention_mask, mm_token_type_ids [N, L], padded on the left; pixel_values, image_grid_thw.
        """
        found = prepare(self._comem, self.config, processor, items)
        return BatchFeature(found | {"mm_token_type_ids": self._kinds(found["input_ids"])}).to(self.device)

    def encode_items(
        self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, mm_token_type_ids=None
    ):
        """The vectors of items, which depend on nothing else: [N, L] tokens and their images -> [N, M, D].

        Args:
          input_ids: [N, L], each row an item; arguments are what `prepare_items` returns.
          attention_mask: [N, L], 0 at padding on either side.
          pixel_values, image_grid_thw: of all images, one item's behind another's.
          mm_token_type_ids: [N, L] 1 at images; found from the tokens if not given.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kinds = self._kinds(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        places, _ = self.model.get_rope_index(input_ids, kinds, image_grid_thw=image_grid_thw, attention_mask=mask)
        seen = {} if pixel_values is None else {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        with self._as_encoder(), self._cut():
            read = self.model(input_ids, attention_mask=mask, position_ids=places, use_cache=False, **seen)
        return self.memory(read.last_hidden_state, mask.bool())

    def memory_rows(self, vectors, counts):
        """`memory` and `memory_mask` of a batch whose rows have `counts` items, from their vectors [N, M, D].

        Items are given best first; the settings say whether the best stands in front or next to the prompt.
        """
        rows = [row if self._comem.order == "rank" else row.flip(0) for row in vectors.split(list(counts))]
        most, each = max(counts, default=0), vectors.shape[1]
        memory = torch.stack([nn.functional.pad(row, (0, 0, 0, 0, 0, most - len(row))) for row in rows])
        places = torch.arange(most * each, device=vectors.device)
        valid = places < each * torch.tensor(counts, device=vectors.device)[:, None]
        return {"memory": memory.flatten(1, 2), "memory_mask": valid.long()}

    @torch.no_grad()
    def memory_of(self, processor, rows):
        """`memory` and `memory_mask` of a batch: for every row a list of items (maybe empty), best first."""
        items, counts = [item for row in rows for item in row], [len(row) for row in rows]
        if not items:
            return {}
        return self.memory_rows(self.encode_items(**self.prepare_items(processor, items)), counts)

    @contextlib.contextmanager
    def _as_encoder(self, part=""):
        """While this lasts, the factors below `part` of the backbone act."""
        if self._reading or not self._comem.rank:
            yield
            return
        chosen = [path for path in self._adapted if path.startswith(part)]
        add = lambda path: self.memory.encoder.get_submodule(path).add  # noqa: E731
        hooks = [self.get_submodule(path).register_forward_hook(add(path)) for path in chosen]
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _cut(self):
        """While this lasts, the decoder has as many layers as read an item."""
        decoder, layers = self.model.language_model, self.model.language_model.layers
        decoder.layers = layers[: self._comem.encoder_layers or None]
        try:
            yield
        finally:
            decoder.layers = layers

    # Prompts

    def generate(self, *args, memory=None, memory_mask=None, **kwargs):
        """transformers' `generate`, of prompts behind `memory`; arguments as in `forward`."""
        if self._without(memory):
            return super().generate(*args, **kwargs)
        with self._tower():
            return super().generate(*args, memory=memory, memory_mask=memory_mask, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        *,
        memory=None,
        memory_mask=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """The backbone's forward, of prompts behind `memory`. Logits are those of the prompts' tokens.

        Args:
          input_ids, attention_mask, position_ids: of the prompts alone, padded on either side.
          memory: [B, S, D] vectors in front of every row's prompt. They enter where the cache is empty, and stay in it;
            calls that go on with the cache are given the same again.
          memory_mask: [B, S], 0 where a row has fewer; None is all.
          logits_to_keep, **kwargs: the backbone's.
        """
        if self._without(memory):
            return super().forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
        cache = cache_of(kwargs)
        valid = self._checked(memory, memory_mask, input_ids, attention_mask, cache)
        rows, count = input_ids.shape
        past = length_of(cache)
        before = past - memory.shape[1] if past else 0
        mask = input_ids.new_ones(rows, before + count) if attention_mask is None else attention_mask
        places = self._places(input_ids, mask, position_ids, past, kwargs)
        mask = torch.cat([valid.to(mask), mask], dim=1)
        if past:
            shift = valid.sum(1, keepdim=True) if self._comem.decode_shift is None else self._comem.decode_shift
            return super().forward(input_ids, mask, places + shift, logits_to_keep=logits_to_keep, **kwargs)
        front = (valid.cumsum(1) - 1).clamp(min=0)
        places = torch.cat([front.expand(3, -1, -1), places + valid.sum(1, keepdim=True)], dim=2)
        if self._comem.bf16_positions:
            places = places.to(torch.bfloat16).to(input_ids.dtype)
        if isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep + memory.shape[1]
        if kwargs.get("mm_token_type_ids") is not None:
            kwargs["mm_token_type_ids"] = nn.functional.pad(kwargs["mm_token_type_ids"], (memory.shape[1], 0))
        slots = nn.functional.pad(input_ids, (memory.shape[1], 0))
        keep = count if isinstance(logits_to_keep, int) and not logits_to_keep else logits_to_keep
        with self._tower(), self._in_front(memory.masked_fill(~valid[..., None], 0)):
            return super().forward(slots, mask, places, logits_to_keep=keep, **kwargs)

    forward.__signature__ = with_memory(inspect.signature(Backbone.forward))

    def _checked(self, memory, memory_mask, input_ids, attention_mask, cache):
        """Which vectors of `memory` are there, [B, S] bool; ValueError for arguments that do not go with it."""
        if input_ids is None:
            raise ValueError("memory stands in front of tokens: give input_ids, not inputs_embeds alone")
        if getattr(cache, "is_compileable", False) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError("memory needs a cache that grows, a mask [B, T]: leave out cache_implementation='static'")
        width = self.get_input_embeddings().embedding_dim
        if memory.ndim != 3 or memory.shape[0] != len(input_ids) or memory.shape[2] != width:
            raise ValueError(
                f"memory of {len(input_ids)} prompts is [{len(input_ids)}, S, {width}], not {[*memory.shape]}"
            )
        valid = torch.ones(memory.shape[:2]) if memory_mask is None else memory_mask
        return valid.to(input_ids.device).bool()

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, memory=None, **kwargs):
        """transformers', which counts the new tokens behind a cache that an earlier `generate` left."""
        if next_sequence_length is not None and kwargs.get("is_first_iteration") and length_of(cache_of(kwargs)):
            next_sequence_length += 0 if self._without(memory) else memory.shape[1]
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, memory=memory, **kwargs)

    def _without(self, memory):
        """Is this the bare backbone?"""
        return memory is None or not self.use_memory or not memory.shape[1]

    def _tower(self):
        """What sees the images of prompts: the backbone's tower, or with the released code's switch the encoder's."""
        return self._as_encoder(TOWER) if self._comem.query_tower == "encoder" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _in_front(self, memory):
        """While this lasts, the first embeddings of every row are its memory."""
        put = lambda table, args, out: torch.cat([memory.to(out), out[:, memory.shape[1] :]], dim=1)  # noqa: E731
        hook = self.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    def _places(self, input_ids, mask, given, past, kwargs):
        """[3, B, T] positions of the tokens, counted without memory; `mask` [B, T + tokens before]."""
        rows = len(input_ids)
        if given is not None:  # with or without three axes, and one of transformers' own in front
            return given[-3:].expand(3, rows, -1) if given.ndim == 3 else given.expand(3, rows, -1)
        if past:
            moved = self.model.rope_deltas.to(mask.device)
            places = (mask.cumsum(1) - 1)[:, -input_ids.shape[1] :] + moved.repeat_interleave(rows // len(moved), dim=0)
            return places.expand(3, -1, -1)
        kinds = kwargs.get("mm_token_type_ids")
        kinds = self._kinds(input_ids) if kinds is None else kinds
        names = [name for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in kwargs]
        grids = {name: kwargs[name] for name in names}
        places, self.model.rope_deltas = self.model.get_rope_index(input_ids, kinds, attention_mask=mask, **grids)
        return places

    def _kinds(self, input_ids):
        """0 where a token is text, 1 image, 2 video."""
        return (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()


def cache_of(kwargs):
    """The cache among a call's arguments; what it is called depends on the release of transformers."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def length_of(cache):
    """How many entries a cache has."""
    return 0 if cache is None else int(cache.get_seq_length())
