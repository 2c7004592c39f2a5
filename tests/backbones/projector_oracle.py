"""Projectors in torch with the tensor names of their authors, written from the published formulas, for comparison.

Every module takes (features [B, side^2, C], levels) and gives [B, N', D].
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict

import jax
import numpy as np
import pytest

from jaxmem.backbones import projectors
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.checkpoints import projector_names
from jaxmem.checkpoints.huggingface import load_tree
from jaxmem.checkpoints.table import view, write_tree

torch = pytest.importorskip("torch")
F, nn = torch.nn.functional, torch.nn

TINY = {"in_width": 8, "out_width": 10, "side": 6}
CASES = {
    "mlp": ProjectorConfig("mlp", **TINY),
    "mlp without biases": ProjectorConfig("mlp", **TINY, bias=False, act="gelu_pytorch_tanh"),
    "avgpool 2": ProjectorConfig("avgpool", **TINY, ratio=2),
    "avgpool 4 of 7": ProjectorConfig("avgpool", **TINY | {"side": 7}, ratio=4),
    "ldpv2": ProjectorConfig("ldpv2", **TINY | {"side": 8}, queries=16),
    "ldpv2 of 7": ProjectorConfig("ldpv2", **TINY | {"side": 7}, queries=16),
    "tokenpacker 2": ProjectorConfig("tokenpacker", **TINY, ratio=2, width=12, heads=3),
    "tokenpacker 3": ProjectorConfig("tokenpacker", **TINY, ratio=3, width=12, heads=3, levels=(1, 4)),
    "tokenpacker 4": ProjectorConfig("tokenpacker", **TINY | {"side": 8}, ratio=4, width=12, heads=3),
    "tokenpacker 2 of 7": ProjectorConfig("tokenpacker", **TINY | {"side": 7}, ratio=2, width=12, heads=3),
    "pixel_shuffle 2": ProjectorConfig("pixel_shuffle", **TINY, ratio=2),
    "pixel_shuffle 3": ProjectorConfig("pixel_shuffle", **TINY, ratio=3),
    "pixel_shuffle 2 of 7": ProjectorConfig("pixel_shuffle", **TINY | {"side": 7}, ratio=2),
    "c_abstractor": ProjectorConfig("c_abstractor", **TINY | {"side": 7}, queries=16, width=8, depth=1),
    "c_abstractor wider": ProjectorConfig("c_abstractor", **TINY | {"side": 8}, ratio=2, width=12, depth=2),
    "perceiver": ProjectorConfig("resampler", **TINY, queries=5, width=6, heads=2),
    "honeybee": ProjectorConfig("resampler", **TINY, kind="honeybee", queries=5, width=12, heads=3, depth=2),
    "q_former": ProjectorConfig("resampler", **TINY, kind="q_former", queries=5, width=12, heads=3, depth=4),
}
"""Tiny projectors of all kinds."""


def features(config, tiles=3, seed=0):
    """Tiles whose patches tell their places, and the levels that the projector reads."""
    draw = np.random.default_rng(seed)
    shape = (tiles, config.side**2, config.in_width)
    slope = np.linspace(-1, 1, config.side**2, dtype=np.float32)[:, None]
    make = lambda: draw.normal(size=shape).astype(np.float32) + slope  # noqa: E731
    return make(), tuple(make() for _ in config.layers)


@functools.cache
def pair(case):
    """The torch module of a case with random weights, and our parameters, read by the table of original names."""
    config = CASES[case]
    torch.manual_seed(0)
    module = MODULES[config.kind or config.name](config).eval()
    with torch.no_grad():
        for name, value in module.named_parameters():
            norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(torch.randn_like(value) * 0.3 + (1.0 if norm else 0.0))
    return module, read(config, module.state_dict())


def read(config, state, theirs="", style="original"):
    """Our parameters from a torch state dict."""
    tensors = {name: view(value.detach().numpy()) for name, value in state.items()}
    rules = projector_names.table(config, "", theirs, style)
    return load_tree("the oracle", tensors, rules, projectors.shapes(config))


def by_name(config, tree, theirs="", style="original"):
    """A tree of ours (parameters, gradients) as numpy arrays by their names."""
    rules = projector_names.table(config, "", theirs, style)
    return {name: part.read() for name, part in write_tree(rules, jax.tree.map(np.asarray, tree))}


def two(enters, leaves, act=nn.GELU, bias=True):
    return nn.Sequential(nn.Linear(enters, leaves, bias), act(), nn.Linear(leaves, leaves, bias))


def image(x):
    """[B, P, C] -> [B, C, H, H]."""
    side = round(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))


def rows(x):
    """[B, C, H, H] -> [B, P, C]."""
    return x.flatten(2).transpose(1, 2)


def window(x, ratio, i, j):
    """The patches of cell (i, j) that are there: [B, C, H, H] -> [B, rows, columns, C]."""
    return x[:, :, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio].permute(0, 2, 3, 1)


class MLP(nn.Sequential):
    def __init__(self, c):
        act = nn.GELU if c.act == "gelu" else lambda: nn.GELU("tanh")
        super().__init__(*two(c.in_width, c.out_width, act, c.bias))

    def forward(self, x, levels):
        return super().forward(x)


class DeCo(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ratio, self.mlp_projector = c.ratio, two(c.in_width, c.out_width)

    def forward(self, x, levels):
        pooled = F.avg_pool2d(image(x), self.ratio, ceil_mode=True, count_include_pad=False)
        return self.mlp_projector(rows(pooled))


class LDPv2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.grid, d = c.grid, c.out_width
        self.mlp = nn.ModuleDict({"mlp": two(c.in_width, d)})
        self.peg = nn.ModuleDict({"peg": nn.Sequential(nn.Conv2d(d, d, 3, 1, 1, groups=d))})

    def forward(self, x, levels):
        pooled = F.adaptive_avg_pool2d(image(self.mlp["mlp"](x)), self.grid)
        return rows(pooled + self.peg["peg"](pooled))


class TokenPacker(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.width
        self.q_proj_1 = nn.Linear(c.in_width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = (two(c.in_width * len(c.levels), width) for _ in "kv")
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, 1e-6) for _ in "qkv")
        self.clip_attn = nn.MultiheadAttention(width, c.heads, batch_first=True)
        self.mlp = two(width, c.out_width)

    def coarse(self, x):
        """Bilinear resizing; where cells reach over the border, sampling at their centres with a repeated border."""
        side, ratio, grid = self.c.side, self.c.ratio, self.c.grid
        if side % ratio == 0:
            return F.interpolate(image(x), (grid, grid), mode="bilinear", align_corners=False)
        centres = (2 * (torch.arange(grid) * ratio + (ratio - 1) / 2) + 1) / side - 1
        places = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).expand(len(x), -1, -1, -1)
        return F.grid_sample(image(x), places, padding_mode="border", align_corners=False)

    def forward(self, x, levels):
        fine = torch.cat(levels, -1)
        query = self.ln_q_1(self.q_proj_1(rows(self.coarse(x))))
        key, value = image(self.ln_k_1(self.k_proj_1(fine))), image(self.ln_v_1(self.v_proj_1(fine)))
        found = []
        for n in range(query.shape[1]):
            at = (self.c.ratio, *divmod(n, self.c.grid))
            own = [window(part, *at).flatten(1, 2) for part in (key, value)]
            found.append(self.clip_attn(query[:, n : n + 1], *own)[0])
        return self.mlp(torch.cat(found, 1))


class PixelShuffle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, wide = c, c.in_width * c.ratio**2
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), *two(wide, c.out_width))

    def forward(self, x, levels):
        over = self.c.grid * self.c.ratio - self.c.side
        whole = F.pad(image(x), (0, over, 0, over))
        cells = [window(whole, self.c.ratio, *divmod(n, self.c.grid)).flatten(1) for n in range(self.c.tokens)]
        return self.mlp1(torch.stack(cells, 1))


class Conv(nn.Module):
    """A convolution without bias, LayerNorm over channels, and SiLU unless told otherwise."""

    def __init__(self, enters, leaves, size=1, groups=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(enters, leaves, size, padding=size // 2, groups=groups, bias=False)
        self.bn, self.act = nn.LayerNorm(leaves, 1e-5), act

    def forward(self, x):
        x = self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(x) if self.act else x


class SE(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class RegBlock(nn.Module):
    def __init__(self, enters, width):
        super().__init__()
        self.conv1, self.conv2 = Conv(enters, width), Conv(width, width, 3, width)
        self.se, self.conv3 = SE(width, round(enters / 4)), Conv(width, width, act=False)
        self.downsample = nn.Identity() if enters == width else Conv(enters, width, act=False)

    def forward(self, x):
        return F.silu(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class CAbstractor(nn.Module):
    def __init__(self, c):
        super().__init__()

        def stage(enters):
            widths = [enters, *[c.width] * c.depth]
            blocks = [(f"b{n + 1}", RegBlock(widths[n], c.width)) for n in range(c.depth)]
            return nn.Sequential(OrderedDict(blocks))

        inner = nn.Module()
        inner.pos_emb = nn.Parameter(torch.zeros(1, c.side**2, c.in_width))
        inner.net = nn.Sequential(stage(c.in_width), nn.AdaptiveAvgPool2d(c.grid), stage(c.width))
        inner.readout = two(c.width, c.out_width, nn.SiLU)
        self.abstractor = inner

    def forward(self, x, levels):
        a = self.abstractor
        return a.readout(rows(a.net(image(x + a.pos_emb))))


def attention(query, key, value, heads):
    """Softmax attention as it is printed."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    query, key, value = split(query), split(key), split(value)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


class Perceiver(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, width = c.heads, c.in_width
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731

        def layer():
            look = {"norm_media": nn.LayerNorm(width), "norm_latents": nn.LayerNorm(width)}
            look |= {"to_q": linear(width, c.width), "to_kv": linear(width, 2 * c.width)}
            look["to_out"] = linear(c.width, width)
            grow = [nn.LayerNorm(width), linear(width, 4 * width), nn.GELU(), linear(4 * width, width)]
            return nn.ModuleList([nn.ModuleDict(look), nn.Sequential(*grow)])

        inner = nn.Module()
        inner.latents = nn.Parameter(torch.zeros(c.queries, width))
        inner.layers, inner.norm = nn.ModuleList(layer() for _ in range(c.depth)), nn.LayerNorm(width)
        self.vision_resampler = nn.ModuleDict({"perceiver": inner})
        self.mm_projector = two(width, c.out_width)

    def forward(self, x, levels):
        inner = self.vision_resampler["perceiver"]
        z = inner.latents.expand(len(x), -1, -1)
        for look, grow in inner.layers:
            own = look["norm_latents"](z)
            key, value = look["to_kv"](torch.cat([look["norm_media"](x), own], 1)).chunk(2, -1)
            z = z + look["to_out"](attention(look["to_q"](own), key, value, self.heads))
            z = z + grow(z)
        return self.mm_projector(inner.norm(z))


class Honeybee(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, w = c.heads, c.width

        def layer():
            mlp = {"w1": nn.Linear(w, 4 * w), "w2": nn.Linear(4 * w, w), "w3": nn.Linear(w, 4 * w)}
            mlp["ffn_ln"] = nn.LayerNorm(4 * w, 1e-6)
            output = {"out_proj": nn.Linear(w, w), "norm2": nn.LayerNorm(w), "mlp": nn.ModuleDict(mlp)}
            cross = {"attention": nn.ModuleDict({name: nn.Linear(w, w) for name in ("query", "key", "value")})}
            cross |= {"output": nn.ModuleDict(output), "norm1": nn.LayerNorm(w), "normk": nn.LayerNorm(w)}
            return nn.ModuleDict({"crossattention": nn.ModuleDict(cross)})

        inner = nn.Module()
        inner.query_tokens = nn.Parameter(torch.zeros(1, c.queries, w))
        inner.encoder = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(c.depth))})
        inner.visual_input_fc, inner.visual_output_fc = nn.Linear(c.in_width, w), nn.Linear(w, c.out_width)
        self.abstractor = inner

    def forward(self, x, levels):
        a = self.abstractor
        z, x = a.query_tokens.expand(len(x), -1, -1), a.visual_input_fc(x)
        for layer in a.encoder["layers"]:
            cross = layer["crossattention"]
            maps, output = cross["attention"], cross["output"]
            z = cross["norm1"](z)
            both = torch.cat([z, cross["normk"](x)], 1)
            z = z + output["out_proj"](attention(maps["query"](z), maps["key"](both), maps["value"](both), self.heads))
            n, mlp = output["norm2"](z), output["mlp"]
            z = z + mlp["w2"](mlp["ffn_ln"](F.silu(mlp["w1"](n)) * mlp["w3"](n)))
        return a.visual_output_fc(z)


class QFormer(nn.Module):
    """transformers' own Q-Former between the queries and the map to the decoder."""

    def __init__(self, c):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        sizes = {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads}
        sizes |= {"intermediate_size": 4 * c.width, "encoder_hidden_size": c.in_width}
        self.query_tokens = nn.Parameter(torch.zeros(1, c.queries, c.width))
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
        self.language_projection = nn.Linear(c.width, c.out_width)

    def forward(self, x, levels):
        queries = self.query_tokens.expand(len(x), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        return self.language_projection(found)


MODULES = types.MappingProxyType(
    {
        "mlp": MLP,
        "avgpool": DeCo,
        "ldpv2": LDPv2,
        "tokenpacker": TokenPacker,
        "pixel_shuffle": PixelShuffle,
        "c_abstractor": CAbstractor,
        "perceiver": Perceiver,
        "honeybee": Honeybee,
        "q_former": QFormer,
    }
)
