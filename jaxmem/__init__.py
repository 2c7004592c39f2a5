"""jaxmem: visual memories for frozen vision-language models, in JAX and Flax.

`import jaxmem` is light: jax, flax and transformers are imported when `jaxmem.load` or `jaxmem.Model` is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmem.api import Completion, Model, load

__version__ = "0.1.0"
__all__ = ["Completion", "Model", "__version__", "load"]

_LAZY = dict.fromkeys(("Completion", "Model", "load"), "jaxmem.api")


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxmem' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
