"""Random keys that follow from names: what is sampled for one depends on no other, nor on its place in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxmem.backbones.batch import Array


def named(seed: int, names: Sequence[str]) -> Array:
    """[B] random keys, one for each name: equal names have equal keys under one seed."""
    digests = [hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8] for name in names]
    words = np.stack([np.frombuffer(digest, "<u4") for digest in digests]).astype(np.uint32)
    key = jax.random.key(seed)
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(words)
