"""The face of the library: one frozen value with a static spec, two trees and a processor.

Every method is a line or two onto the pure functions that training and sampling call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxmem import config as configs
from jaxmem import model as functions
from jaxmem import transfer
from jaxmem.adapters import lora
from jaxmem.adapters.lora import LoRAConfig
from jaxmem.assets import TINY
from jaxmem.backbones import registry
from jaxmem.backbones.batch import Array, Batch
from jaxmem.checkpoints import exported, huggingface, peft
from jaxmem.data import control, knowledge, query
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.loading import load_processor
from jaxmem.data.processor import Processor
from jaxmem.distributed.mesh import AXES, check_heads, current, shardings
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import comem, former
from jaxmem.memory.registry import memory as memory_module
from jaxmem.memory.vismem import TYPES
from jaxmem.model import Spec
from jaxmem.retrieval.encoder import ItemEncoder
from jaxmem.sampling import generate as sampling
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.slots import Slot, text_tokens

_hidden_states = jax.jit(functions.hidden_states, static_argnames=("spec", "remat", "backward_from"))
_logits = jax.jit(functions.logits, static_argnames="spec")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: decoded, without special tokens.
      tokens: ids, the stop token included.
      logprobs: of the tokens, at the sampling temperature, over the full vocabulary.
      stopped: False when the token limit cut the answer off.
      events: what happened on the way, in order: (place among `tokens`, "short" or "long") of every invocation.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    events: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone, its memories, and what turns chats into arrays.

    Attributes:
      spec: what is computed, without weights.
      base: the backbone's weights; at "encoder" in them those of the backbone that reads for it (`with_encoder`).
      memory: {name: parameters} of the attached memories.
      processor: tokenizer, image processor and chat template.
      folder: where the backbone came from.
      encoder_folder: where the encoder came from; None without one beside the backbone.
    """

    spec: Spec
    base: Any
    memory: dict[str, Any]
    processor: Processor
    folder: Path
    encoder_folder: Path | None = None

    def attach(self, memory: Any = "pvm", *, key: Array | None = None, **settings: Any) -> Model:
        """The model with one more memory, freshly initialised: gates at zero, so that it still equals its backbone.

        Args:
          memory: a name ("pvm") with `settings` of its `create`, or a memory's config.
          key: random key of the weights.

        Raises:
          ConfigError: unknown memory or settings, settings that do not fit the backbone, a memory twice.
        """
        if memory == "vismem":
            settings = control.settings_for(self.processor.tokenizer, settings)
        if memory == "comem" and self.processor.encoder is not None:
            settings = {"encoder": self.processor.encoder.config, **settings}
        config = memory_module(memory).create(self.spec.backbone, **settings) if isinstance(memory, str) else memory
        if config.name == "vismem":
            control.check(self.processor.tokenizer, config)
        init = jax.jit(memory_module(config.name).init, static_argnums=1)
        params = init(jax.random.key(0) if key is None else key, config, self.base)
        return self._with(config, params)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the backbone lies on; None on a single device."""
        sharding = jax.tree.leaves(self.base)[0].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) and mesh.axis_names == AXES else None

    def _placed(self, tree: Any) -> Any:
        """New weights where the rules of the mesh want them."""
        return tree if self.mesh is None else jax.device_put(tree, shardings(self.mesh, tree))

    def with_encoder(self, encoder: Model | str | Path) -> Model:
        """The model with another one beside it: CoMEM's encoder, which reads knowledge items and prompts with their
        images for a model that may be a decoder alone. `attach` or `restore` the memory then.

        Args:
          encoder: a model, or the Hugging Face folder of one. Its weights are shared, not copied, and never train. A
            CoMEM that it has comes with it, where its vectors are as wide as this model.

        Raises:
          ConfigError: this model reads for itself already, or the encoder has LoRA factors, other memories, an encoder
            of its own, another mesh, or a CoMEM whose vectors have another width.
        """
        reads = encoder if isinstance(encoder, Model) else load(encoder, self.base["embed"].dtype, mesh=self.mesh)
        transfer.check(self, reads)
        model = dataclasses.replace(
            self,
            base={**self.base, "encoder": reads.base},
            processor=dataclasses.replace(self.processor, encoder=reads.processor),
            encoder_folder=reads.folder,
        )
        if reads.spec.comem is None:
            return model
        config = comem.transferred(reads.spec.comem, reads.spec.backbone, self.spec.backbone)
        return model._with(config, reads.memory[config.name])

    def restore(self, folder: str | Path) -> Model:
        """The model with the memory that `save` wrote into a folder.

        Raises:
          CheckpointError: no memory there, one for another backbone or encoder, or tensors that do not fit.
        """
        name, stored = huggingface.read_memory_config(folder, self.spec.backbone)
        return self._restored(folder, name, stored, huggingface.load_memory)

    def _restored(self, folder: str | Path, name: str, stored: Mapping[str, Any], read: Callable[..., Any]) -> Model:
        """The model with a memory of stored settings; `read(folder, config, backbone, shapes)` gives its parameters."""
        module = memory_module(name)
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
        if name == "comem":
            settings["encoder"] = transfer.encoder_for(self, stored.get("encoder"), folder)
        config = module.create(self.spec.backbone, **settings)
        if name == "vismem":
            control.check(self.processor.tokenizer, config)
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), config))
        return self._with(config, read(folder, config, self.spec.backbone, shapes))

    def _with(self, config: Any, params: Any) -> Model:
        if config.name in self.memory:
            raise ConfigError(f"the model already has a memory {config.name!r}; attach to a fresh model instead")
        spec = dataclasses.replace(self.spec, memories=(*self.spec.memories, config))
        memory = {**self.memory, **self._placed({config.name: params})}
        processor = self.processor
        if getattr(config, "asks", False):
            processor = dataclasses.replace(processor, mark_question=True)
        return dataclasses.replace(self, spec=spec, memory=memory, processor=processor)

    def attach_lora(self, *, key: Array | None = None, **settings: Any) -> Model:
        """The model with LoRA factors beside kernels of its decoder, which start as no change.

        Args:
          key: random key of the factors.
          **settings: of `jaxmem.adapters.lora.LoRAConfig` (rank, alpha, targets, layers).

        Raises:
          ConfigError: unknown settings, targets or layers, or a model that has factors already.
        """
        config = configs.build(LoRAConfig, settings, "lora")
        key = jax.random.key(0) if key is None else key
        return dataclasses.replace(self, base=self._placed(lora.attach(key, config, self.base)))

    def restore_lora(self, folder: str | Path) -> Model:
        """The model with the LoRA factors of a PEFT folder; CheckpointError when they do not fit."""
        return dataclasses.replace(self, base=self._placed(peft.load_adapter(folder, self.base, self.spec.backbone)))

    def save_lora(self, folder: str | Path) -> None:
        """Writes the LoRA factors (not the backbone) to a folder that PEFT and `restore_lora` read."""
        peft.save_adapter(folder, self.base, self.spec.backbone, str(self.folder))

    def merge_lora(self) -> Model:
        """The model with its LoRA factors added into plain weights."""
        return dataclasses.replace(self, base=lora.merge(self.base))

    def without_memory(self) -> Model:
        """The bare backbone, for comparison."""
        return dataclasses.replace(
            self,
            spec=dataclasses.replace(self.spec, memories=()),
            base={name: part for name, part in self.base.items() if name != "encoder"},
            memory={},
            processor=dataclasses.replace(self.processor, encoder=None),
            encoder_folder=None,
        )

    def batch(
        self,
        chats: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        buckets: Buckets | None = None,
        padding: str = "right",
        items: Sequence[Any] | None = None,
    ) -> Batch:
        """Chats with images -> Batch; a single chat is a batch of one.

        Args:
          chats: list of chats, or one.
          add_generation_prompt: end with the opening of an assistant turn.
          buckets: allowed lengths.
          padding: side of the token padding.
          items: per chat what CoMEM knows of it, best first: knowledge items (`{"image": ..., "text": ...}`), which are
            encoded here, or an array [K, M, D] of their embeddings (`encode_items`, a memory bank).

        Raises:
          DataError: chats, images or items that cannot be used, or lists of different lengths.
        """
        chats = [chats] if isinstance(chats[0], dict) else chats
        known = [()] * len(chats) if items is None else items
        if len(known) != len(chats):
            raise DataError(
                f"there are {len(chats)} chats and items for {len(known)}; give a list for each, maybe empty"
            )
        rows = [
            query.encode_row(self.processor, self.spec.comem, chat, add_generation_prompt, where=f"chat {i}")
            for i, chat in enumerate(chats)
        ]
        rows = [self._behind(row, own) for row, own in zip(rows, known, strict=True)]
        return collate(rows, buckets, self.processor.pad_token, padding)

    def encode_items(self, items: Sequence[Any], *, batch: int = 16, buckets: Buckets | None = None) -> np.ndarray:
        """CoMEM's embeddings of knowledge items, [N, M, D]: once for all questions.

        Raises:
          ConfigError: the model has no CoMEM.
          DataError: an item that cannot be used.
        """
        return ItemEncoder(self, batch, buckets or Buckets()).encode(items)

    def _behind(self, row: Example, items: Any) -> Example:
        """A row behind the embeddings of its items."""
        if not len(items):
            return row
        order = "rank" if self.spec.comem is None else self.spec.comem.order
        known = isinstance(items, np.ndarray | jax.Array)
        vectors = np.asarray(items) if known else self.encode_items(items, batch=len(items))
        return knowledge.behind_vectors(row, vectors, order, self.processor.pad_token)

    def logits(self, batch: Batch) -> Array:
        """[B, T, V] float32, for looking; training never makes it."""
        with current(self.mesh):
            return _logits(self.spec, self.base, _hidden_states(self.spec, self.base, self.memory, batch))

    def sampler(self, **settings: Any) -> SamplerConfig:
        """Sampling settings with this model's stop tokens, padding and banned media tokens filled in."""
        fields = {field.name for field in dataclasses.fields(SamplerConfig)}
        if unknown := sorted(set(settings) - fields):
            raise ConfigError(f"sampling has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
        fixed: dict[str, Any] = {
            "stop_tokens": tuple(self.processor.stop_tokens),
            "banned_tokens": self.spec.backbone.media_tokens,
            "pad_token": self.processor.pad_token,
        }
        if isinstance(settings.get("invoke"), Mapping):
            settings["invoke"] = configs.build(InvokeConfig, settings["invoke"], "invoke")
        invoke = settings.get("invoke")
        if invoke is not None and self.spec.vismem is None and invoke != InvokeConfig():
            raise ConfigError("sampling.invoke is VisMem's, and the model has none; attach it, or leave invoke out")
        return SamplerConfig(**{**fixed, **settings})

    def generate(
        self,
        chats: Sequence[Any],
        *,
        key: Array | None = None,
        buckets: Buckets | None = None,
        items: Sequence[Any] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Continues every chat.

        Args:
          chats: list of chats, or one.
          key: random key; fixed when None.
          buckets: allowed prompt lengths.
          items: per chat its knowledge items or their embeddings (`batch`).
          **settings: of `SamplerConfig` (max_new_tokens, temperature, ...).

        Returns:
          One Completion per chat.
        """
        with current(self.mesh):
            *_, answers = self.stream(chats, key=key, buckets=buckets, every=None, items=items, **settings)
        return answers

    def stream(
        self,
        chats: Sequence[Any],
        *,
        key: Array | None = None,
        buckets: Buckets | None = None,
        every: int | None = 8,
        items: Sequence[Any] | None = None,
        **settings: Any,
    ) -> Iterator[list[Completion]]:
        """Like `generate`, but yields the growing answers after every few tokens.

        Raises:
          DataError: prompts do not fit, or with VisMem have more visual states than it may refuse (`overflow`).
        """
        options = self.sampler(**settings)
        batch = self.batch(chats, buckets=buckets, items=items)
        if self.spec.vismem is not None:
            former.check_spans(self.spec.vismem, batch)
        every = every or options.max_new_tokens
        for part in sampling.stream(self.spec, self.base, self.memory, batch, options, key, every):
            rows = zip(part.tokens, part.logprobs, part.kinds, part.lengths, strict=True)
            yield [self._completion(*row, options) for row in rows]

    def _completion(self, tokens: Any, logprobs: Any, kinds: Any, length: int, options: SamplerConfig) -> Completion:
        kept = [slot for slot in range(length) if kinds[slot] != Slot.MEMORY]
        ids = tuple(int(tokens[slot]) for slot in kept)
        config, events = self.spec.vismem, []
        if config is not None:
            types = dict(zip(config.invoke_ids, TYPES, strict=True))
            events = [(place, types[token]) for place, token in enumerate(ids) if token in types]
        stopped = bool(ids) and ids[-1] in options.stop_tokens
        text = self.processor.decode(text_tokens(tokens, kinds, length))
        return Completion(text, ids, tuple(float(logprobs[slot]) for slot in kept), stopped, tuple(events))

    def export(self, folder: str | Path, to: str = "hf", **options: Any) -> Any:
        """Writes a folder for PyTorch and proves it there; see `jaxmem.export.cli.export`."""
        from jaxmem.export.cli import export  # heavy, and it needs this module

        return export(self, folder, to, **options)

    def save(self, folder: str | Path) -> None:
        """Writes the attached memory (not the backbone) to a folder that `restore` and `load` read.

        Raises:
          ConfigError: there is no memory, or more than one.
        """
        if len(self.spec.memories) != 1:
            raise ConfigError(f"a folder holds one memory; this model has {len(self.spec.memories)}")
        (config,) = self.spec.memories
        huggingface.save_memory(folder, self.memory[config.name], config, self.spec.backbone)


def load(
    path: str | Path = TINY,
    dtype: Any = None,
    *,
    memory: str | Path | None = None,
    encoder: str | Path | None = None,
    mesh: Mesh | None = None,
    sharding: Any = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Model:
    """A model from a Hugging Face folder.

    Args:
      path: folder with config.json, safetensors, tokenizer and preprocessor; the embedded tiny backbone by default. A
        folder that `jaxmem export --to=hf` wrote brings its memory along.
      dtype: of the weights and of the arithmetic ("bfloat16", "float32"); None keeps what is stored.
      memory: a folder that `Model.save` wrote.
      encoder: folder of the model that reads items and prompts for this one (`Model.with_encoder`).
      mesh: of `jaxmem.distributed.mesh.make_mesh`: weights are read piece by piece, each host its own.
      sharding: instead of a mesh, one jax Sharding for all leaves or a tree of them.
      min_pixels, max_pixels: replace the folder's limits per image.

    Raises:
      CheckpointError, ConfigError: the folder's files are missing, damaged or of an unsupported model.
    """
    folder, limits = Path(path), {"min_pixels": min_pixels, "max_pixels": max_pixels}
    beside = None if encoder is None else load(encoder, dtype, mesh=mesh, sharding=sharding, **limits)
    config = registry.config_from_hf(huggingface.read_config(folder))
    processor = load_processor(folder, config, **limits)
    dtype = None if dtype is None else jnp.dtype(dtype)
    if mesh is not None:
        check_heads(config.text, mesh)
        sharding = shardings(mesh, registry.backbone(config.model_type).shapes(config))
    own = (exported.section(folder) or {}).get("memory")
    ignore = None if own is None else exported.OWN.pattern
    base = huggingface.load_backbone(folder, config, dtype=dtype, sharding=sharding, ignore=ignore)
    model = Model(Spec(config), base, {}, processor, folder)
    model = model if beside is None else model.with_encoder(beside)
    model = model if own is None else model._restored(folder, own["name"], own, exported.load_memory)
    return model if memory is None else model.restore(memory)
