"""Persistent Visual Memory (arXiv 2605.00814): in a few decoder layers, a branch beside the FFN looks at the images.

The residual stream after attention asks the visual embeddings of the prompt and nothing else, by a softmax over the
visual set alone, which no amount of text dilutes. Comments count the paper's steps: 1 reduce text, 2 reduce vision,
3 norm, 4 queries, 5 keys, 6 values, 7 to 10 attention, 11 latent MLP, 12 expand, 13 norm, 14 gate, 15 silence.

Keys and values are made once per prompt and kept with the cache that the call returns: later tokens use them, later
images in the same cache are added, and a prompt with a cache of its own begins anew. `model.use_memory = False` gives
exactly the backbone. Written by jaxmem; needs torch and transformers only.

Axis letters: B rows, T tokens, M visual rows, D model width, N query heads, K key heads, H head width.
"""

import dataclasses
from types import SimpleNamespace

import torch
from torch import nn

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig
from .ports_jaxmem import Branch, RMSNorm, SwiGLU, rms_normalise, visual_tokens

KEPT = "jaxmem_pvm"
"""The attribute of a cache that holds a `Memory`."""


@dataclasses.dataclass
class Memory:
    """What is kept of the images of a prompt.

    Attributes:
      place: [B, M] place of the visual row in its sequence.
      valid: [B, M] bool, False where a row of the batch has fewer images than another.
      keys, values: [B, K, M, H] by decoder layer.
    """

    place: torch.Tensor
    valid: torch.Tensor
    keys: dict = dataclasses.field(default_factory=dict)
    values: dict = dataclasses.field(default_factory=dict)

    def repeated(self, batch):
        """The memory of a cache whose rows were each repeated, to `batch` of them, after it was filled."""
        if batch % len(self.place):
            raise ValueError(f"{batch} rows continue a cache whose images were read in {len(self.place)} rows")
        several = lambda x: x.repeat_interleave(batch // len(x), dim=0)  # noqa: E731
        parts = ({layer: several(x) for layer, x in part.items()} for part in (self.keys, self.values))
        return Memory(several(self.place), several(self.valid), *parts)


@dataclasses.dataclass
class Reading:
    """One call of the decoder: what its tokens may look at.

    Attributes:
      old: memory of earlier calls, or None.
      memory: the same with this call's images, filled layer by layer.
      new: [B, M'] which of this call's tokens become rows of the memory, or None without images.
      rows: [B, M', D] their embeddings.
      seen: [B, T, M] bool, which rows each token may ask.
    """

    old: Memory | None
    memory: Memory
    new: torch.Tensor | None
    rows: torch.Tensor | None
    seen: torch.Tensor


class CrossAttention(nn.Module):
    """Queries from text, keys and values from images; no position anywhere (steps 4 to 10)."""

    def __init__(self, settings):
        super().__init__()
        latent, small = settings.latent, settings.kv_heads * settings.head_dim
        self.head_dim, self.dropout = settings.head_dim, settings.dropout
        self.q_proj = nn.Linear(latent, latent, bias=False)
        self.k_proj = nn.Linear(latent, small, bias=False)
        self.v_proj = nn.Linear(latent, small, bias=False)
        self.o_proj = nn.Linear(latent, latent, bias=False)
        self.q_norm = RMSNorm(settings.head_dim, settings.norm_eps)
        self.k_norm = RMSNorm(settings.head_dim, settings.norm_eps)

    def heads(self, x):
        """[B, T, N * H] -> [B, N, T, H]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def remember(self, visual):
        """[B, M, R] -> keys and values [B, K, M, H] (steps 5 and 6)."""
        return self.k_norm(self.heads(self.k_proj(visual))), self.heads(self.v_proj(visual))

    def forward(self, x, keys, values, seen):
        """[B, T, R] -> [B, T, R]; anything where a token sees no row."""
        query = self.q_norm(self.heads(self.q_proj(x)))
        keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
        seen = seen | ~seen.any(-1, keepdim=True)  # a softmax over nothing would not be a number
        dropout = self.dropout if self.training else 0.0
        found = nn.functional.scaled_dot_product_attention(query, keys, values, seen[:, None], dropout)
        return self.o_proj(found.transpose(1, 2).flatten(2))


class PVMBlock(Branch):
    """The branch of one layer: fifteen tensors, named as the paper's own code names them."""

    def __init__(self, settings, index, layer):
        super().__init__(layer)
        self.settings, self.index, self.reading = settings, index, None
        width, latent = settings.width, settings.latent
        self.text_reducer = nn.Linear(width, latent, bias=False)
        self.vision_reducer = nn.Linear(width, latent, bias=False)
        self.output_expander = nn.Linear(latent, width, bias=False)
        self.input_norm = RMSNorm(latent, settings.norm_eps)
        self.post_attn_norm = RMSNorm(latent, settings.norm_eps)
        self.cross_attn = CrossAttention(settings)
        self.mlp = SwiGLU(latent, settings.mlp_width)
        self.gate_alpha = nn.Parameter(torch.zeros(1))

    def act(self, x, normed):
        """What is added to the FFN's output [B, T, D]; None without images, or while the memory is off."""
        if self.reading is None:
            return None
        settings, seen = self.settings, self.reading.seen.to(x.device)
        asked = self.input_norm(self.text_reducer(x if settings.query == "residual" else normed))  # 1, 3
        found = self.cross_attn(asked, *self.recall(x), seen)  # 4, 7 to 10
        found = found + self.mlp(self.post_attn_norm(found))  # 11
        out = self.output_expander(found).float()  # 12
        out = rms_normalise(out, settings.norm_eps) if settings.output_norm else out  # 13
        out = (self.gate_alpha.float() * out).to(x.dtype)  # 14
        return out.masked_fill(~seen.any(-1, keepdim=True), 0)  # 15, and text that stands in front of all images

    def recall(self, x):
        """Keys and values [B, K, M, H] of all rows so far; those of new rows are made here (2, 5, 6)."""
        reading, memory = self.reading, self.reading.memory
        if reading.new is not None:
            visual = reading.rows if self.settings.source == "visual" else gather(x, reading.new)
            visual = visual.to(x.device).masked_fill(~memory.valid[:, -visual.shape[1] :, None].to(x.device), 0)
            made = self.cross_attn.remember(self.vision_reducer(visual))
            if reading.old is not None:
                keys, values = reading.old.keys[self.index], reading.old.values[self.index]
                made = torch.cat([keys, made[0]], dim=2), torch.cat([values, made[1]], dim=2)
            memory.keys[self.index], memory.values[self.index] = made
        return memory.keys[self.index], memory.values[self.index]


def gather(x, index):
    """[B, T, D] at [B, M] -> [B, M, D]."""
    return x.gather(1, index[..., None].to(x.device).expand(-1, -1, x.shape[-1]))


class JaxMemForConditionalGeneration(Backbone):
    """The backbone with a PVM in some of its decoder layers; `use_memory` switches them all."""

    config_class = JaxMemConfig
    use_memory = True
    _can_compile_fullgraph = False  # what a prompt leaves is kept beside its cache, by hooks

    def __init__(self, config):
        super().__init__(config)
        self._pvm, self._visual = SimpleNamespace(**config.jaxmem["memory"]), None
        for index in self._pvm.layers:
            layer = self.model.language_model.layers[index]
            layer.pvm_block = PVMBlock(self._pvm, index, layer)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        self.model.language_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.model.language_model.register_forward_hook(self._end, with_kwargs=True)
        self.post_init()

    def _look(self, model, args, inputs):
        """In front of everything: which tokens are images."""
        self._visual = visual_tokens(self.config, args, inputs) if self.use_memory else None

    def _begin(self, decoder, args, inputs):
        """In front of the decoder, when the images stand in place of their tokens."""
        reading = self._read(inputs["inputs_embeds"], _cache(inputs)) if self.use_memory else None
        for index in self._pvm.layers:
            decoder.layers[index].pvm_block.reading = reading

    def _end(self, decoder, args, inputs, outputs):
        """Behind the decoder: the memory stays with the cache."""
        cache = _cache(inputs) if _cache(inputs) is not None else _cache(outputs)
        self._visual, reading = None, decoder.layers[self._pvm.layers[0]].pvm_block.reading
        if cache is not None and reading is not None:
            setattr(cache, KEPT, reading.memory)

    def _read(self, embeds, cache):
        """The Reading of a call whose tokens are embedded as [B, T, D]; None where there is nothing to look at."""
        start = 0 if cache is None else int(cache.get_seq_length())
        old = getattr(cache, KEPT, None) if start else None
        if old is not None and len(old.place) != len(embeds):
            old = old.repeated(len(embeds))
        new, memory = (None, old) if self._visual is None else self._new_rows(embeds, start)
        if memory is None:
            return None
        if old is not None and new is not None:
            if self._pvm.source == "hidden":
                raise ValueError("a PVM with source 'hidden' takes no images behind its first prompt")
            memory = Memory(torch.cat([old.place, memory.place], 1), torch.cat([old.valid, memory.valid], 1))
        place = start + torch.arange(embeds.shape[1], device=embeds.device)
        seen = memory.valid[:, None].expand(-1, len(place), -1)
        if self._pvm.visibility == "causal":
            seen = seen & (memory.place[:, None] < place[:, None])
        if self._pvm.silence and self._visual is not None:
            seen = seen & ~self._visual[..., None]
        return Reading(old, memory, new, None if new is None else gather(embeds, new), seen)

    def _new_rows(self, embeds, start):
        """Which tokens of this call become rows [B, M], and their still empty Memory.

        All newlines of LLaVA-style prompts are one row, which stands where the last one does.
        """
        chosen, newline = self._visual, getattr(self.model, "image_newline", None)
        if newline is not None:
            ends = chosen & (embeds == newline.to(embeds)).all(-1)
            chosen = chosen & ~(ends & (ends.flip(1).cumsum(1).flip(1) > 1))
        most = int(chosen.sum(1).max())
        index = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return index, Memory(start + index, chosen.gather(1, index))


def _cache(values):
    """The cache among a call's arguments or results; what it is called depends on the release of transformers."""
    found = dict(values.items()) if isinstance(values, dict) else {}
    return found.get("cache", found.get("past_key_values"))
