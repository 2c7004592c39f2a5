"""How a memory of VisMem is formed (arXiv 2511.11007, section 3.2): states, queries, and the decoder with an adapter.

The former is the backbone's own decoder: one copy of the weights, beside which lie the factors of both adapters, with a
mask over the rank that switches one of them on for each row. The policy never sees them. Its input is [visual states,
text states, queries, slots] at positions 0, 1, 2, ... on all axes; its last outputs are the memory. The visual states
are a constant causal prefix, so their keys and values can be kept (`Prefix`).
Axis letters: B prompts, W rows that form a memory, T tokens, Y visual states, Z text states, K queries, N vectors of
the longer memory, L layers, D model width, R rank of both adapters together.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.adapters import lora
from jaxmem.backbones import decoder
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import KeysValues, Look, Remat, Stream
from jaxmem.backbones.layers import rms_normalise
from jaxmem.backbones.registry import backbone as backbone_module
from jaxmem.distributed import hosts
from jaxmem.errors import DataError
from jaxmem.memory import query_builder

if TYPE_CHECKING:
    from jaxmem.memory.vismem import VisMemConfig


SHORT = 512
"""Up to so many states of a memory move on a mesh and weights stay; beyond, weights come to the states."""


@flax.struct.dataclass
class Seen:
    """States that stand first, valid ones among padding: rows [B, Y, D], valid [B, Y] bool."""

    rows: Array
    valid: Array


def spans(config: VisMemConfig, batch: Batch) -> Array:
    """[B, T] bool: tokens of images with the start and end tokens around them, of all images or of the first."""
    end = batch.tokens == config.vision_end
    inside = (batch.is_visual | (batch.tokens == config.vision_start) | end) & (batch.segments > 0)
    if config.visual_spans == "first":
        inside = inside & (end.cumsum(axis=1) - end == 0)
    return inside


def check_spans(config: VisMemConfig, batch: Batch) -> None:
    """Looks on the host for prompts with more visual states than there is room for. All hosts call it at one place.

    Args:
      config: says what happens with them.
      batch: prompts.

    Raises:
      DataError: there are such rows, and `overflow` is "error". With "subsample" a warning names them.
    """
    fields = ("tokens", "segments", "visual_rows")
    found = hosts.fetch({name: getattr(batch, name) for name in fields})
    counts = np.sum(spans(config, dataclasses.replace(batch, **found)), axis=1)
    over = np.flatnonzero(counts > config.visual_cap)
    if not len(over):
        return
    rows = ", ".join(f"row {row} has {counts[row]}" for row in over)
    message = f"vismem: {rows} visual states, and memories are formed of at most {config.visual_cap} (visual_cap)"
    advice = "show smaller images (max_pixels), lower vismem.text_cap or raise vismem.builder_length"
    if config.overflow == "error":
        raise DataError(f'{message}; {advice}, or set vismem.overflow="subsample"')
    warnings.warn(f"{message}: they are taken at a uniform stride; to keep all, {advice}", stacklevel=3)


def gather(config: VisMemConfig, batch: Batch, states: Array) -> Seen:
    """The states [B, T, D] of the images' spans, in order; more than `visual_cap` are taken at a uniform stride."""
    return _packed(config, states, jnp.asarray(spans(config, batch)))


def joined(config: VisMemConfig, old: Seen | None, new: Seen | None) -> Seen | None:
    """The visual states after another turn, again at most `visual_cap`; with the spans "first", a row that has an image
    keeps it alone."""
    if old is None or new is None:
        return old or new
    fresh = new.valid
    if config.visual_spans == "first":
        fresh &= ~old.valid.any(axis=1, keepdims=True)
    rows, valid = jnp.concatenate([old.rows, new.rows], axis=1), jnp.concatenate([old.valid, fresh], axis=1)
    return _packed(config, rows, valid)


def _packed(config: VisMemConfig, states: Array, inside: Array) -> Seen:
    """The states [B, T, D] that are `inside` [B, T], without gaps, at a uniform stride where they exceed the cap."""
    room = min(inside.shape[1], config.visual_cap)
    order, count = jnp.argsort(~inside, axis=1, stable=True), jnp.sum(inside, axis=1)
    kept = jnp.minimum(count, room)
    place = jnp.arange(room)
    ranks = jnp.minimum(place * count[:, None] // jnp.maximum(kept, 1)[:, None], inside.shape[1] - 1)
    index = jnp.take_along_axis(order, ranks, axis=1)
    valid = place < kept[:, None]
    rows = jnp.where(valid[..., None], jnp.take_along_axis(states, index[..., None], axis=1), 0)
    return Seen(rows, valid)


def adapted(config: VisMemConfig, base: Any, params: Any, kinds: Array) -> Any:
    """The decoder's stacked layers with both adapters beside their kernels; each row computes with that of its kind.

    Args:
      config: static.
      base: backbone weights; a LoRA of the policy is left out.
      params: of VisMem.
      kinds: [W] int32, 0 short and 1 long.

    Returns:
      layers like `base["layers"]`: lora_a [L, I, R], lora_b [L, R, O], lora_scale [L, W, 1, R].
    """
    scale = config.alpha / config.rank

    def beside(path: list[str], node: dict[str, Any]) -> dict[str, Any]:
        found = [(kind, _at(params[name], path)) for kind, name in enumerate(("short", "long"))]
        found = [(kind, factors) for kind, factors in found if factors is not None]
        if not found:
            return node
        own = [kind for kind, factors in found for _ in range(factors["lora_a"].shape[-1])]
        on = scale * (kinds[:, None] == jnp.asarray(own)).astype(jnp.float32)
        return {
            **node,
            "lora_a": jnp.concatenate([factors["lora_a"] for _, factors in found], axis=-1),
            "lora_b": jnp.concatenate([factors["lora_b"] for _, factors in found], axis=-2),
            "lora_scale": jnp.broadcast_to(on[None, :, None], (config.depth, len(kinds), 1, len(own))),
        }

    def walk(path: list[str], node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "kernel" in node:
            return beside(path, node)
        return {name: walk([*path, name], child) for name, child in node.items()}

    return walk(["layers"], lora.strip(base)["layers"])


def _at(tree: Any, path: list[str]) -> Any:
    """The node at a path, or None."""
    for name in path:
        if name not in tree:
            return None
        tree = tree[name]
    return tree


def _stream(valid: Array, start: Array) -> tuple[Stream, Array]:
    """The stream of rows [W, T] of which some are valid, and positions [W, 3, T]; both count valid states alone."""
    place = start[:, None] + jnp.cumsum(valid, axis=1) - 1
    off = jnp.zeros(valid.shape, bool)
    stream = Stream(place.astype(jnp.int32), valid.astype(jnp.int32), off, off[:, 0])
    return stream, jnp.broadcast_to(jnp.maximum(place, 0)[:, None], (len(valid), 3, valid.shape[1]))


def prefix(config: VisMemConfig, backbone: BackboneConfig, layers: Any, visual: Seen) -> KeysValues:
    """Keys and values [L, W, Y, heads, H] of the visual states, for layers of `adapted`: once per prompt and type."""
    stream, positions = _stream(visual.valid, jnp.zeros(len(visual.valid), jnp.int32))
    look = decoder.among(stream, stream)
    _, (kept, _) = decoder.scan_layers(
        backbone.text,
        layers,
        visual.rows,
        backbone_module(backbone.model_type).rotary_angles(backbone, positions),
        lambda query, key, value: (look(query, key, value)[0], (key, value)),
    )
    return kept


def form(
    config: VisMemConfig,
    backbone: BackboneConfig,
    base: Any,
    params: Any,
    visual: Seen | None,
    text: Seen,
    kinds: Array,
    *,
    past: KeysValues | None = None,
    remat: Remat = False,
) -> Array:
    """Memories (Eq. 4 to 6).

    Args:
      config, backbone: static.
      base, params: the backbone's weights and VisMem's.
      visual: states of the images, W rows; None without images.
      text: states of the text since the last memory, W rows.
      kinds: [W] int32, 0 short and 1 long.
      past: of `prefix`, of the visual states; None computes them with the rest.
      remat: what of a layer a backward pass recomputes.

    Returns:
      [W, N, D] in the backbone's dtype; of the shorter type the last vectors are zero and do not count.
    """
    if not config.backprop_hidden:
        visual, text = jax.lax.stop_gradient((visual, text))
    hidden, valid = text.rows, text.valid
    if visual is not None:
        hidden, valid = jnp.concatenate([visual.rows, hidden], 1), jnp.concatenate([visual.valid, valid], 1)
    queries = query_builder.build(config.builder, params["query_builder"], hidden, valid)
    slots, used = _slots(config, params, kinds, hidden.dtype)
    states = text if past is not None else Seen(hidden, valid)
    x = jnp.concatenate([states.rows, queries.astype(hidden.dtype), slots], axis=1)
    live = jnp.concatenate([states.valid, jnp.ones(queries.shape[:2], bool), used], axis=1)
    before = jnp.sum(visual.valid, axis=1) if past is not None and visual is not None else jnp.zeros(len(kinds))
    stream, positions = _stream(live, before.astype(jnp.int32))
    out, _ = decoder.scan_layers(
        backbone.text,
        adapted(config, base, params, kinds),
        x,
        backbone_module(backbone.model_type).rotary_angles(backbone, positions),
        decoder.among(stream, stream) if past is None else _behind(visual, stream),
        past=past,
        remat=remat,
        place="token" if x.shape[1] <= SHORT else "residual",
    )
    memory = _finished(config, backbone, base, params, out[:, -config.longest :])
    return jnp.where(used[..., None], memory, 0)


def _behind(visual: Seen | None, stream: Stream) -> Any:
    """keys and values of the visual states in a layer -> how the rest looks there."""
    assert visual is not None, "a prefix has visual states"
    before, _ = _stream(visual.valid, jnp.zeros(len(visual.valid), jnp.int32))
    keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), before.tokens, stream.tokens)
    look = decoder.among(stream, stream.some(keys))

    def look_behind(past: KeysValues) -> Look:
        join = lambda old, new: jnp.concatenate([old, new], axis=1)  # noqa: E731
        return lambda query, key, value: look(query, join(past[0], key), join(past[1], value))

    return look_behind


def _slots(config: VisMemConfig, params: Any, kinds: Array, dtype: Any) -> tuple[Array, Array]:
    """The learned slots [W, N, D] of each row's type, padded to the longer one, and which count [W, N] bool."""
    longest = config.longest
    pad = lambda slots: jnp.pad(slots, ((0, longest - len(slots)), (0, 0)))  # noqa: E731
    both = jnp.stack([pad(params["slots_short"]), pad(params["slots_long"])]).astype(dtype)
    return both[kinds], jnp.arange(longest) < jnp.asarray(config.sizes)[kinds][:, None]


def _finished(config: VisMemConfig, backbone: BackboneConfig, base: Any, params: Any, out: Array) -> Array:
    """The final norm, and with `out_norm` the size of embeddings."""
    memory = rms_normalise(out, backbone.text.norm_eps) * base["norm"]["scale"].astype(out.dtype)
    if config.out_norm:
        memory = rms_normalise(memory, backbone.text.norm_eps) * params["out_scale"].astype(memory.dtype)
    return memory
