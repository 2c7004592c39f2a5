"""Vision Remember in plain float64 numpy, written from arXiv 2506.03928: one token, one head, one key at a time.

Only shapes and names of the parameter tree are shared with the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

EPS = 1e-6


def layer_norm(x: np.ndarray, scale: Any, bias: Any) -> np.ndarray:
    """Over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * scale + bias


def normed(p: Any, x: np.ndarray) -> np.ndarray:
    return layer_norm(x, p["scale"], p["bias"])


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def fused(config: Any, p: Any, levels: Sequence[np.ndarray]) -> np.ndarray:
    """[P, C] of the levels [P, W], in the order of `config.levels`."""
    if config.level_norm == "each":
        ready = [layer_norm(x, p["norm"]["scale"][i], p["norm"]["bias"][i]) for i, x in enumerate(levels)]
    else:
        ready = np.split(normed(p["norm"], np.concatenate(levels, -1)), len(levels), axis=-1)
    if config.fusion == "weighted_sum":
        return sum(weight * x for weight, x in zip(p["weights"], ready, strict=True))
    joined = np.concatenate(ready, -1)
    return joined @ p["kernel"] if config.fusion == "concat_linear" else joined


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, heads: int, bias: Any = 0.0) -> np.ndarray:
    """One query [d] over keys and values [K, d], head by head; `bias` [h, K] is added to the scores."""
    size, bias = len(query) // heads, np.broadcast_to(bias, (heads, len(keys)))
    out = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        shares = softmax(keys[:, own] @ query[own] / math.sqrt(size) + bias[head])
        out.append(shares @ values[:, own])
    return np.concatenate(out)


def cross(config: Any, p: Any, z: np.ndarray, seen: np.ndarray, places: Sequence[int], key_bias: Any = 0.0):
    """What a token [D] finds among features [K, C] that stand at `places` of its window (1.3)."""
    query, f = normed(p["norm_query"], z) @ p["q"]["kernel"], normed(p["norm_key"], seen)
    bias = np.zeros((config.heads, len(f)))
    if config.positions == "embedding" and config.local:
        f = f + p["position"][places]
    if config.positions == "bias" and config.local:
        bias = bias + p["position"][:, places]
    if config.saliency == "bias":
        bias = bias + (f @ p["saliency"]).T
    found = attention(query, f @ p["k"]["kernel"] + key_bias, f @ p["v"]["kernel"], config.heads, bias)
    return found @ p["o"]["kernel"] + p["o"]["bias"]


def both(config: Any, p: Any, z: np.ndarray, text: np.ndarray | None) -> np.ndarray:
    """What the tokens [N, D] of one image find among each other and the question's token [D] (1.4)."""
    everyone = normed(p["norm"], z if text is None else np.concatenate([z, text[None]]))
    query, key, value = (everyone @ p[name]["kernel"] for name in "qkv")
    found = np.stack([attention(query[i], key, value, config.heads) for i in range(len(z))])
    return found @ p["o"]["kernel"] + p["o"]["bias"]


def ffn(p: Any, z: np.ndarray) -> np.ndarray:
    """D -> d -> D with the exact GELU."""
    hidden = normed(p["norm"], z) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(hidden / math.sqrt(2)))
    return hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def question(config: Any, p: Any, x: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """The text-guided token [D] of a row [T, D]."""
    own = x[marked]
    if config.text_token == "last_prompt_token":
        return own[-1]
    if config.text_token == "attn_pool":
        return softmax(own @ p["query"] / math.sqrt(config.width)) @ own
    return layer_norm(own.mean(0), p["scale"], p["bias"])


def window(config: Any, row: int) -> list[int | None]:
    """Patches (counted on the patch axis) at the places of a visual row's window; None where there is none."""
    side, ratio, margin = config.cells.side, config.cells.ratio, config.margin
    if not side:
        return list(range(row * ratio**2, (row + 1) * ratio**2))
    count = math.ceil(side / ratio)
    tile, cell = divmod(row, count**2)
    top, left = cell // count * ratio, cell % count * ratio
    reach = range(-margin, ratio + margin)
    places = [(top + down, left + across) for down in reach for across in reach]
    inside = lambda place: 0 <= min(place) and max(place) < side  # noqa: E731
    return [tile * side**2 + i * side + j if inside((i, j)) else None for i, j in places]


def unit(config: Any, row: int, per_tile: int) -> list[int]:
    """Patches of the tile, or of the block, that a visual row belongs to."""
    size, number = (config.tile_patches, row // per_tile) if config.tile_patches else (config.cells.ratio**2, row)
    return list(range(number * size, (number + 1) * size))


def asked(config: Any, row: int, frames: np.ndarray, per_tile: int) -> tuple[list[int], list[int]]:
    """Patches that a visual row may ask, and their places in its window; frames [P] are 0 outside of pictures."""
    if config.local:
        found = [(patch, place) for place, patch in enumerate(window(config, row)) if patch is not None]
        seen = [pair for pair in found if frames[pair[0]]] or found
        return [patch for patch, _ in seen], [place for _, place in seen]
    own = unit(config, row, per_tile)
    if not config.tile_patches:
        own = np.flatnonzero(frames == frames[own[0]]).tolist()
    return [patch for patch in own if frames[patch]], []


def remembered(
    config: Any, params: Any, block: Any, x: np.ndarray, levels: Sequence[np.ndarray], row: Any, per_tile: int
) -> np.ndarray:
    """One row's residual stream [T, D] behind a block.

    Args:
      config: settings.
      params, block: the tree, and one block of it, float64.
      x: [T, D].
      levels: [P, W] each.
      row: what the batch says of this row: visual_rows [T], patch_segments [P], patch_images [P] or None, question [T].
      per_tile: visual rows of a tile; of no meaning without tiles.
    """
    features, frames = fused(config, params["fusion"], levels), np.asarray(row.patch_segments)
    images = frames if row.patch_images is None else np.asarray(row.patch_images)
    tokens = [t for t, at in enumerate(row.visual_rows) if at >= config.cells.first]
    numbers = [int(row.visual_rows[t]) - config.cells.first for t in tokens]
    of = [max(images[unit(config, number, per_tile)]) for number in numbers]
    z = x[tokens].copy()
    steps = ["both", "cross"] if config.order == "self_then_cross" else ["cross", "both"]
    for step in steps if config.bidirectional else ["cross"]:
        found = np.zeros_like(z)
        if step == "cross":
            for i, number in enumerate(numbers):
                patches, places = asked(config, number, frames, per_tile)
                found[i] = cross(config, block["cross"], z[i], features[patches], places)
            z = z + np.tanh(block["cross"]["gate"]) * found
        else:
            text = question(config, block.get("text"), x, np.asarray(row.question)) if config.asks else None
            for image in set(of):
                members = [i for i, other in enumerate(of) if other == image]
                found[members] = both(config, block["bidirectional"], z[members], text)
            z = z + np.tanh(block["bidirectional"]["gate"]) * found
    if config.ffn:
        z = z + np.tanh(block["cross"]["gate"]) * ffn(block["ffn"], z)
    out = x.copy()
    out[tokens] = z
    return out
