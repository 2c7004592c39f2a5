"""Settings of a projector: which one, its sizes, and how many tokens it makes of a tile.

Symbols: C width of the vision tower, D of the decoder, H patches per side of a tile, h' tokens per side, r compression
per side, N' tokens per tile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmem.backbones.batch import Array
from jaxmem.backbones.encoder import ACTS as ENCODER_ACTS
from jaxmem.errors import ConfigError

ACTS: dict[str, Callable[[Array], Array]] = {**ENCODER_ACTS, "silu": jax.nn.silu, "relu": jax.nn.relu}
"""By their names in config.json."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "mlp": {},
    "avgpool": {},
    "ldpv2": {"queries": 144},
    "tokenpacker": {"width": 1024, "heads": 8, "norm_eps": 1e-6},
    "pixel_shuffle": {"norm_eps": 1e-5},
    "c_abstractor": {"width": 1024, "depth": 3, "queries": 144, "norm_eps": 1e-5},
    "resampler": {"kind": "perceiver"},
}
"""Every projector with the settings that it alone has, and their published values."""

KINDS: Mapping[str, Mapping[str, Any]] = {
    "perceiver": {"width": 512, "heads": 8, "depth": 3, "queries": 32, "norm_eps": 1e-5},
    "honeybee": {"width": 1024, "heads": 16, "depth": 6, "queries": 64, "norm_eps": 1e-5},
    "q_former": {"width": 768, "heads": 12, "depth": 12, "queries": 32, "norm_eps": 1e-12},
}
"""The same of every kind of resampler."""

_CELLS = ("avgpool", "tokenpacker", "pixel_shuffle")  # token (i, j) is made of cell (i, j): the ratio says how many
_POOLED = ("ldpv2", "c_abstractor")  # pooled to any square number of tokens
_OWN = ("kind", "width", "heads", "depth", "queries", "norm_eps")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """A projector; settings of 0 or "" become the published ones of that projector.

    Attributes:
      name: a key of `PUBLISHED`.
      in_width: C.
      out_width: D.
      side: H.
      ratio: r. avgpool, tokenpacker and pixel_shuffle take any from 1 to H: cells that reach over the border have fewer
        patches. ldpv2 and c_abstractor, which pool to `queries`, take it in place of that number, and have H / h',
        rounded up, otherwise. mlp and resampler have 1.
      queries: N' of ldpv2, c_abstractor (both a square) and resampler.
      bias: the maps of the two-layer MLP have biases.
      act: of that MLP, a key of `ACTS`; "gelu" is the exact one. C-Abstractor, Honeybee's and BLIP-2's resamplers have
        none to choose.
      levels: hidden states that a TokenPacker's keys and values are made of, beside the main feature.
      kind: of resampler, a key of `KINDS`.
      width: inner width of tokenpacker, c_abstractor and resampler (of the perceiver, in its attention).
      heads: of tokenpacker and resampler.
      depth: blocks of a resampler, or of each of c_abstractor's two stages.
      norm_eps: of the LayerNorms.
    """

    name: str
    in_width: int
    out_width: int
    side: int
    ratio: int = 1
    queries: int = 0
    bias: bool = True
    act: str = "gelu"
    levels: tuple[int, ...] = (12, 16, 22, 23)
    kind: str = ""
    width: int = 0
    heads: int = 0
    depth: int = 0
    norm_eps: float = 0.0

    def __post_init__(self) -> None:
        """Fills in the published settings and checks all of them; raises ConfigError."""
        self._name()
        own = self._published()
        if foreign := [key for key in _OWN if getattr(self, key) and key not in own]:
            raise ConfigError(f"projector {self.name!r} has no {', '.join(foreign)}; it has {', '.join(own) or 'none'}")
        for key in own:
            if not getattr(self, key) and not (key == "queries" and self.ratio != 1):
                object.__setattr__(self, key, own[key])
        object.__setattr__(self, "levels", tuple(self.levels))
        self._sizes()
        self._tokens()

    def _name(self) -> None:
        """Checks the words."""
        for what, word, known in (("projector", self.name, PUBLISHED), ("activation", self.act, ACTS)):
            if word not in known:
                raise ConfigError(f"{what} {word!r} is not implemented; there are {', '.join(known)}")
        if self.name == "resampler" and self.kind and self.kind not in KINDS:
            raise ConfigError(f"resampler kind {self.kind!r} is not implemented; there are {', '.join(KINDS)}")

    def _published(self) -> Mapping[str, Any]:
        """The settings that this projector has."""
        own = PUBLISHED[self.name]
        return own if self.name != "resampler" else {**own, **KINDS[self.kind or own["kind"]]}

    def _sizes(self) -> None:
        """Checks the numbers one by one."""
        least = dict.fromkeys(("in_width", "out_width", "side", "ratio"), 1)
        least |= dict.fromkeys(("queries", "width", "heads", "depth"), 0)
        sizes = {key: getattr(self, key) for key in least}
        if wrong := [f"{key} {n!r}" for key, n in sizes.items() if not isinstance(n, int) or n < least[key]]:
            raise ConfigError(f"projector {self.name!r}: {', '.join(wrong)} must be whole numbers of at least 1")
        if self.heads and self.width % self.heads:
            raise ConfigError(f"projector {self.name!r}: width {self.width} is not a multiple of {self.heads} heads")
        if self.kind == "q_former" and self.depth % 2:
            raise ConfigError(f"projector {self.name!r}: a Q-Former's layers come in pairs, not {self.depth}")
        if self.name == "tokenpacker" and not self.levels:
            raise ConfigError("projector 'tokenpacker' needs at least one hidden state in `levels`")

    def _tokens(self) -> None:
        """Checks ratio and queries, each of which may follow from the other."""
        where = f"projector {self.name!r} of {self.side}x{self.side} patches"
        if self.ratio > self.side:
            raise ConfigError(f"{where}: ratio {self.ratio} must be 1 to {self.side}")
        if self.name not in _POOLED:
            if self.name not in _CELLS and self.ratio != 1:
                raise ConfigError(f"{where}: ratio {self.ratio} must be 1; {', '.join(_CELLS + _POOLED)} compress")
            return
        if not self.queries:
            object.__setattr__(self, "queries", (-(-self.side // self.ratio)) ** 2)
        grid = math.isqrt(self.queries)
        if grid**2 != self.queries or grid > self.side:
            fit = f"a square of at most {self.side**2}, such as {min(grid, self.side) ** 2}"
            raise ConfigError(f"{where}: queries {self.queries} must be {fit}")
        ratio = -(-self.side // grid)
        if self.ratio not in (1, ratio):
            raise ConfigError(f"{where}: ratio {self.ratio} and queries {self.queries} do not agree; give one of them")
        object.__setattr__(self, "ratio", ratio)

    @property
    def grid(self) -> int | None:
        """h', or None where tokens have no place in the tile (resampler)."""
        if self.name == "resampler":
            return None
        return math.isqrt(self.queries) if self.queries else -(-self.side // self.ratio)

    @property
    def tokens(self) -> int:
        """N'."""
        return self.grid**2 if self.grid else self.queries

    @property
    def cell(self) -> int | None:
        """The r for which token (i, j) stands for cell (i, j) of `jaxmem.backbones.cells`; None where there is none.

        There is none without a grid, and where a tile is pooled to a grid whose bins overlap (27 patches to 12 tokens).
        """
        fits = self.grid and (self.name not in _POOLED or self.side % self.grid == 0)
        return self.ratio if fits else None

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of hidden states that are read beside the main feature: () for all but tokenpacker."""
        return self.levels if self.name == "tokenpacker" else ()
