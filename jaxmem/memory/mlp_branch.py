"""The control of PVM: a branch as large as a PVM's in the same layers, but without any look at the images.

What it gains, more parameters gain; what only PVM gains, looking again gains. The residual stream after attention is
reduced, normalised, passed through a latent SwiGLU, expanded, normalised without weights, and scaled by a gate that
starts at zero: PVM's steps 1, 3 and 11 to 15 (`pvm`). The latent SwiGLU is as wide as makes the number of parameters
that of the PVM with the same layers and latent width. It remembers nothing.

Axis letters: B rows, T tokens, D model width, R latent width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.backbones.batch import Array
from jaxmem.backbones.config import BackboneConfig
from jaxmem.backbones.decoder import Stream
from jaxmem.backbones.layers import WEIGHT, Linear, RMSNorm, SwiGLU, rms_normalise
from jaxmem.backbones.ports import Port, Ports
from jaxmem.errors import ConfigError
from jaxmem.memory import pvm


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """One branch per layer; fields shared with `PVMConfig` mean the same.

    Attributes:
      layers: 0-based decoder layers that get a branch.
      width: model width D.
      latent: width R of the bottleneck.
      mlp_width: width of the latent SwiGLU.
      matched: parameters of the PVM that this branch is to equal.
      norm_eps, silence, query, output_norm, gate, initialiser: as in PVMConfig.
    """

    layers: tuple[int, ...]
    width: int
    latent: int
    mlp_width: int
    matched: int = 0
    norm_eps: float = 1e-6
    silence: bool = True
    query: Literal["residual", "normed"] = "residual"
    output_norm: bool = True
    gate: float = 0.0
    initialiser: Literal["normal", "fan_in"] = "normal"
    name: str = "mlp"

    @property
    def parameters(self) -> int:
        """How many there are, in all layers."""
        return len(self.layers) * (self.latent * (2 * self.width + 1 + 3 * self.mlp_width) + 1)


def create(backbone: BackboneConfig, **overrides: Any) -> MLPConfig:
    """The branch that has as many parameters as the PVM which `pvm.create` makes of the same settings.

    Args:
      backbone: gives the sizes.
      **overrides: fields of MLPConfig; `mlp_width` and `matched` follow from the PVM unless given.

    Raises:
      ConfigError: an unknown field, or settings that `pvm.create` refuses.
    """
    fields = {field.name for field in dataclasses.fields(MLPConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(f"mlp has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    shared = {name: overrides[name] for name in overrides if name not in ("mlp_width", "matched", "name")}
    twin = pvm.create(backbone, **shared)
    matched = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(twin)))
    same = {name: getattr(twin, name) for name in fields - {"mlp_width", "matched", "name"}}
    settings: dict[str, Any] = {"mlp_width": 0, "matched": matched, **overrides, **same}
    config = MLPConfig(**settings)
    if "mlp_width" in overrides:
        return config
    missing = (matched - config.parameters) / (3 * config.latent * len(config.layers))
    return dataclasses.replace(config, mlp_width=max(1, round(missing)))


def _shapes(twin: pvm.PVMConfig) -> Any:
    return jax.eval_shape(lambda: pvm.init(jax.random.key(0), twin))


class MLPBranch(nn.Module):
    """The branch of one layer, kept in float32, computing in its input's dtype: [B, T, D] -> [B, T, D]."""

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """gate * norm(expand(swiglu(norm(reduce(x)))))."""
        c = self.config
        kernel_init = pvm.FAN_IN if c.initialiser == "fan_in" else WEIGHT
        latent = Linear(c.latent, kernel_init=kernel_init, name="text_reducer")(x)
        latent = RMSNorm(c.norm_eps, name="input_norm")(latent)
        latent = SwiGLU(c.mlp_width, kernel_init=kernel_init, name="mlp")(latent)
        out = Linear(c.width, kernel_init=kernel_init, name="output_expander")(latent).astype(jnp.float32)
        gate = self.param("gate_alpha", nn.initializers.constant(c.gate), (), jnp.float32)
        return (gate * (rms_normalise(out, c.norm_eps) if c.output_norm else out)).astype(x.dtype)


def init(key: Array, config: MLPConfig, base: Any = None) -> Any:
    """Fresh parameters, stacked over the layers; they do not depend on the backbone's weights, `base`."""
    one = lambda k: MLPBranch(config).init(k, jnp.zeros((1, 1, config.width)))["params"]  # noqa: E731
    return jax.vmap(one)(jax.random.split(key, len(config.layers)))


def prepare(config: MLPConfig, params: Any, visual: Array | None, rows: Array, stream: Stream) -> None:
    """Nothing is remembered of a prompt."""


def append(old: None, new: None) -> None:
    """Nothing joined to nothing."""


def take(state: None, rows: Array) -> None:
    """Nothing of some rows."""


def ports(config: MLPConfig, params: Any, state: None, stream: Stream, dropout: Array | None = None) -> Ports:
    """The branch beside the FFN of its layers; silent at the images' own positions, like PVM."""

    def act(slot: Any, residual: Array, normed: Array | None) -> Array:
        out: Any = MLPBranch(config).apply({"params": slot}, residual if config.query == "residual" else normed)
        return jnp.where(stream.is_visual[..., None], jnp.zeros_like(out), out) if config.silence else out

    return Ports(beside_ffn=(Port(params, act, config.layers),))
