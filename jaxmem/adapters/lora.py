"""LoRA (arXiv 2106.09685): beside a frozen kernel W a low-rank update, x @ W + scale * (x @ a) @ b, from zero.

The factors are leaves beside the kernel that they update, in the tree `base`: {"kernel", "lora_a", "lora_b",
"lora_scale"}, stacked over the layers like the kernel, so that training, generation and sharding need nothing new and
a path pattern (`TRAINABLE`) says what trains. qwix does not serve here: it finds products by patching the tracing of
`dot_general`, but `x @ kernel` traces once per shape, so that the second kernel of a shape (`v` after `k`, `up` after
`gate`) gets no factors without any notice, and factors made in one trace leak into a scan's.

Axis letters: L layers, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.errors import ConfigError

LEAVES = ("lora_a", "lora_b", "lora_scale")
TRAINABLE = ("base/**/lora_a", "base/**/lora_b")
"""What trains of {"base", "memory"}: the factors, never their scale."""
FACTOR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=0)
"""U(-1/sqrt(I), 1/sqrt(I)), which the authors' Kaiming initialisation comes to."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which kernels of the decoder get factors.

    Attributes:
      rank: R.
      alpha: the update is scaled by alpha / rank.
      targets: names of kernels ("q"), or patterns of their paths ("layers/attention/*").
      layers: 0-based decoder layers that are updated; None is all. The others keep factors with scale 0.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ConfigError("lora: rank must be at least 1, alpha above 0, and targets must name a kernel")


def attach(key: Array, config: LoRAConfig, base: Any) -> Any:
    """`base` with fresh factors beside the chosen kernels: a uniform, b zero, so that the model is still its backbone.

    Args:
      key: random key of the factors.
      config: which kernels.
      base: backbone weights; their leaves are shared, not copied.

    Raises:
      ConfigError: a target that names no kernel, a layer outside the decoder, or a base that has factors already.
    """
    paths = [path for path, node in _linears(base)]
    for target in config.targets:
        if not any(_matches(target, path) for path in paths):
            raise ConfigError(f"lora.targets: {target!r} names no kernel of the decoder; there are {', '.join(paths)}")
    chosen = [path for path in paths if any(_matches(target, path) for target in config.targets)]
    kernels, keys = dict(_linears(base)), jax.random.split(key, len(chosen))
    return place({path: _fresh(k, config, kernels[path]["kernel"]) for path, k in zip(chosen, keys, strict=True)}, base)


def place(found: Mapping[str, dict[str, Any]], base: Any) -> Any:
    """`base` with given factors, {path: LEAVES} as `factors` returns them, beside its kernels.

    Raises ConfigError when `base` has factors already.
    """
    if has_lora(base):
        raise ConfigError("the backbone has LoRA factors already; merge them, or attach to a fresh model")
    return _map(lambda path, node: {**node, **found.get(path, {})}, base)


def merge(base: Any) -> Any:
    """Plain weights W + scale * a @ b without factors; the sum is formed in float32 and kept in the dtype of W."""

    def merged(_: str, node: dict[str, Any]) -> dict[str, Any]:
        if "lora_a" not in node:
            return node
        update = jnp.matmul(*(node[name].astype(jnp.float32) for name in LEAVES[:2]), precision="highest")
        kernel = node["kernel"] + node["lora_scale"][:, None, None] * update
        return {**_plain(node), "kernel": kernel.astype(node["kernel"].dtype)}

    return _map(merged, base)


def strip(base: Any) -> Any:
    """The weights without their factors."""
    return _map(lambda _, node: _plain(node), base)


def has_lora(base: Any) -> bool:
    """Has any kernel factors?"""
    return any("lora_a" in node for _, node in _linears(base))


def factors(base: Any) -> dict[str, dict[str, Any]]:
    """{path of a Linear, as "layers/attention/q": its lora_a [L, I, R], lora_b [L, R, O] and lora_scale [L]}."""
    return {path: {name: node[name] for name in LEAVES} for path, node in _linears(base) if "lora_a" in node}


def count(base: Any) -> int:
    """Parameters of the factors in the layers that are updated; scales, which do not train, are not counted."""
    per_layer = lambda leaf: leaf.size // leaf.shape[0]  # noqa: E731
    return sum(
        int(jnp.sum(one["lora_scale"] != 0)) * (per_layer(one["lora_a"]) + per_layer(one["lora_b"]))
        for one in factors(base).values()
    )


def _fresh(key: Array, config: LoRAConfig, kernel: Array) -> dict[str, Array]:
    """The factors of one stacked kernel [L, I, O], float32."""
    depth, inputs, outputs = kernel.shape
    layers = tuple(range(depth)) if config.layers is None else tuple(config.layers)
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(depth)):
        raise ConfigError(f"lora.layers {layers} must be different and within 0..{depth - 1}")
    scale = jnp.zeros(depth).at[jnp.asarray(layers)].set(config.alpha / config.rank)
    shape = (depth, inputs, config.rank)
    return {
        "lora_a": FACTOR(key, shape, jnp.float32),
        "lora_b": jnp.zeros((depth, config.rank, outputs)),
        "lora_scale": scale,
    }


def _matches(target: str, path: str) -> bool:
    return target == path.rpartition("/")[2] or fnmatch.fnmatchcase(path, target)


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in node.items() if name not in LEAVES}


def _linears(base: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and node of every Linear of the decoder."""

    def walk(path: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict) and "kernel" in node:
            yield path, node
        elif isinstance(node, dict):
            for name, child in node.items():
                yield from walk(f"{path}/{name}", child)

    return walk("layers", base["layers"])


def _map(function: Callable[[str, dict[str, Any]], Any], base: Any) -> Any:
    """`base` with every Linear of the decoder replaced by `function(path, node)`."""

    def walk(path: str, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "kernel" in node:
            return function(path, node)
        return {name: walk(f"{path}/{name}", child) for name, child in node.items()}

    return {**base, "layers": walk("layers", base["layers"])}
