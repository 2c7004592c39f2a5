"""Rollouts of the world's prompts in several ways of calling for memories, each sampled once."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from jaxmem.memory import pvm
from jaxmem.memory.pvm import PVMConfig
from jaxmem.memory.vismem import VisMemConfig
from jaxmem.model import Spec
from jaxmem.sampling import insertion
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.rollout import Rollout
from tests.memory import vismem_world as v
from tests.memory import world as w

OFFICIAL = dataclasses.replace(
    v.CONFIG,
    visual_source="llm_last",
    visual_spans="first",
    builder_length=v.CONFIG.text_cap + v.CONFIG.queries + 5,  # at most 5 visual states
    out_norm=True,
    invoke_bias=0.5,
)
PVM = pvm.create(v.BACKBONE, layers=(1,), latent=32)
DELIMITERS = tuple(range(0, v.KNOWN, 3))


@dataclasses.dataclass(frozen=True)
class Variant:
    """How memories are called for, the VisMem, and other memories of the model."""

    invoke: InvokeConfig
    config: VisMemConfig = v.CONFIG
    others: tuple[PVMConfig, ...] = ()

    @property
    def spec(self) -> Spec:
        """With all memories."""
        return Spec(v.BACKBONE, (*self.others, self.config))

    @property
    def memory(self) -> Any:
        """Weights of all memories."""
        return {config.name: weights(config) for config in self.spec.memories}


free = functools.partial(InvokeConfig, max_invocations=3)
VARIANTS = {
    "free": Variant(free()),
    "apart": Variant(free(rows_at_once=4, prefix_cache=False)),
    "reverse": Variant(InvokeConfig(max_invocations=2, min_gap=3, reverse=True, rows_at_once=2), others=(PVM,)),
    "skip": Variant(free(disabled=("long",))),
    "official": Variant(free(disabled=("short",), disabled_mode="mask", content="shuffle"), OFFICIAL),
    "anywhere": Variant(
        InvokeConfig("random", probability=0.5, anywhere=True, min_gap=0, max_invocations=9, content="zero")
    ),
    "delimiters": Variant(InvokeConfig("random", delimiters=DELIMITERS, content="noise", max_invocations=4)),
}


@functools.cache
def base() -> Any:
    return v.base_of()


@functools.cache
def weights(config: Any) -> Any:
    """Random parameters of a memory, PVM's with open gates."""
    if isinstance(config, PVMConfig):
        return w.random_memory(config, 6, gates=(0.5,))
    return v.memory_of(config, eagerness=1.5)["vismem"]


def play(name: str, batch: Any = None, **settings: Any) -> Rollout:
    """Three continuations of each of the world's four prompts, or of other prompts of their shape."""
    variant, sizes = VARIANTS[name], (3, 6) if name == "apart" else insertion.TEXT_SIZES
    settings = {"base": base(), "memory": variant.memory, "spec": variant.spec, **settings}
    with mock.patch.object(insertion, "TEXT_SIZES", sizes), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of too many visual states, which is tested elsewhere
        return v.play(v.kept_rows() if batch is None else batch, variant.invoke, **settings)


@functools.cache
def played(name: str, padding: str = "left") -> Rollout:
    """The same once; "apart" chooses between formers of several sizes."""
    return play(name, v.kept_rows(padding))


def members(rolled: Rollout) -> Iterator[tuple[int, ...]]:
    """Every (row, member)."""
    return np.ndindex(*rolled.lengths.shape)
