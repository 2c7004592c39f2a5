"""Which module is which memory. A memory module offers create, init, prepare, append, take and ports (see `pvm`)."""

from __future__ import annotations

from types import ModuleType

from jaxmem.errors import ConfigError
from jaxmem.memory import comem, deepstack, fastv, mlp_branch, pvm, sva, vision_remember, vismem

MEMORIES: dict[str, ModuleType] = {
    "pvm": pvm,
    "mlp": mlp_branch,
    "vismem": vismem,
    "comem": comem,
    "vision_remember": vision_remember,
    "deepstack": deepstack,
    "sva": sva,
    "fastv": fastv,
}


def memory(name: str) -> ModuleType:
    """The module with a memory's functions.

    Raises:
      ConfigError: no such memory; the message lists those there are.
    """
    if name not in MEMORIES:
        raise ConfigError(f"there is no memory {name!r}; there are: {', '.join(sorted(MEMORIES))}")
    return MEMORIES[name]
