"""CoMEM's memory encoder (arXiv 2505.17670, section 3.2): a backbone with LoRA factors reads knowledge items.

There is one copy of the backbone's weights. The factors lie beside the kernels of the decoder, of the vision tower's
blocks and of its mergers while items are read, and nowhere else, so that the model which answers stays as it was.

Axis letters: N items, L tokens of an item, D width of the backbone, I inputs and O outputs of a kernel, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.adapters import lora
from jaxmem.backbones import decoder, registry
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Remat
from jaxmem.backbones.layers import rms_normalise

Kernel = tuple[str, tuple[int, ...]]
"""Path of a Linear in the backbone's tree, and the shape of its kernel: [layers, I, O], or [I, O] for a merger."""


def kernels(backbone: BackboneConfig, parts: Sequence[str]) -> tuple[Kernel, ...]:
    """The Linears of some parts of a backbone, such as "visual/blocks"; parts that it does not have are left out."""

    def walk(path: str, node: Any) -> list[Kernel]:
        if not isinstance(node, dict):
            return []
        here = [(path, node["kernel"].shape)] if "kernel" in node else []
        return here + [one for name, child in node.items() for one in walk(f"{path}/{name}".lstrip("/"), child)]

    found = walk("", registry.backbone(backbone.model_type).shapes(backbone))
    return tuple(sorted((p, tuple(s)) for p, s in found if any(f"{p}/".startswith(f"{part}/") for part in parts)))


def modules(chosen: Sequence[Kernel]) -> int:
    """How many Linears that is, each layer counted."""
    return sum(shape[0] if len(shape) == 3 else 1 for _, shape in chosen)


def init(key: Array, chosen: Sequence[Kernel], rank: int) -> dict[str, Any]:
    """Fresh float32 factors at the paths of the kernels: lora_a [..., I, R] uniform, lora_b [..., R, O] zero."""
    tree: dict[str, Any] = {}
    for (path, shape), k in zip(chosen, jax.random.split(key, max(1, len(chosen))), strict=False):
        *layers, inputs, outputs = shape
        wide = lora.FACTOR(k, (*(layers or [1]), inputs, rank), jnp.float32)
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["lora_a"] = wide if layers else wide[0]
        node["lora_b"] = jnp.zeros((*layers, rank, outputs))
    return tree


def adapted(base: Any, factors: Any, scale: float, rate: float = 0.0, dropout: Array | None = None) -> Any:
    """The backbone's weights with the factors beside their kernels; those of the policy's own LoRA are left out.

    Args:
      base: backbone weights, shared and not copied.
      factors: of `init`.
      scale: alpha / rank.
      rate: share of a kernel's inputs that the update does not see, with `dropout`.
      dropout: random key; None drops nothing.
    """
    paths = [path for path, _ in _linears(factors)]
    keys = {} if dropout is None or not rate else dict(zip(paths, jax.random.split(dropout, len(paths)), strict=True))

    def beside(path: str, node: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        layers = own["lora_a"].shape[:-2]
        leaves = {**own, "lora_scale": jnp.full(layers, scale, jnp.float32)}
        if path in keys:
            each = jax.random.split(keys[path], layers)
            leaves |= {"lora_key": jax.random.key_data(each), "lora_rate": jnp.full(layers, rate, jnp.float32)}
        return {**node, **leaves}

    def walk(path: str, node: Any, own: Any) -> Any:
        if "lora_a" in own:
            return beside(path, node, own)
        return {k: walk(f"{path}/{k}".lstrip("/"), child, own[k]) if k in own else child for k, child in node.items()}

    return walk("", lora.strip(base), factors)


def _linears(factors: Any, path: str = "") -> list[tuple[str, Any]]:
    """Path and node of every Linear that has factors."""
    if "lora_a" in factors:
        return [(path, factors)]
    return [one for name, node in factors.items() for one in _linears(node, f"{path}/{name}".lstrip("/"))]


def read(backbone: BackboneConfig, weights: Any, items: Batch, *, layers: int = 0, remat: Remat = False) -> Array:
    """The last hidden states of items, or of prompts, after the final norm.

    Args:
      backbone: static.
      weights: of `adapted`.
      items: N of them, each a row of its own.
      layers: so many decoder layers are run; 0 is all of them.
      remat: what of a layer a backward pass recomputes, also in the vision tower.

    Returns:
      [N, L, D] in the backbone's dtype.
    """
    lib, stream = registry.backbone(backbone.model_type), decoder.stream_of(items)
    visual = lib.see(backbone, weights, items, remat=remat not in (False, "none"))
    text, stacked = backbone.text, weights["layers"]
    if layers:
        text, stacked = dataclasses.replace(text, layers=layers), jax.tree.map(lambda leaf: leaf[:layers], stacked)
    x, _ = decoder.scan_layers(
        text,
        stacked,
        lib.embed(weights, items, visual),
        lib.rotary_angles(backbone, items.positions),
        decoder.among(stream, stream),
        ports=lib.own_ports(visual, items),
        remat=remat,
    )
    return rms_normalise(x, backbone.text.norm_eps) * weights["norm"]["scale"].astype(x.dtype)
