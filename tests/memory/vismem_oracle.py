"""VisMem's query builder and formers in plain float64 numpy, written from the paper: one row, no padding, no cache.

Axis letters: H states of image and text, K queries, N vectors, D model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import erf

from tests.memory import oracle


def layer_norm(p: Any, x: np.ndarray, eps: float) -> np.ndarray:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    """x W + b."""
    return x @ p["kernel"] + p["bias"]


def queries(config: Any, p: Any, hidden: np.ndarray) -> np.ndarray:
    """Equations 10 and 11: [H, D] -> [K, D]; `config` is the query builder's."""
    count, total = len(hidden), len(hidden) + config.queries
    x = np.concatenate([hidden, p["q_init"]]) + p["pos_emb"][:total]
    mask = (np.arange(total)[None] < count) | (np.arange(total)[:, None] >= count)
    for number in range(config.layers):
        layer = oracle.slot(p["layers"], number)
        normed = layer_norm(layer["norm1"], x, config.norm_eps)
        parts = [np.split(linear(layer["attention"][name], normed), config.heads, -1) for name in "qkv"]
        found = [oracle.softmax(q @ k.T / np.sqrt(q.shape[1]), mask) @ v for q, k, v in zip(*parts, strict=True)]
        x = x + linear(layer["attention"]["o"], np.concatenate(found, -1))
        grown = linear(layer["ffn"]["fc1"], layer_norm(layer["norm2"], x, config.norm_eps))
        x = x + linear(layer["ffn"]["fc2"], grown * (1 + erf(grown / np.sqrt(2))) / 2)
    return layer_norm(p["norm"], x, config.norm_eps)[count:]


def merged(config: Any, base: Any, adapter: Any) -> Any:
    """The backbone with A B alpha / rank added to its kernels."""
    layers = {**base["layers"]}
    for group, kernels in adapter["layers"].items():
        layers[group] = {**layers[group]}
        for name, factors in kernels.items():
            update = np.einsum("lir,lro->lio", factors["lora_a"], factors["lora_b"]) * config.alpha / config.rank
            layers[group][name] = {**layers[group][name], "kernel": layers[group][name]["kernel"] + update}
    return {**base, "layers": layers}


def frozen(backbone: Any, base: Any, x: np.ndarray) -> np.ndarray:
    """Embeddings [H, D] through the decoder at positions 0, 1, 2, ... and the final norm."""
    half = backbone.text.head_dim // 2
    angle = np.arange(len(x))[:, None] * backbone.text.rope_theta ** (-np.arange(half) / half)
    nothing = np.full(len(x), -1), np.zeros((0, 0, x.shape[1]))
    return oracle.decoder(backbone.text, base, x, angle, *nothing, {})


def former_input(config: Any, p: Any, kind: int, visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """[visual states; text states; queries; slots] of a type."""
    hidden = np.concatenate([visual, text]).astype(np.float64)
    slots = p[("slots_short", "slots_long")[kind]]
    return np.concatenate([hidden, queries(config.builder, p["query_builder"], hidden), slots])


def memory(
    config: Any, backbone: Any, base: Any, params: Any, kind: int, visual: np.ndarray, text: np.ndarray
) -> np.ndarray:
    """Equations 4 to 6: states of the image [Y, D] and of the text [Z, D] -> [N, D]."""
    base, p = oracle.float64(base), oracle.float64(params)
    x = former_input(config, p, kind, visual, text)
    out = frozen(backbone, merged(config, base, p[("short", "long")[kind]]), x)[-config.sizes[kind] :]
    if config.out_norm:
        out = oracle.rms(out, backbone.text.norm_eps) * p["out_scale"]
    return out
