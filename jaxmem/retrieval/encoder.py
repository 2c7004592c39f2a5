"""Knowledge items to embeddings, in bucketed batches: what a memory bank is filled with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxmem.backbones.batch import Array, Batch
from jaxmem.checkpoints.identity import memory_identity, weights_fingerprint
from jaxmem.data import knowledge
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.distributed import hosts
from jaxmem.distributed.mesh import current
from jaxmem.errors import ConfigError
from jaxmem.memory import comem
from jaxmem.memory.comem import CoMEMConfig

if TYPE_CHECKING:
    from jaxmem.api import Model

_encode = jax.jit(comem.encode, static_argnums=(0, 1))


@dataclasses.dataclass(frozen=True)
class ItemEncoder:
    """A model's CoMEM as a function of items.

    Attributes:
      model: with a CoMEM.
      batch: items that are encoded at once; the last ones are filled up, so that one program serves.
      buckets: lengths that items may have (`item_tokens`, `item_patches`).
    """

    model: Model
    batch: int = 16
    buckets: Buckets = Buckets()

    def __post_init__(self) -> None:
        if self.model.spec.comem is None:
            raise ConfigError('the model has no CoMEM; attach one (model.attach("comem")) or name a trained one')
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; encode at least one item at once")

    @property
    def config(self) -> CoMEMConfig:
        """The memory's settings."""
        config = self.model.spec.comem
        assert config is not None, "checked when the encoder was made"
        return config

    @property
    def latents(self) -> int:
        """Vectors of an item."""
        return self.config.latents

    @property
    def width(self) -> int:
        """Width of a vector."""
        return self.config.target_width

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides an item's vectors but the item and its template."""
        alone = dataclasses.replace(self.config, encoder=None, query=True)  # whoever answers, items are read alike
        digest = hashlib.sha256(weights_fingerprint(self.model.encoder_folder or self.model.folder).encode())
        about = {"dtype": str(self._dtype), "config": memory_identity(alone)}
        digest.update(json.dumps(about, sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.model.memory[self.config.name]):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(hosts.fetch(leaf)).tobytes())
        return digest.hexdigest()

    @property
    def _dtype(self) -> Any:
        """Of the vectors: that of the backbone that reads items."""
        return self.model.base.get("encoder", self.model.base)["embed"].dtype

    @functools.cached_property
    def template(self) -> str:
        """SHA-256 of how items are written."""
        return hashlib.sha256(json.dumps(knowledge.template(self.config), sort_keys=True).encode()).hexdigest()

    def read(self, item: Any, where: str = "the item") -> Example:
        """The item as the encoder reads it; DataError for an item that cannot be used."""
        return knowledge.encode_item(self.model.processor.reader, self.config, item, where)

    def size(self, item: Any) -> int:
        """Tokens of an item."""
        return len(self.read(item))

    def encode(self, items: Sequence[Any]) -> np.ndarray:
        """[N, M, W] in the backbone's dtype; each batch in the shortest bucket that holds its items.

        Raises:
          DataError: an item that cannot be used, or that is longer than the longest bucket.
        """
        read = [self.read(item, f"item {getattr(item, 'id', i)}") for i, item in enumerate(items)]
        found = [self._batch(read[start : start + self.batch]) for start in range(0, len(read), self.batch)]
        if not found:
            return np.zeros((0, self.latents, self.width), self._dtype)
        return np.concatenate(found)

    def _batch(self, examples: Sequence[Example]) -> np.ndarray:
        filled = [*examples, *[examples[-1]] * (self.batch - len(examples))]
        batch = collate(filled, self.buckets.of_items, self.model.processor.reader.pad_token)
        with current(self.model.mesh):
            return np.asarray(hosts.fetch(self._vectors(batch)))[: len(examples)]

    def _vectors(self, batch: Batch) -> Array:
        spec, params = self.model.spec, self.model.memory[self.config.name]
        return _encode(self.config, spec.backbone, self.model.base, params, batch)


def load_encoder(
    folder: str,
    memory: str,
    dtype: str | None = None,
    *,
    encoder: str | None = None,
    batch: int = 16,
    max_pixels: int | None = None,
) -> ItemEncoder:
    """The encoder of a backbone's folder and a folder with a trained CoMEM; `encoder`: another backbone reads items."""
    from jaxmem import api

    model = api.load(folder or api.TINY, dtype, memory=memory, encoder=encoder, max_pixels=max_pixels)
    return ItemEncoder(model, batch)
