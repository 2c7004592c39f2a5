"""The projectors of LLaVA-style models: features of tiles in, vectors that the decoder reads as tokens out.

Every projector is a module of settings `c` (`config.jaxmem["tiles"]["projector"]`) and is called with features
[B, P, C], row by row and without a class token, and with further hidden states of the same shape (TokenPacker alone
reads them). It gives [B, N', D], of a projector with a grid row by row. Tensors have the names that the projectors'
authors gave them, and those of transformers where it has the projector.

Letters: B tiles, P = side^2 patches, C width of the vision tower, N' tokens of a tile, D width of the decoder.
"""

from collections import OrderedDict
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN


def make_projector(settings):
    """The projector of `settings`: {"name", "kind", "in_width", "out_width", "side", "ratio", ...}."""
    return PROJECTORS[settings["kind"] or settings["name"]](Settings(settings))


class Settings:
    """A dict whose entries are attributes."""

    def __init__(self, entries):
        self.__dict__.update(entries)


# ----------------------------------------------------------------------------------------------------------- pieces


def two_layers(enters, leaves, act, bias=True):
    """linear, activation, linear."""
    return nn.Sequential(nn.Linear(enters, leaves, bias), ACT2FN[act], nn.Linear(leaves, leaves, bias))


def square(x):
    """[B, side^2, C] -> [B, C, side, side]."""
    return x.transpose(1, 2).unflatten(2, (isqrt(x.shape[1]),) * 2)


def flat(x):
    """[B, C, h, w] -> [B, h w, C]."""
    return x.flatten(2).transpose(1, 2)


def cells(x, ratio):
    """The patches of every cell of ratio x ratio, in ceil mode: [B, side^2, C] -> [B, N', ratio^2, C], and which exist.

    Cells over the lower and right border are filled with zeros; the mask is [N', ratio^2] bool.
    """
    image = square(x)
    over = -image.shape[-1] % ratio
    there = F.pad(torch.ones_like(image[:1, :1]), (0, over, 0, over))

    def cut(padded):
        parts = padded.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio))  # [B, C, h', r, w', r]
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    return cut(F.pad(image, (0, over, 0, over))), cut(there)[0, :, :, 0].bool()


def attention(query, key, value, heads):
    """Multi-head attention: [B, T, W] and two of [B, S, W] -> [B, T, W]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------- projectors with a grid


class MLP(nn.Module):
    """Two linear maps of every patch (LLaVA-1.5)."""

    def __init__(self, c):
        super().__init__()
        self.linear_1 = nn.Linear(c.in_width, c.out_width, c.bias)
        self.act = ACT2FN[c.act]
        self.linear_2 = nn.Linear(c.out_width, c.out_width, c.bias)

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        return self.linear_2(self.act(self.linear_1(x)))


class AveragePool(nn.Module):
    """The mean of every cell, then the two maps (DeCo, arXiv 2405.20985)."""

    def __init__(self, c):
        super().__init__()
        self.ratio = c.ratio
        self.mlp_projector = two_layers(c.in_width, c.out_width, c.act, c.bias)

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        pooled = F.avg_pool2d(square(x), self.ratio, ceil_mode=True, count_include_pad=False)
        return self.mlp_projector(flat(pooled))


class LDPv2(nn.Module):
    """The two maps, pooling, and a depthwise convolution that tells places (MobileVLM V2, arXiv 2402.03766)."""

    def __init__(self, c):
        super().__init__()
        self.grid = isqrt(c.queries)
        self.mlp = nn.ModuleDict({"mlp": two_layers(c.in_width, c.out_width, c.act, c.bias)})
        convolution = nn.Conv2d(c.out_width, c.out_width, 3, padding=1, groups=c.out_width)
        self.peg = nn.ModuleDict({"peg": nn.Sequential(convolution)})

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        pooled = F.adaptive_avg_pool2d(square(self.mlp["mlp"](x)), self.grid)
        return flat(pooled + self.peg["peg"](pooled))


class TokenPacker(nn.Module):
    """A coarse token asks the finer features of its own cell (arXiv 2407.02392, section 3.2)."""

    def __init__(self, c):
        super().__init__()
        self.ratio, width = c.ratio, c.width
        self.q_proj_1 = nn.Linear(c.in_width, width, bias=False)
        self.k_proj_1 = two_layers(len(c.levels) * c.in_width, width, "gelu")
        self.v_proj_1 = two_layers(len(c.levels) * c.in_width, width, "gelu")
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, c.norm_eps) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, c.heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, c.out_width, c.bias), ACT2FN[c.act])
        self.mlp.append(nn.Linear(c.out_width, c.out_width, c.bias))

    def forward(self, x, levels):
        """[B, P, C], and the same for each further hidden state -> [B, N', D]."""
        fine = torch.cat(list(levels), dim=-1)
        query = self.ln_q_1(self.q_proj_1(self.coarse(x)))
        key, there = cells(self.ln_k_1(self.k_proj_1(fine)), self.ratio)
        value, _ = cells(self.ln_v_1(self.v_proj_1(fine)), self.ratio)
        unseen = ~there.repeat(len(x), 1)
        found, _ = self.clip_attn(
            query.flatten(0, 1)[:, None], key.flatten(0, 1), value.flatten(0, 1), unseen, need_weights=False
        )
        return self.mlp(found.view(query.shape))

    def coarse(self, x):
        """Bilinear, so that a cell is what stands in its middle; over the border, the border is repeated."""
        image = square(x)
        over, count = -image.shape[-1] % self.ratio, -(-image.shape[-1] // self.ratio)
        image = F.pad(image, (0, over, 0, over), mode="replicate") if over else image
        return flat(F.interpolate(image, (count, count), mode="bilinear", align_corners=False))


class PixelShuffle(nn.Module):
    """The patches of a cell side by side on the channels, LayerNorm, two maps (InternVL's second version)."""

    def __init__(self, c):
        super().__init__()
        self.ratio, joined = c.ratio, c.ratio**2 * c.in_width
        self.layer_norm = nn.LayerNorm(joined, c.norm_eps)
        self.linear_1 = nn.Linear(joined, c.out_width, c.bias)
        self.act = ACT2FN[c.act]
        self.linear_2 = nn.Linear(c.out_width, c.out_width, c.bias)

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        joined = self.layer_norm(cells(x, self.ratio)[0].flatten(2))
        return self.linear_2(self.act(self.linear_1(joined)))


class CAbstractor(nn.Module):
    """Convolutional blocks before and after pooling to a square of tokens (Honeybee, arXiv 2312.06742)."""

    def __init__(self, c):
        super().__init__()

        def stage(enters):
            blocks = [RegNetBlock(enters if i == 0 else c.width, c.width, c.norm_eps) for i in range(c.depth)]
            return nn.Sequential(OrderedDict((f"b{i + 1}", block) for i, block in enumerate(blocks)))

        inner = nn.Module()
        inner.pos_emb = nn.Parameter(torch.zeros(1, c.side**2, c.in_width))
        inner.net = nn.Sequential(stage(c.in_width), nn.AdaptiveAvgPool2d(isqrt(c.queries)), stage(c.width))
        inner.readout = two_layers(c.width, c.out_width, "silu", c.bias)
        self.abstractor = inner

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        inner = self.abstractor
        return inner.readout(flat(inner.net(square(x + inner.pos_emb))))


class RegNetBlock(nn.Module):
    """A bottleneck as wide inside as outside: 1x1, depthwise 3x3, squeeze-and-excitation, 1x1, shortcut."""

    def __init__(self, enters, width, eps):
        super().__init__()
        self.conv1 = ConvNorm(enters, width, eps)
        self.conv2 = ConvNorm(width, width, eps, kernel=3, groups=width)
        self.se = nn.Module()
        self.se.fc1 = nn.Conv2d(width, round(enters / 4), 1)
        self.se.fc2 = nn.Conv2d(round(enters / 4), width, 1)
        self.conv3 = ConvNorm(width, width, eps)
        self.downsample = None if enters == width else ConvNorm(enters, width, eps)

    def forward(self, x):
        """[B, C, h, w] -> [B, W, h, w]."""
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        y = y * self.se.fc2(F.silu(self.se.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        return F.silu(self.conv3(y) + (x if self.downsample is None else self.downsample(x)))


class ConvNorm(nn.Module):
    """A convolution without bias, and LayerNorm over the channels."""

    def __init__(self, enters, leaves, eps, kernel=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(enters, leaves, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(leaves, eps)

    def forward(self, x):
        """[B, C, h, w] -> [B, W, h, w]."""
        return self.bn(self.conv(x).movedim(1, -1)).movedim(-1, 1)


# ------------------------------------------------------------------------------------ resamplers: tokens have no place


class Perceiver(nn.Module):
    """Latents look at the patches and at one another (LLaVA-NeXT, after Flamingo, arXiv 2204.14198)."""

    def __init__(self, c):
        super().__init__()
        self.heads, width = c.heads, c.in_width

        def block():
            looks = nn.Module()
            looks.norm_media, looks.norm_latents = nn.LayerNorm(width, c.norm_eps), nn.LayerNorm(width, c.norm_eps)
            looks.to_q = nn.Linear(width, c.width, bias=False)
            looks.to_kv = nn.Linear(width, 2 * c.width, bias=False)
            looks.to_out = nn.Linear(c.width, width, bias=False)
            up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            return nn.ModuleList([looks, nn.Sequential(nn.LayerNorm(width, c.norm_eps), up, nn.GELU(), down)])

        inner = nn.Module()
        inner.latents = nn.Parameter(torch.zeros(c.queries, width))
        inner.layers = nn.ModuleList([block() for _ in range(c.depth)])
        inner.norm = nn.LayerNorm(width, c.norm_eps)
        self.vision_resampler = nn.ModuleDict({"perceiver": inner})
        self.mm_projector = two_layers(width, c.out_width, c.act, c.bias)

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        inner = self.vision_resampler["perceiver"]
        latents = inner.latents.expand(len(x), -1, -1)
        for looks, feed in inner.layers:
            own = looks.norm_latents(latents)
            key, value = looks.to_kv(torch.cat([looks.norm_media(x), own], dim=1)).chunk(2, dim=-1)
            latents = latents + looks.to_out(attention(looks.to_q(own), key, value, self.heads))
            latents = latents + feed(latents)
        return self.mm_projector(inner.norm(latents))


class Honeybee(nn.Module):
    """Honeybee's resampler (arXiv 2312.06742): what is added to is the normed query, not the query."""

    def __init__(self, c):
        super().__init__()
        self.heads, w = c.heads, c.width

        def block():
            looks, output, mlp, cross = nn.Module(), nn.Module(), nn.Module(), nn.Module()
            looks.query, looks.key, looks.value = (nn.Linear(w, w) for _ in range(3))
            mlp.w1, mlp.w2, mlp.w3 = nn.Linear(w, 4 * w), nn.Linear(4 * w, w), nn.Linear(w, 4 * w)
            mlp.ffn_ln = nn.LayerNorm(4 * w, 1e-6)
            output.out_proj, output.norm2, output.mlp = nn.Linear(w, w), nn.LayerNorm(w, c.norm_eps), mlp
            cross.norm1, cross.normk = nn.LayerNorm(w, c.norm_eps), nn.LayerNorm(w, c.norm_eps)
            cross.attention, cross.output = looks, output
            return nn.ModuleDict({"crossattention": cross})

        inner = nn.Module()
        inner.query_tokens = nn.Parameter(torch.zeros(1, c.queries, w))
        inner.visual_input_fc, inner.visual_output_fc = nn.Linear(c.in_width, w), nn.Linear(w, c.out_width)
        inner.encoder = nn.ModuleDict({"layers": nn.ModuleList([block() for _ in range(c.depth)])})
        self.abstractor = inner

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        inner = self.abstractor
        queries, x = inner.query_tokens.expand(len(x), -1, -1), inner.visual_input_fc(x)
        for block in inner.encoder["layers"]:
            cross = block["crossattention"]
            looks, output, mlp = cross.attention, cross.output, cross.output.mlp
            queries = cross.norm1(queries)
            both = torch.cat([queries, cross.normk(x)], dim=1)
            found = attention(looks.query(queries), looks.key(both), looks.value(both), self.heads)
            queries = queries + output.out_proj(found)
            own = output.norm2(queries)
            queries = queries + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(own)) * mlp.w3(own)))
        return inner.visual_output_fc(queries)


class QFormer(nn.Module):
    """BLIP-2's Q-Former (arXiv 2301.12597) without its text side; its even layers look at the patches."""

    def __init__(self, c):
        super().__init__()
        self.heads, w = c.heads, c.width

        def looks(reads):
            part = nn.Module()
            part.attention, part.output = nn.Module(), nn.Module()
            part.attention.query = nn.Linear(w, w)
            part.attention.key, part.attention.value = nn.Linear(reads, w), nn.Linear(reads, w)
            part.output.dense, part.output.LayerNorm = nn.Linear(w, w), nn.LayerNorm(w, c.norm_eps)
            return part

        def layer(number):
            part = nn.Module()
            part.attention = looks(w)
            part.crossattention = looks(c.in_width) if number % 2 == 0 else None
            part.intermediate_query, part.output_query = nn.Module(), nn.Module()
            part.intermediate_query.dense = nn.Linear(w, 4 * w)
            part.output_query.dense, part.output_query.LayerNorm = nn.Linear(4 * w, w), nn.LayerNorm(w, c.norm_eps)
            return part

        self.query_tokens = nn.Parameter(torch.zeros(1, c.queries, w))
        self.qformer = nn.Module()
        self.qformer.layernorm = nn.LayerNorm(w, c.norm_eps)
        self.qformer.encoder = nn.ModuleDict({"layer": nn.ModuleList([layer(i) for i in range(c.depth)])})
        self.language_projection = nn.Linear(w, c.out_width)

    def forward(self, x, levels=()):
        """[B, P, C] -> [B, N', D]."""
        queries = self.qformer.layernorm(self.query_tokens).expand(len(x), -1, -1)
        for layer in self.qformer.encoder["layer"]:
            queries = self.look(layer.attention, queries, queries)
            queries = queries if layer.crossattention is None else self.look(layer.crossattention, queries, x)
            hidden = F.gelu(layer.intermediate_query.dense(queries))
            queries = layer.output_query.LayerNorm(queries + layer.output_query.dense(hidden))
        return self.language_projection(queries)

    def look(self, part, queries, x):
        """Attention, and the norm behind the sum."""
        maps = part.attention
        found = attention(maps.query(queries), maps.key(x), maps.value(x), self.heads)
        return part.output.LayerNorm(queries + part.output.dense(found))


PROJECTORS = {
    "mlp": MLP,
    "avgpool": AveragePool,
    "ldpv2": LDPv2,
    "tokenpacker": TokenPacker,
    "pixel_shuffle": PixelShuffle,
    "c_abstractor": CAbstractor,
    "perceiver": Perceiver,
    "honeybee": Honeybee,
    "q_former": QFormer,
}
