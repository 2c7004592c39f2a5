"""VisMem (arXiv 2511.11007): short and long latent memories that a model calls for while it generates.

The vocabulary gets four control tokens. When the policy emits an invocation token, the hidden states of the images and
of the text since the last memory become queries (`query_builder`), a former (the backbone itself with one of two LoRA
adapters, `former`) turns them into vectors, these are spliced into the stream, and the matching end token follows by
itself. This file holds what VisMem consists of: its settings, its parameters and its four rows of the vocabulary. The
insertion while decoding is `jaxmem.sampling.insertion`.

Parameters: query_builder (`query_builder.init`), slots_short [N_s, D], slots_long [N_l, D], short and long (LoRA
factors at the paths of the decoder's kernels, stacked over layers), rows {embed, unembed}{invoke, end} [2, D], where
index 0 is short and 1 is long; `unembed` is absent when the backbone is tied. out_scale, a scalar, with `out_norm`.
Axis letters: B rows, T tokens, Y visual states, D model width, L layers, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmem.adapters.lora import FACTOR
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.ports import Ports
from jaxmem.errors import ConfigError
from jaxmem.memory import former, query_builder
from jaxmem.memory.former import Seen
from jaxmem.memory.query_builder import QueryBuilderConfig

SHORT, LONG = 0, 1
TYPES = ("short", "long")
CONTROL = ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")
"""Short invocation, short end, long invocation, long end: their ids follow the tokenizer's last one in this order."""
KERNELS = {
    **{name: f"layers/attention/{name}" for name in "qkvo"},
    **{n: f"layers/ffn/{n}" for n in ("gate", "up", "down")},
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    # What the released code computes once its crashes are repaired.
    "official": {
        "short_targets": ("q", "k", "v", "o"),
        "long_targets": ("q", "k", "v", "o"),
        "visual_source": "llm_last",
        "visual_spans": "first",
        "overflow": "error",
        "twin_layers": True,
        "row_token": "<|im_end|>",
    },
}


@dataclasses.dataclass(frozen=True)
class VisMemConfig:
    """One VisMem. `create` fills what follows from the backbone.

    Attributes:
      width, depth, heads, kv_heads, head_dim, mlp_width: sizes of the decoder, D and L among them.
      vocab: tokens of the tokenizer, V_tok; the control tokens have the ids V_tok to V_tok + 3.
      tied: the backbone's head is its embedding, so control tokens have one row each.
      vision_start, vision_end: ids around an image.
      preset: "paper" or "official"; says where the other defaults came from.
      queries: K.
      short, long: N_s and N_l, vectors of a memory.
      builder_layers, builder_heads, builder_ff, builder_length, builder_residual, twin_layers: of the query builder.
      rank, alpha: of the adapters, whose updates are scaled by alpha / rank.
      short_targets, long_targets: kernels that each adapter updates.
      visual_source: "vision_merger": the embedded tokens of an image's span (paper); "llm_last": the decoder's states
        there, after the final norm (official).
      visual_spans: "all" images of the prompt, or the "first".
      text_cap: of the text's states the last so many count.
      overflow: visual states beyond `visual_cap` are taken at a uniform stride ("subsample") or refused ("error").
      backprop_hidden: gradients flow into the states that a memory is formed of.
      out_norm: memories are scaled to the size of embeddings, times a learned scalar.
      row_token: whose rows the control tokens start from, with noise of standard deviation `row_noise`.
      row_id: id of `row_token`; -1 (or no `row_token`) starts from N(0, 0.02^2).
      invoke_bias: added to the logits of both invocation tokens.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    tied: bool
    vision_start: int
    vision_end: int
    preset: str = "paper"
    queries: int = 8
    short: int = 8
    long: int = 16
    builder_layers: int = 2
    builder_heads: int = 8
    builder_ff: int = 4
    builder_length: int = 2048
    builder_residual: Literal["prenorm", "paper_eq10"] = "prenorm"
    twin_layers: bool = False
    rank: int = 16
    alpha: float = 32.0
    short_targets: tuple[str, ...] = ("q", "v")
    long_targets: tuple[str, ...] = ("q", "v")
    visual_source: Literal["vision_merger", "llm_last"] = "vision_merger"
    visual_spans: Literal["all", "first"] = "all"
    text_cap: int = 1024
    overflow: Literal["subsample", "error"] = "subsample"
    backprop_hidden: bool = False
    out_norm: bool = False
    row_token: str | None = "."
    row_noise: float = 1e-3
    row_id: int = -1
    invoke_bias: float = 0.0
    name: str = "vismem"

    @property
    def layers(self) -> tuple[int, ...]:
        """The lowest decoder layer that its parameters act on: memories enter in front of the first."""
        return (0,)

    @property
    def builder(self) -> QueryBuilderConfig:
        """Of the query builder."""
        return QueryBuilderConfig(
            width=self.width,
            queries=self.queries,
            layers=self.builder_layers,
            heads=self.builder_heads,
            ff_mult=self.builder_ff,
            max_length=self.builder_length,
            residual=self.builder_residual,
            twin_layers=self.twin_layers,
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Vectors of a short and of a long memory."""
        return self.short, self.long

    @property
    def longest(self) -> int:
        """Vectors of the longer memory."""
        return max(self.sizes)

    @property
    def visual_cap(self) -> int:
        """Visual states that fit into the query builder beside the text's and the queries."""
        return self.builder_length - self.text_cap - self.queries

    @property
    def invoke_ids(self) -> tuple[int, int]:
        """Ids of the invocation tokens, short and long."""
        return self.vocab, self.vocab + 2

    @property
    def end_ids(self) -> tuple[int, int]:
        """Ids of the end tokens, short and long."""
        return self.vocab + 1, self.vocab + 3


def create(backbone: BackboneConfig, *, preset: str = "paper", **overrides: Any) -> VisMemConfig:
    """The VisMem that fits a backbone.

    Args:
      backbone: gives the sizes.
      preset: "paper" or "official".
      **overrides: fields of VisMemConfig; `vocab` should be the tokenizer's length (`Model.attach` sees to that).

    Raises:
      ConfigError: an unknown preset, field or target, or sizes that do not fit.
    """
    fields = {field.name for field in dataclasses.fields(VisMemConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"vismem has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    if preset not in PRESETS:
        raise ConfigError(f"vismem.preset: {preset!r} is none of {', '.join(PRESETS)}")
    text = backbone.text
    settings: dict[str, Any] = {
        "width": text.width,
        "depth": text.layers,
        "heads": text.heads,
        "kv_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "mlp_width": text.mlp_width,
        "vocab": text.vocab,
        "tied": text.tied,
        "vision_start": backbone.vision_start_token,
        "vision_end": backbone.vision_end_token,
        **PRESETS[preset],
        **overrides,
    }
    for name in ("short_targets", "long_targets"):
        settings[name] = tuple(settings.get(name, ("q", "v")))
    config = VisMemConfig(preset=preset, **settings)
    _check(config, text.vocab)
    return config


def _check(config: VisMemConfig, vocab: int) -> None:
    targets = [*config.short_targets, *config.long_targets]
    faults = {
        f"vocab {config.vocab} exceeds the backbone's {vocab} rows": config.vocab > vocab,
        f"targets {sorted(set(targets) - set(KERNELS))} are none of {', '.join(KERNELS)}": set(targets) - set(KERNELS),
        "short_targets and long_targets must name a kernel each": not config.short_targets or not config.long_targets,
        "queries, short, long, rank and text_cap must be at least 1": (
            min(config.queries, *config.sizes, config.rank, config.text_cap) < 1
        ),
        f"builder_length {config.builder_length} leaves no place for an image beside text_cap {config.text_cap} and "
        f"{config.queries} queries": config.visual_cap < 1,
        f"width {config.width} is not a multiple of {config.builder_heads} builder_heads": (
            config.width % config.builder_heads
        ),
        f"visual_source {config.visual_source!r}": config.visual_source not in ("vision_merger", "llm_last"),
        f"visual_spans {config.visual_spans!r}": config.visual_spans not in ("all", "first"),
        f"overflow {config.overflow!r}": config.overflow not in ("subsample", "error"),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("vismem: " + "; ".join(wrong))


def init(key: Array, config: VisMemConfig, base: Any = None) -> Any:
    """Fresh float32 parameters (see the head of this file).

    LoRA factors start as no change, a uniform and b zero, so that a memory is the frozen decoder's output. Rows start
    as those of `row_token`, input and output rows each from their own matrix (section 1.2).

    Args:
      key: random key.
      config: sizes (static).
      base: backbone whose rows are copied; without one, or without a `row_id`, rows are N(0, 0.02^2).
    """
    keys = jax.random.split(key, 7)
    normal = lambda k, *shape: 0.02 * jax.random.normal(k, shape)  # noqa: E731
    params = {
        "query_builder": query_builder.init(keys[0], config.builder),
        "slots_short": normal(keys[1], config.short, config.width),
        "slots_long": normal(keys[2], config.long, config.width),
        "short": _factors(keys[3], config, config.short_targets),
        "long": _factors(keys[4], config, config.long_targets),
        "rows": {"embed": _rows(keys[5], config, base, "embed")},
    }
    if not config.tied:
        params["rows"]["unembed"] = _rows(keys[6], config, base, "head")
    if config.out_norm:
        size = 0.02 if base is None else jnp.sqrt(jnp.mean(jnp.square(base["embed"].astype(jnp.float32))))
        params["out_scale"] = jnp.asarray(size, jnp.float32)
    return params


def _rows(key: Array, config: VisMemConfig, base: Any, table: str) -> dict[str, Array]:
    """{"invoke", "end"} [2, D]."""
    names, shape = ("invoke", "end"), (2, config.width)
    if base is None or config.row_id < 0:
        return {n: 0.02 * jax.random.normal(k, shape) for n, k in zip(names, jax.random.split(key), strict=True)}
    row = base[table][config.row_id].astype(jnp.float32)
    noise = lambda k: config.row_noise * jax.random.normal(k, shape)  # noqa: E731
    return {n: row + noise(k) for n, k in zip(names, jax.random.split(key), strict=True)}


def _factors(key: Array, config: VisMemConfig, targets: tuple[str, ...]) -> dict[str, Any]:
    """Factors {"layers": {group: {kernel: {lora_a [L, I, R], lora_b [L, R, O]}}}}."""
    attended, kept = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ffn = config.mlp_width
    sizes = {
        **{"q": (config.width, attended), "k": (config.width, kept), "v": (config.width, kept)},
        **{"o": (attended, config.width), "gate": (config.width, ffn), "up": (config.width, ffn)},
        "down": (ffn, config.width),
    }
    tree: dict[str, Any] = {}
    for name, k in zip(targets, jax.random.split(key, len(targets)), strict=True):
        (_, group, kernel), (inputs, outputs) = KERNELS[name].split("/"), sizes[name]
        a = FACTOR(k, (config.depth, inputs, config.rank), jnp.float32)
        tree.setdefault(group, {})[kernel] = {"lora_a": a, "lora_b": jnp.zeros((config.depth, config.rank, outputs))}
    return {"layers": tree}


def table(rows: dict[str, Array]) -> Array:
    """{"invoke", "end"} [2, D] -> [4, D] in the order of `CONTROL`."""
    return jnp.stack([rows["invoke"], rows["end"]], axis=1).reshape(4, -1)


def embed(config: VisMemConfig, params: Any, embedding: Array, tokens: Array) -> Array:
    """Embeddings [..., D] of token ids [...] below V_tok + 4, of the backbone's table [V, D] and the four rows."""
    own = tokens - config.vocab
    rows = table(params["rows"]["embed"]).astype(embedding.dtype)
    return jnp.where((own >= 0)[..., None], rows[jnp.clip(own, 0, 3)], embedding[jnp.minimum(tokens, config.vocab - 1)])


def unembedding(config: VisMemConfig, params: Any) -> Array:
    """Output rows [4, D] of the control tokens: the input rows when tied."""
    return table(params["rows"]["embed" if config.tied else "unembed"])


def control_logits(config: VisMemConfig, params: Any, hidden: Array) -> Array:
    """float32 [..., 4] from normalised states [..., D]."""
    rows = unembedding(config, params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, rows, preferred_element_type=jnp.float32) + bias(config)


def bias(config: VisMemConfig) -> Array:
    """[4] float32, added to the logits of the control tokens."""
    return config.invoke_bias * jnp.asarray([1.0, 0.0, 1.0, 0.0])


def prepare(config: VisMemConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing: what VisMem keeps of a prompt (`seen`) is known once the decoder has read it."""


def seen(config: VisMemConfig, batch: Batch, embedded: Array, hidden: Array) -> Seen | None:
    """What memories are formed of, of a prompt that was read: its images (section 1.3).

    Args:
      config: static.
      batch: the prompts.
      embedded: [B, T, D] embeddings, visual rows in place.
      hidden: [B, T, D] states after the final norm.

    Returns:
      Seen with Y = min(T, visual_cap) rows; None without images.
    """
    if not batch.patches.shape[1]:
        return None
    return former.gather(config, batch, embedded if config.visual_source == "vision_merger" else hidden)


def append(old: Seen | None, new: Seen | None) -> Seen | None:
    """What is kept of a prompt whose next turn was not read yet; behind it comes `joined`."""
    return old if new is None else new


def joined(config: VisMemConfig, old: Seen | None, new: Seen | None) -> Seen | None:
    """What is kept (`seen`) of a prompt and another turn together."""
    return former.joined(config, old, new)


def take(state: Seen | None, rows: Array) -> Seen | None:
    """The state of some rows [W] of the batch."""
    return jax.tree.map(lambda leaf: leaf[rows], state)


def ports(config: VisMemConfig, params: Any, state: Any, stream: Stream, dropout: Array | None = None) -> Ports:
    """None: VisMem acts between tokens, not within layers."""
    return Ports()
