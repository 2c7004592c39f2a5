"""What VisMem adds to its backbone: the query builder, two adapters, learned slots, and rows of four control tokens.

`settings` is `config.jaxmem["memory"]` of the exported folder, as attributes.
Letters: H hidden states of images and text, K queries, N vectors of a memory, D model width, R rank of an adapter.
"""

import contextlib

import torch
from torch import nn

KINDS = ("short", "long")
MODULES = {
    **{name: ("self_attn", f"{name}_proj") for name in "qkvo"},
    **{name: ("mlp", f"{name}_proj") for name in ("gate", "up", "down")},
}
"""Where in a decoder layer the Linear is that a target of the settings names."""


class QueryBuilder(nn.Module):
    """Hidden states of images and text become K queries: a pre-norm encoder over [H ; Q] (equations 10 and 11).

    Hidden states attend to each other, queries to those and to one another.
    """

    def __init__(self, settings):
        super().__init__()
        width = settings.width
        self.q_init = nn.Parameter(torch.zeros(settings.queries, width))
        self.pos_emb = nn.Parameter(torch.zeros(1, settings.builder_length, width))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(settings) for _ in range(settings.builder_layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, hidden):
        """[H, D] -> [K, D]."""
        count, length = len(hidden), len(hidden) + len(self.q_init)
        if length > self.pos_emb.shape[1]:
            raise ValueError(f"{count} hidden states: with the queries at most {self.pos_emb.shape[1]} have positions")
        x = torch.cat([hidden, self.q_init.to(hidden)]) + self.pos_emb[0, :length].to(hidden)
        place = torch.arange(length, device=x.device)
        mask = (place < count) | (place[:, None] >= count)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return self.ln(x)[count:]


class EncoderLayer(nn.Module):
    """a = x + MHA(LN(x)); a + FF(LN(a)), or with `builder_residual` "paper_eq10" x + FF(LN(a)), as printed."""

    def __init__(self, settings):
        super().__init__()
        width, inner = settings.width, settings.builder_ff * settings.width
        self.self_attn = SelfAttention(width, settings.builder_heads)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.as_printed = settings.builder_residual == "paper_eq10"

    def forward(self, x, mask):
        """[S, D], mask [S, S] bool -> [S, D]."""
        after = x + self.self_attn(self.norm1(x), mask)
        grown = nn.functional.gelu(self.linear1(self.norm2(after)))
        return (x if self.as_printed else after) + self.linear2(grown)


class SelfAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        """[S, D], mask [S, S] bool -> [S, D]."""
        parts = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = parts
        found = nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], mask)[0]
        return self.out_proj(found.transpose(0, 1).flatten(1))


class Adapter(nn.Module):
    """LoRA factors beside one Linear of the decoder: silent but for the memory type that is `on`."""

    def __init__(self, linear, kinds, rank, scale):
        super().__init__()
        self.scale, self.on = scale, None
        inputs, outputs = linear.in_features, linear.out_features
        self.lora_A = nn.ModuleDict({f"{kind}_former": nn.Linear(inputs, rank, bias=False) for kind in kinds})
        self.lora_B = nn.ModuleDict({f"{kind}_former": nn.Linear(rank, outputs, bias=False) for kind in kinds})
        linear.register_forward_hook(self._add)

    def _add(self, linear, args, out):
        name = f"{self.on}_former"
        return out + self.scale * self.lora_B[name](self.lora_A[name](args[0])) if name in self.lora_A else out


class VisMem(nn.Module):
    """All parameters of a VisMem; the decoder's own stay with the decoder, of which there is one copy."""

    def __init__(self, settings, decoder):
        super().__init__()
        self.query_builder = QueryBuilder(settings)
        self.m_init_short = nn.Parameter(torch.zeros(1, settings.short, settings.width))
        self.m_init_long = nn.Parameter(torch.zeros(1, settings.long, settings.width))
        self.layers = nn.ModuleList(_adapters(settings, layer) for layer in decoder.layers)
        self.mem_embed = _rows(settings.width)
        self.mem_unembed = None if settings.tied else _rows(settings.width)
        self.out_scale = nn.Parameter(torch.ones(())) if settings.out_norm else None

    def embeddings(self):
        """[4, D] of the control tokens: short invocation, short end, long invocation, long end."""
        return torch.stack([self.mem_embed["invoke"], self.mem_embed["end"]], dim=1).flatten(0, 1)

    def unembeddings(self):
        """[4, D] rows of the head; those of the embedding where the backbone's are one table."""
        rows = self.mem_embed if self.mem_unembed is None else self.mem_unembed
        return torch.stack([rows["invoke"], rows["end"]], dim=1).flatten(0, 1)

    def slots(self, kind):
        """[N, D]."""
        return (self.m_init_short if kind == "short" else self.m_init_long)[0]

    @contextlib.contextmanager
    def adapter(self, kind):
        """A block in which the decoder is the former of one memory type; elsewhere it is the policy."""
        adapters = [module for module in self.layers.modules() if isinstance(module, Adapter)]
        for adapter in adapters:
            adapter.on = kind
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.on = None


def _rows(width):
    """Index 0 is short, 1 is long."""
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(2, width)) for name in ("invoke", "end")})


def _adapters(settings, layer):
    """Adapters of one decoder layer, under the names of its modules."""
    targets = {"short": settings.short_targets, "long": settings.long_targets}
    beside = nn.Module()
    for target, (group, name) in MODULES.items():
        kinds = [kind for kind in KINDS if target in targets[kind]]
        if not kinds:
            continue
        if not hasattr(beside, group):
            setattr(beside, group, nn.Module())
        linear = getattr(getattr(layer, group), name)
        setattr(getattr(beside, group), name, Adapter(linear, kinds, settings.rank, settings.alpha / settings.rank))
    return beside
