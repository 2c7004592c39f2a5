"""The layers of Vision Remember (arXiv 2506.03928): fused features of the tower, and one block behind a decoder layer.

`c` is `config.jaxmem["memory"]`, the settings that the memory was trained with.

Letters: N vision tokens of a batch, one after the other; K keys of a window; C channels of the fused features, W of the
tower; D width of the decoder, d = h * H inner width of attention with h heads; R rows of the batch.
"""

import torch
from torch import nn

EPS = 1e-6


def attention(query, key, value, heads):
    """Multi-head attention of [n, d] to two of [m, d]: every query sees every key."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


class Fusion(nn.Module):
    """Hidden states of the tower, normed and joined: "concat", "concat_linear" or "weighted_sum"."""

    def __init__(self, c):
        super().__init__()
        count, width = len(c["levels"]), c["tower_width"]
        self.mode, self.each = c["fusion"], c["level_norm"] == "each"
        if self.each:
            self.norms = nn.ModuleList([nn.LayerNorm(width, EPS) for _ in range(count)])
        else:
            self.norm = nn.LayerNorm(count * width, EPS)
        if self.mode == "concat_linear":
            self.linear = nn.Linear(count * width, width, bias=False)
        if self.mode == "weighted_sum":
            self.weights = nn.Parameter(torch.full((count,), 1 / count))

    def forward(self, levels):
        """A list of [..., W] -> [..., C]."""
        if self.each:
            levels = [norm(level) for norm, level in zip(self.norms, levels, strict=True)]
            joined = torch.cat(levels, dim=-1)
        else:
            joined = self.norm(torch.cat(list(levels), dim=-1))
            levels = joined.chunk(len(levels), dim=-1)
        if self.mode == "weighted_sum":
            return sum(weight * level for weight, level in zip(self.weights, levels, strict=True))
        return self.linear(joined) if self.mode == "concat_linear" else joined


class CrossAttention(nn.Module):
    """Every token asks the features of its own window (or of its whole tile), and no others.

    scores = (LN(x) Wq)(f Wk)^T / sqrt(H) + bias; a = softmax over the window; out = (a f Wv) Wo + b; f = LN(features).
    """

    def __init__(self, c, channels, keys):
        super().__init__()
        self.heads, width, inner = c["heads"], c["width"], c["inner"]
        self.norm_query, self.norm_key = nn.LayerNorm(width, EPS), nn.LayerNorm(channels, EPS)
        self.q = nn.Linear(width, inner, bias=False)
        self.k, self.v = nn.Linear(channels, inner, bias=False), nn.Linear(channels, inner, bias=False)
        self.o = nn.Linear(inner, width)
        self.positions = c["positions"] if keys else "none"
        if self.positions == "bias":
            self.position = nn.Parameter(torch.zeros(self.heads, keys))
        if self.positions == "embedding":
            self.position = nn.Parameter(torch.zeros(keys, channels))
        self.saliency = nn.Linear(channels, self.heads, bias=False) if c["saliency"] == "bias" else None
        self.gate = nn.Parameter(torch.zeros(width if c["gate_shape"] == "vector" else 1))

    def forward(self, x, windows, mask):
        """x [N, D], windows [N, K, C], mask [N, K] bool -> what is added to x, in front of the gate."""
        seen = self.norm_key(windows)
        seen = seen + self.position if self.positions == "embedding" else seen
        query = self.q(self.norm_query(x)).unflatten(-1, (self.heads, -1))
        key, value = (linear(seen).unflatten(-1, (self.heads, -1)) for linear in (self.k, self.v))
        scores = torch.einsum("nhc,nkhc->nhk", query, key).float() * query.shape[-1] ** -0.5
        if self.positions == "bias":
            scores = scores + self.position
        if self.saliency is not None:
            scores = scores + self.saliency(seen).transpose(1, 2)
        shares = scores.masked_fill(~mask[:, None], -1e30).softmax(dim=-1).to(value.dtype)
        return self.o(torch.einsum("nhk,nkhc->nhc", shares, value).flatten(1))

    def whole(self, x, features):
        """The same of tokens [n, D] that all see the same features [P, C], of a whole tile or frame."""
        seen = self.norm_key(features)
        maps = (self.q, self.norm_query(x)), (self.k, seen), (self.v, seen)
        return self.o(attention(*(linear(part) for linear, part in maps), self.heads))


class SelfAttention(nn.Module):
    """Tokens of an image ask each other in both directions, and the token that stands for the question (v2)."""

    def __init__(self, c):
        super().__init__()
        self.heads, width, inner = c["heads"], c["width"], c["inner"]
        self.norm = nn.LayerNorm(width, EPS)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width)
        self.gate = nn.Parameter(torch.zeros(width if c["gate_shape"] == "vector" else 1))

    def forward(self, x, text):
        """The tokens of one image [n, D], and the question's [1, D] or None -> what is added to x."""
        both = self.norm(x if text is None else torch.cat([x, text.to(x)]))
        return self.o(attention(self.q(both[: len(x)]), self.k(both), self.v(both), self.heads))


class FeedForward(nn.Module):
    """D -> d -> D with GELU."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c["width"], EPS)
        self.fc1, self.fc2 = nn.Linear(c["width"], c["inner"]), nn.Linear(c["inner"], c["width"])

    def forward(self, x):
        """[N, D] -> [N, D]."""
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class TextToken(nn.Module):
    """What stands for the question of a prompt, from the states of its tokens alone."""

    def __init__(self, c):
        super().__init__()
        self.mode, width = c["text_token"], c["width"]
        if self.mode == "question_mean":
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        if self.mode == "attn_pool":
            self.query = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        """The question's tokens [n, D] -> [1, D]."""
        if self.mode == "last_prompt_token":
            return x[-1:]
        wide = x.float()
        if self.mode == "attn_pool":
            shares = (wide @ self.query.float() * x.shape[-1] ** -0.5).softmax(dim=0)
            return (shares @ wide)[None].to(x.dtype)
        mean = wide.mean(dim=0, keepdim=True)
        return nn.functional.layer_norm(mean, mean.shape[1:], self.weight.float(), self.bias.float(), EPS).to(x.dtype)


class Block(nn.Module):
    """What happens behind one decoder layer."""

    def __init__(self, c, channels, keys):
        super().__init__()
        self.cross = CrossAttention(c, channels, keys)
        self.bidirectional = SelfAttention(c) if c["bidirectional"] else None
        self.text = TextToken(c) if c["bidirectional"] and c["text_token"] != "none" else None
        self.ffn = FeedForward(c) if c["ffn"] else None
        self.self_first = c["order"] == "self_then_cross"

    def forward(self, x, tokens, questions):
        """The residual stream with the rows of vision tokens rewritten; every other row stays as it is.

        Args:
          x: [R, T, D].
          tokens: `VisionTokens` of the prompts.
          questions: the places of each row's question, R tensors; None for a block that does not read it.
        """
        texts = None if self.text is None else {row: self.text(x[row, questions[row]]) for row in tokens.in_rows}
        steps = [self.look] if self.bidirectional is None else [lambda z, tokens: self.ask(z, tokens, texts), self.look]
        z = x[tokens.rows, tokens.places]
        for step in steps if self.self_first else steps[::-1]:
            z = z + step(z, tokens)
        if self.ffn is not None:
            z = z + gated(self.cross.gate, self.ffn(z))
        return x.index_put((tokens.rows, tokens.places), z.to(x.dtype))

    def look(self, z, tokens):
        """Every token asks what it may see."""
        if tokens.windows is not None:
            return gated(self.cross.gate, self.cross(z, tokens.windows, tokens.mask))
        found = torch.zeros_like(z)
        for members, features in tokens.wholes:
            found[members] = self.cross.whole(z[members], features)
        return gated(self.cross.gate, found)

    def ask(self, z, tokens, texts):
        """The tokens of an image ask each other and the question of their row."""
        found = torch.zeros_like(z)
        for row, members in tokens.images:
            found[members] = self.bidirectional(z[members], None if texts is None else texts[row])
        return gated(self.bidirectional.gate, found)


def gated(gate, found):
    """tanh(gate) * found."""
    return gate.tanh().to(found.dtype) * found


class VisionRemember(nn.Module):
    """All of the memory's weights."""

    def __init__(self, c):
        super().__init__()
        channels = c["tower_width"] * (len(c["levels"]) if c["fusion"] == "concat" else 1)
        ratio = c["cells"]["ratio"]
        keys = (ratio + 2 * margin(c)) ** 2 if c["local"] else 0
        self.fusion = Fusion(c)
        self.blocks = nn.ModuleList([Block(c, channels, keys) for _ in c["layers"]])


def margin(c):
    """Patches around a window that it sees too."""
    return int(c["cells"]["ratio"] == 1) if c["halo"] is None else c["halo"]
