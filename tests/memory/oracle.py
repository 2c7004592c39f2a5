"""PVM and the decoder around it in plain float64 numpy, written from the PVM paper.

One row, one layer at a time, loops over heads and positions: slow and obvious. Only shapes and names of the parameter
tree are shared with the library. Axis letters: T tokens, M visual rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Branch = Callable[[np.ndarray, np.ndarray], np.ndarray]


def float64(tree: Any) -> Any:
    """The tree as float64 numpy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def slot(tree: Any, index: int) -> Any:
    """Entry `index` of every leaf's leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def rms(x: np.ndarray, eps: float, scale: Any = 1.0) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def swiglu(p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """(silu(x W_g) * (x W_u)) W_d."""
    return (silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Row by row over what is seen; zero in rows that see nothing."""
    out = np.zeros_like(scores)
    for i in range(len(scores)):
        if seen[i].any():
            e = np.exp(scores[i, seen[i]] - scores[i, seen[i]].max())
            out[i, seen[i]] = e / e.sum()
    return out


def visible(config: Any, segments: np.ndarray, visual_rows: np.ndarray, count: int) -> np.ndarray:
    """[T, count] bool: which visual rows each token may ask (1.7, 1.8 and `visibility` of 1.14)."""
    seen = np.zeros((len(segments), count), bool)
    for i in range(len(segments)):
        for j in range(len(segments)):
            if segments[i] == 0 or visual_rows[j] < 0 or segments[i] != segments[j]:
                continue
            if config.silence and visual_rows[i] >= 0:
                continue
            if config.visibility == "all" or j < i:
                seen[i, visual_rows[j]] = True
    return seen


def keys_values(config: Any, p: Any, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 2, 5, 6: [M, D] -> keys and values [M, K, H]."""
    latent = visual @ p["vision_reducer"]["kernel"]
    heads = (len(visual), config.kv_heads, config.head_dim)
    keys = (latent @ p["cross_attn"]["k"]["kernel"]).reshape(heads)
    values = (latent @ p["cross_attn"]["v"]["kernel"]).reshape(heads)
    return rms(keys, config.norm_eps, p["cross_attn"]["k_norm"]["scale"]), values


def inject(config: Any, p: Any, x: np.ndarray, visual: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Steps 1 to 15 for one row and one layer: x [T, D], visual [M, D], seen [T, M] -> [T, D]."""
    attention, width = p["cross_attn"], config.head_dim
    asked = rms(x @ p["text_reducer"]["kernel"], config.norm_eps, p["input_norm"]["scale"]) @ attention["q"]["kernel"]
    keys, values = keys_values(config, p, visual)
    found = []
    for head in range(config.heads):
        query = rms(asked[:, head * width : (head + 1) * width], config.norm_eps, attention["q_norm"]["scale"])
        shared = head // (config.heads // config.kv_heads)
        found.append(softmax(query @ keys[:, shared].T / np.sqrt(width), seen) @ values[:, shared])
    o = np.concatenate(found, -1) @ attention["o"]["kernel"]
    z = o + swiglu(p["mlp"], rms(o, config.norm_eps, p["post_attn_norm"]["scale"]))
    out = z @ p["output_expander"]["kernel"]
    if config.output_norm:
        out = rms(out, config.norm_eps)
    return p["gate_alpha"] * out * seen.any(-1, keepdims=True)


def rotate(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotate-half of one head: x [T, H], angle [T, H/2]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def self_attention(text: Any, p: Any, x: np.ndarray, angle: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grouped-query attention with normalised queries and keys."""
    split = lambda name: np.split(x @ p[name]["kernel"], (x @ p[name]["kernel"]).shape[1] // text.head_dim, 1)  # noqa: E731
    queries = [rotate(rms(q, text.norm_eps, p["q_norm"]["scale"]), angle) for q in split("q")]
    keys = [rotate(rms(k, text.norm_eps, p["k_norm"]["scale"]), angle) for k in split("k")]
    values, group = split("v"), text.heads // text.kv_heads
    found = [
        softmax(query @ keys[head // group].T / np.sqrt(text.head_dim), mask) @ values[head // group]
        for head, query in enumerate(queries)
    ]
    return np.concatenate(found, -1) @ p["o"]["kernel"]


def decoder(
    text: Any,
    base: Any,
    x: np.ndarray,
    angle: np.ndarray,
    visual_rows: np.ndarray,
    deepstack: np.ndarray,
    branches: Mapping[int, Branch],
) -> np.ndarray:
    """One row without padding through all layers and the final norm.

    Args:
      text: sizes.
      base: the backbone's weights, float64.
      x: [T, D] embeddings with visual rows in place.
      angle: [T, H/2].
      visual_rows: [T], -1 for text.
      deepstack: [taps, M, D].
      branches: per decoder layer, (residual after attention, its normalised form) -> injection.
    """
    mask, is_visual = np.tri(len(x), dtype=bool), visual_rows >= 0
    for layer in range(text.layers):
        p = slot(base["layers"], layer)
        x = x + self_attention(text, p["attention"], rms(x, text.norm_eps, p["attention_norm"]["scale"]), angle, mask)
        normed = rms(x, text.norm_eps, p["ffn_norm"]["scale"])
        added = swiglu(p["ffn"], normed)
        if layer in branches:
            added = added + branches[layer](x, normed)
        x = x + added
        if layer < len(deepstack):
            x = x.copy()
            x[is_visual] += deepstack[layer][visual_rows[is_visual]]
    return rms(x, text.norm_eps, base["norm"]["scale"])
