"""CoMEM (arXiv 2505.17670): knowledge items, each an image with text, as a few embeddings in front of the prompt.

The backbone with LoRA factors reads an item (`item_encoder`), a Q-Former compresses its last hidden states to M vectors
(`q_former`), and the vectors of a row's items stand in front of its prompt like tokens of their own (`prefix`), with
the positions 0, 1, 2, ...; the prompt's own positions follow. The model that answers is the bare backbone. Items do not
depend on questions: their embeddings can be kept (`jaxmem.retrieval.bank`).

In the transfer to a text-only model (section 4) the encoder is a second backbone, whose weights lie beside those of
the model that answers, at base["encoder"]. It reads the prompt too, for the model that cannot see it: the last hidden
states of the prompt (and of nothing behind it: `jaxmem.data.query`) stand between the items' vectors and the text.

Parameters: encoder (LoRA factors at the paths of the kernels), q_former (`q_former.init`), and adapter {kernel [D, W]},
where the model that answers has another width W than the encoder.
Axis letters: B rows, K items of a row, N items, L tokens of an item, M vectors of an item, T tokens, Q tokens of a
prompt as the encoder reads it, D width of the encoder, W width of the model that answers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmem.backbones import registry
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Remat, Stream
from jaxmem.backbones.ports import Ports
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import item_encoder, q_former
from jaxmem.memory.item_encoder import Kernel
from jaxmem.memory.q_former import QFormerConfig

PARTS = ("layers", "visual/blocks", "visual/merger", "visual/deepstack")
"""Parts of a backbone whose kernels get factors by default: all but the patch embedding and the head."""
LATER = {"later": True}
"""Of fields that older files lack: at their defaults they are left out of what identifies a memory."""


@dataclasses.dataclass(frozen=True)
class CoMEMConfig:
    """One CoMEM. `create` fills what follows from the backbone.

    Attributes:
      width: D of the encoder.
      target_width: W of the model that answers; a linear map follows the Q-Former where it differs.
      kernels: what gets factors (`item_encoder.kernels`), from `parts`.
      latents, depth, heads, head_dim, ff_mult, shared: of the Q-Former (`QFormerConfig`).
      rank, alpha: of the factors, whose updates are scaled by alpha / rank; rank 0 trains the Q-Former alone.
      dropout: of the factors' inputs, in training.
      parts: of the backbone, whose kernels get factors.
      encoder_layers: decoder layers that read an item; 0 is all.
      suffix: what the user says behind an item's images.
      text_limit: characters of an item's text that are read.
      squash: an image with a longer side becomes a square of this many pixels; 0 keeps it.
      item_min_pixels, item_max_pixels: replace the folder's limits for the images of items; 0 leaves them.
      order: "rank": the best item stands first; "reverse": next to the prompt (the released evaluation).
      query_tower: the images of prompts are seen by the "frozen" tower, or by the "encoder"'s (the released code).
      decode_shift: positions that generated tokens are moved by, instead of the vectors' number: 8000 or 4000 in the
        released code; None is right.
      bf16_positions: positions lose digits, as in the released code.
      encoder: the backbone that reads items, where it is not the model that answers.
      query: such an encoder reads the prompts too; otherwise a model that cannot see images gets the text alone.
    """

    width: int
    target_width: int
    kernels: tuple[Kernel, ...]
    latents: int = 8
    depth: int = 8
    heads: int = 16
    head_dim: int = 224
    ff_mult: int = 4
    shared: bool = True
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    parts: tuple[str, ...] = PARTS
    encoder_layers: int = 0
    suffix: str = " Similar image and text knowledge for reference"
    text_limit: int = 5000
    squash: int = 512
    item_min_pixels: int = 0
    item_max_pixels: int = 0
    order: Literal["rank", "reverse"] = "rank"
    query_tower: Literal["frozen", "encoder"] = "frozen"
    decode_shift: int | None = None
    bf16_positions: bool = False
    encoder: BackboneConfig | None = dataclasses.field(default=None, metadata=LATER)
    query: bool = dataclasses.field(default=True, metadata=LATER)
    name: str = "comem"

    @property
    def layers(self) -> tuple[int, ...]:
        """The lowest decoder layer that its parameters act on: vectors enter in front of the first."""
        return (0,)

    @property
    def q_former(self) -> QFormerConfig:
        """Of the compressor."""
        return QFormerConfig(
            width=self.width,
            in_width=self.width,
            latents=self.latents,
            depth=self.depth,
            heads=self.heads,
            head_dim=self.head_dim,
            ff_mult=self.ff_mult,
            shared=self.shared,
        )


def create(backbone: BackboneConfig, **overrides: Any) -> CoMEMConfig:
    """The CoMEM that fits a backbone.

    Args:
      backbone: of the model that answers.
      **overrides: fields of CoMEMConfig. The encoder (the backbone itself without one) gives the sizes; heads of the
        Q-Former are width / 16 wide, as published, unless `head_dim` says else.

    Raises:
      ConfigError: an unknown field, or values that do not fit.
    """
    fields = {field.name for field in dataclasses.fields(CoMEMConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(
            f"comem has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields - {'kernels'}))}"
        )
    encoder = overrides.get("encoder")
    if not isinstance(encoder, BackboneConfig | None):
        raise ConfigError(
            "comem.encoder is not a folder: put the model that reads items beside the one that answers"
            " (model.with_encoder(...), in a training run config.encoder)"
        )
    reads, heads = encoder or backbone, overrides.get("heads", 16)
    width = reads.text.width
    settings: dict[str, Any] = {
        "target_width": backbone.text.width,
        "head_dim": max(1, width // max(1, heads)),
        **overrides,
        "width": width,
        "parts": tuple(overrides.get("parts", PARTS)),
    }
    adapted = item_encoder.kernels(reads, settings["parts"]) if settings.get("rank", 16) else ()
    config = CoMEMConfig(**(settings | {"kernels": adapted}))
    _check(config, reads)
    _check_transfer(config, backbone)
    return config


def transferred(config: CoMEMConfig, encoder: BackboneConfig, backbone: BackboneConfig) -> CoMEMConfig:
    """A CoMEM of the model `encoder`, as it is or trained, for `backbone` to answer behind.

    Raises:
      ConfigError: its vectors have another width, or its switches do not apply to another model.
    """
    config = dataclasses.replace(config, encoder=encoder)
    _check_transfer(config, backbone)
    return config


def _check_transfer(config: CoMEMConfig, backbone: BackboneConfig) -> None:
    """Raises ConfigError for an encoder whose vectors cannot stand in front of the backbone's prompts."""
    if config.encoder is None:
        return
    if config.target_width != backbone.text.width:
        raise ConfigError(
            f"comem: vectors of width {config.target_width} (encoder {config.encoder.model_type}, width {config.width})"
            f" cannot stand in front of prompts of {backbone.model_type}, width {backbone.text.width}: set"
            f" target_width to {backbone.text.width}, which puts a linear map behind an encoder of another width"
        )
    if config.query_tower != "frozen" or config.decode_shift is not None or config.bf16_positions:
        raise ConfigError(
            "comem: query_tower, decode_shift and bf16_positions repeat what the released code does where the encoder"
            " answers itself; leave them at their defaults with an encoder beside the model"
        )


def _check(config: CoMEMConfig, backbone: BackboneConfig) -> None:
    absent = [part for part in config.parts if part not in PARTS and not item_encoder.kernels(backbone, (part,))]
    faults = {
        f"parts {absent} name no kernels of the backbone; there are {', '.join(PARTS)}": absent,
        f"rank {config.rank} must be at least 0 and alpha {config.alpha} above 0": config.rank < 0 or config.alpha <= 0,
        f"dropout {config.dropout} must be at least 0 and below 1": not 0 <= config.dropout < 1,
        f"encoder_layers {config.encoder_layers} must be 0 to {backbone.text.layers}": (
            not 0 <= config.encoder_layers <= backbone.text.layers
        ),
        f"text_limit {config.text_limit} must be at least 1": config.text_limit < 1,
        f"order {config.order!r} is neither 'rank' nor 'reverse'": config.order not in ("rank", "reverse"),
        f"query_tower {config.query_tower!r} is neither 'frozen' nor 'encoder'": (
            config.query_tower not in ("frozen", "encoder")
        ),
    }
    if wrong := [message for message, fault in faults.items() if fault]:
        raise ConfigError("comem: " + "; ".join(wrong))
    _ = config.q_former  # checks its sizes


def init(key: Array, config: CoMEMConfig, base: Any = None) -> dict[str, Any]:
    """Fresh float32 parameters (see the head of this file): the encoder starts as the backbone itself."""
    encoder, compressor, adapter = jax.random.split(key, 3)
    params = {"q_former": q_former.init(compressor, config.q_former)}
    if config.kernels:
        params["encoder"] = item_encoder.init(encoder, config.kernels, config.rank)
    if config.target_width != config.width:
        shape = (config.width, config.target_width)
        params["adapter"] = {"kernel": config.width**-0.5 * jax.random.normal(adapter, shape)}
    return params


def shares(config: CoMEMConfig, backbone: BackboneConfig) -> str:
    """How much trains, in words, beside the paper's own figure (section 4: 200 M parameters, 1.2 % of the full model).

    That percentage counts the encoder and the model that answers as two copies beside what trains; here they share one.
    """
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    own = jax.eval_shape(lambda: init(jax.random.key(0), config))
    trained, parts = size(own), ", ".join(f"{name} {size(part):,}" for name, part in own.items())
    copy = size(registry.backbone(backbone.model_type).shapes(backbone))
    if config.encoder is not None:
        both = copy + size(registry.backbone(config.encoder.model_type).shapes(config.encoder))
        share = f"{trained / (both + trained):.2%}".replace("%", " %")
        return f"{trained:,} parameters train ({parts}): {share} of encoder, target and these"
    return (
        f"{trained:,} parameters train ({parts}): {trained / copy:.2%} of the backbone, or"
        f" {trained / (2 * copy + trained):.2%} of two copies and these, as the paper counts its 200 M (1.2%)"
    ).replace("%", " %")


def weights(config: CoMEMConfig, base: Any, params: Any, dropout: Array | None = None) -> Any:
    """The encoder's weights: those of the backbone that reads items, with the factors beside them."""
    scale, reads = config.alpha / max(1, config.rank), base if config.encoder is None else base["encoder"]
    return item_encoder.adapted(reads, params.get("encoder", {}), scale, config.dropout, dropout)


def encode(
    config: CoMEMConfig,
    backbone: BackboneConfig,
    base: Any,
    params: Any,
    items: Batch,
    *,
    remat: Remat = False,
    dropout: Array | None = None,
) -> Array:
    """The embeddings of items (Eq. 1), which depend on nothing else.

    Args:
      config, backbone: static.
      base, params: the weights of the model that answers (in it those of `config.encoder`) and CoMEM's.
      items: N items, a row each; a row of padding gives finite vectors that stand for nothing.
      remat: what of a layer a backward pass recomputes.
      dropout: random key; None in evaluation.

    Returns:
      [N, M, W] in the backbone's dtype.
    """
    own = weights(config, base, params, dropout)
    hidden = item_encoder.read(config.encoder or backbone, own, items, layers=config.encoder_layers, remat=remat)
    valid = jnp.asarray(items.segments) > 0
    return _fitted(params, q_former.compress(config.q_former, params["q_former"], hidden, valid))


def _fitted(params: Any, vectors: Array) -> Array:
    """[..., D] -> [..., W]."""
    return vectors @ params["adapter"]["kernel"].astype(vectors.dtype) if "adapter" in params else vectors


def query(
    config: CoMEMConfig,
    base: Any,
    params: Any,
    batch: Batch,
    *,
    remat: Remat = False,
    dropout: Array | None = None,
) -> Array:
    """The states [B, Q, W] that stand in front of each row's text: the prompt as the encoder reads it, every token.

    Arguments as for `encode`; `batch` brings the prompts. Raises DataError when there are none, or no encoder.
    """
    if config.encoder is None or batch.query is None:
        raise DataError("a batch has places for states of its prompts, and no prompts that an encoder beside reads")
    key = None if dropout is None else jax.random.fold_in(dropout, 1)
    own = weights(config, base, params, key)
    return _fitted(
        params, item_encoder.read(config.encoder, own, batch.query, layers=config.encoder_layers, remat=remat)
    )


def vectors(
    config: CoMEMConfig,
    backbone: BackboneConfig,
    base: Any,
    params: Any,
    batch: Batch,
    *,
    remat: Remat = False,
    dropout: Array | None = None,
) -> Array:
    """The vectors [B, K * M, W] in front of each row's prompt: those that it brings, or those of its items, which are
    encoded in one call."""
    if batch.vectors is not None:
        return jnp.asarray(batch.vectors).astype(base["embed"].dtype)
    if batch.items is None:
        raise DataError("a batch has places for vectors in front of its prompts, but neither vectors nor items")
    rows, count = batch.items.tokens.shape[:2]
    flat = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(rows * count, *leaf.shape[2:]), batch.items)
    found = encode(config, backbone, base, params, flat, remat=remat, dropout=dropout)
    return found.reshape(rows, count * found.shape[1], -1)


def positions(config: CoMEMConfig, batch: Batch) -> Array:
    """[B, 3, T] the positions of a prompt with vectors in front of it."""
    given = jnp.asarray(batch.positions)
    return given.astype(jnp.bfloat16) if config.bf16_positions and batch.prefix_rows is not None else given


def next_position(config: CoMEMConfig, batch: Batch, after: Array) -> Array:
    """[B] position of the first generated token, given the one behind the prompt."""
    if config.decode_shift is None or batch.prefix_rows is None:
        return after
    return after - jnp.sum(jnp.asarray(batch.prefix_rows) >= 0, axis=1) + config.decode_shift


def prepare(config: CoMEMConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing: vectors are part of the prompt, whose keys and values the decoder keeps."""


def append(old: None, new: None) -> None:
    """Nothing (`prepare`)."""


def take(state: None, rows: Array) -> None:
    """Nothing (`prepare`)."""


def ports(config: CoMEMConfig, params: Any, state: Any, stream: Stream, dropout: Array | None = None) -> Ports:
    """None: CoMEM acts in front of the decoder."""
    return Ports()
