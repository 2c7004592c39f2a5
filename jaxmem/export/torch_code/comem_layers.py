"""What CoMEM adds to a backbone: low-rank factors beside its linear maps, and the Q-Former.

Axis letters: N items, L tokens of an item, M vectors of an item, H heads, C their width, D model width.
"""

import torch
from torch import nn

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
