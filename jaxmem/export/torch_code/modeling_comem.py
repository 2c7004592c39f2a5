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
import re
from types import SimpleNamespace

import torch
from PIL import Image, ImageOps
from torch import nn
from transformers import BatchFeature

from .backbone_jaxmem import Backbone
from .configuration_jaxmem import JaxMemConfig

TOWER = "model.visual"
PLACES = {  # where the settings' `kernels` lie among the backbone's modules, {} for the layer
    "layers": "model.language_model.layers.{}",
    "visual/blocks": f"{TOWER}.blocks.{{}}",
    "visual/merger": f"{TOWER}.merger",
    "visual/deepstack": f"{TOWER}.deepstack_merger_list.{{}}",
}
NAMES = {  # and what they are called there, which depends on the family
    **{f"attention/{x}": [f"self_attn.{x}_proj"] for x in "qkvo"},
    **{f"ffn/{x}": [f"mlp.{x}_proj"] for x in ("gate", "up", "down")},
    **{f"mlp/{x}": [f"mlp.{x}_proj"] for x in ("gate", "up", "down")},
    **{f"attention/{x}": [f"attn.{x}"] for x in ("qkv", "proj")},
    **{f"mlp/fc{i}": [f"mlp.fc{i}", f"mlp.linear_fc{i}"] for i in (1, 2)},
    "fc1": ["mlp.0", "linear_fc1"],
    "fc2": ["mlp.2", "linear_fc2"],
}


class Factors(nn.Module):
    """A low-rank update beside a linear map: y + scale * B(A(x))."""

    def __init__(self, linear, rank, scale):
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)

    def add(self, linear, args, out):
        """A forward hook of the linear map."""
        return out + self.scale * self.lora_B(self.lora_A(args[0])).to(out.device)


class LatentAttention(nn.Module):
    """Latents look at an item and at one another; 16 heads of D / 16 as published."""

    def __init__(self, settings):
        super().__init__()
        width, inner = settings.width, settings.heads * settings.head_dim
        self.heads = settings.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def split(self, x):
        """[N, L, H * C] -> [N, H, L, C]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def look(self, normed):
        """Keys and values [N, H, L, C] of [N, L, D]; the first half of the map's result are keys."""
        return [self.split(part) for part in self.to_kv(normed).chunk(2, dim=-1)]

    def forward(self, latents, item, valid):
        """[N, M, D], the item's keys and values, [N, L] bool -> [N, M, D]; latents themselves are always seen."""
        normed = self.norm2(latents)
        keys, values = (torch.cat(parts, dim=2) for parts in zip(item, self.look(normed), strict=True))
        seen = nn.functional.pad(valid, (0, latents.shape[1]), value=True)[:, None, None]
        found = nn.functional.scaled_dot_product_attention(self.split(self.to_q(normed)), keys, values, seen)
        return self.to_out(found.transpose(1, 2).flatten(2))


def branches(settings):
    """One pass: attention, and the feed-forward branch."""
    width, inner = settings.width, settings.ff_mult * settings.width
    maps = nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    return nn.ModuleList([LatentAttention(settings), nn.Sequential(nn.LayerNorm(width), *maps)])


class QFormer(nn.Module):
    """Hidden states of an item become M vectors: a perceiver resampler, `depth` passes with the same weights.

    Eighteen tensors, named as the paper's own code names them. The item never changes, so that passes that share their
    weights share its keys and values too.
    """

    def __init__(self, settings):
        super().__init__()
        self.depth, self.shared, width = settings.depth, settings.shared, settings.width
        self.latents = nn.Parameter(torch.zeros(1, settings.latents, width))
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        passes = [branches(settings) for _ in range(1 if self.shared else self.depth)]
        self.layers = passes[0] if self.shared else nn.ModuleList(passes)

    def forward(self, hidden, valid):
        """[N, L, D] last hidden states, [N, L] bool (False at padding) -> [N, M, D]."""
        x = self.proj_in(hidden.masked_fill(~valid[..., None], 0))
        z = self.latents.expand(len(x), -1, -1)
        look = lambda attention: attention.look(attention.norm1(x))  # noqa: E731
        seen = look(self.layers[0]) if self.shared else None
        for index in range(self.depth):
            attention, feed_forward = self.layers if self.shared else self.layers[index]
            z = z + attention(z, seen or look(attention), valid)
            z = z + feed_forward(z)
        return self.norm_out(self.proj_out(z))


class Memory(nn.Module):
    """What is trained: the encoder's factors, at the names of the modules they update, and the Q-Former."""

    def __init__(self, settings, backbone, paths):
        super().__init__()
        self.encoder = nn.Module()
        for path in paths:
            *parents, last = path.split(".")
            node = self.encoder
            for name in parents:
                if name not in dict(node.named_children()):
                    node.add_module(name, nn.Module())
                node = node.get_submodule(name)
            node.add_module(last, Factors(backbone.get_submodule(path), settings.rank, settings.alpha / settings.rank))
        self.knowledge_processor = QFormer(settings)
        if settings.target_width != settings.width:
            self.adapter = nn.Linear(settings.width, settings.target_width, bias=False)

    def forward(self, hidden, valid):
        """[N, L, D] hidden states of items, [N, L] bool -> [N, M, D]."""
        vectors = self.knowledge_processor(hidden, valid)
        return self.adapter(vectors) if hasattr(self, "adapter") else vectors


def adapted(settings, backbone):
    """Paths of the linear maps that have factors."""
    found = []
    for path, shape in settings.kernels:
        place = next(place for place in PLACES if path.startswith(f"{place}/"))
        for index in range(shape[0] if len(shape) == 3 else 1):
            module = PLACES[place].format(index)
            held = dict(backbone.get_submodule(module).named_modules())
            name = next(name for name in NAMES[path.removeprefix(f"{place}/")] if name in held)
            found.append(f"{module}.{name}")
    return found


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

        A user turn with the images and a constant suffix, an assistant turn with the text, no system turn; special
        tokens that a text spells out stay text. Large images become squares.

        Args:
          processor: of this folder (`AutoProcessor`): its tokenizer and image processor are used.
          items: each {"image": ... or "images": [...], "text": ...}; images are paths or PIL images; either may lack.

        Returns:
          input_ids, attention_mask, mm_token_type_ids [N, L], padded on the left; pixel_values, image_grid_thw.
        """
        settings, tokenizer, reader = self._comem, processor.tokenizer, processor.image_processor
        limits = {"shortest_edge": settings.item_min_pixels, "longest_edge": settings.item_max_pixels}
        limits = {edge: limits[edge] or reader.size[edge] for edge in limits} if any(limits.values()) else None
        rows, pixels, grids = [], [], []
        for item in items:
            images = item.get("images") or ([] if item.get("image") is None else [item["image"]])
            text = item.get("text") or ""
            if not images and not text.strip():
                raise ValueError("an item needs an image or a text")
            images = [squashed(open_image(image), settings.squash) for image in images]
            seen = reader(images=images, return_tensors="pt", **({"size": limits} if limits else {})) if images else {}
            counts = [int(grid.prod()) // reader.merge_size**2 for grid in seen.get("image_grid_thw", [])]
            rows.append(self._item_tokens(tokenizer, counts, text[: settings.text_limit]))
            pixels += [seen["pixel_values"]] if images else []
            grids += [seen["image_grid_thw"]] if images else []
        found = left_padded(rows, tokenizer.pad_token_id or 0)
        found["mm_token_type_ids"] = self._kinds(found["input_ids"])
        found |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else {}
        return BatchFeature(found).to(self.device)

    def _item_tokens(self, tokenizer, counts, text):
        """Tokens of an item whose images take `counts` of them."""
        ids = (self.config.vision_start_token_id, self.config.image_token_id, self.config.vision_end_token_id)
        start, pad, end = (tokenizer.convert_ids_to_tokens(id_) for id_ in ids)
        images = "".join(start + pad * count + end for count in counts)
        head = f"<|im_start|>user\n{images}{self._comem.suffix}<|im_end|>\n<|im_start|>assistant\n"
        media = {*ids, self.config.video_token_id}
        special = [t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in media]
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        pieces = re.split(f"({pattern})", text)  # alternates: plain, special, plain, ...
        pieces[0] = head + pieces[0]
        pieces[-1] += "<|im_end|>\n"
        found = []
        for place, piece in enumerate(pieces):
            found += tokenizer(piece, add_special_tokens=False, split_special_tokens=place % 2 == 1)["input_ids"]
        return found

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
        valid = torch.arange(most * each, device=vectors.device) < each * torch.tensor(counts)[:, None].to(
            vectors.device
        )
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
        if input_ids is None:
            raise ValueError("memory stands in front of tokens: give input_ids, not inputs_embeds alone")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "memory needs a cache that grows and a mask [B, T]: leave out cache_implementation='static'"
            )
        valid = torch.ones(memory.shape[:2]) if memory_mask is None else memory_mask
        valid, (rows, count) = valid.to(input_ids).bool(), input_ids.shape
        past = length_of(kwargs)
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

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, memory=None, **kwargs):
        """transformers', which counts the new tokens behind a cache that an earlier `generate` left."""
        if next_sequence_length is not None and kwargs.get("is_first_iteration") and length_of(kwargs):
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


def length_of(kwargs):
    """Entries of the cache among a call's arguments; what it is called depends on the release of transformers."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return 0 if cache is None else int(cache.get_seq_length())


def left_padded(rows, pad):
    """Lists of tokens as input_ids and attention_mask [N, L]."""
    most = max(map(len, rows))
    ids = [[pad] * (most - len(row)) + row for row in rows]
    mask = [[0] * (most - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def open_image(source):
    """A path or PIL image as 8-bit RGB: turned upright by its EXIF tag, what is transparent on white."""
    image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else Image.open(source))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def squashed(image, side):
    """A picture with a longer side than `side` as a square of it; 0 keeps it."""
    return image.resize((side, side), Image.Resampling.LANCZOS) if side and max(image.size) > side else image
