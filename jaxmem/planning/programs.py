"""The programs of a training run without weights, data or devices: what `jaxmem plan` compiles.

They are the very functions that training calls, lowered with shapes for arguments on the mesh of a topology.
Axis letters: A microbatches, B rows, G completions of a prompt, T tokens, P patches, N new tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmem import transfer
from jaxmem.adapters import lora
from jaxmem.backbones import registry
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.config import build
from jaxmem.distributed.mesh import activation_sharding, batch_shardings, check_heads, shardings
from jaxmem.memory.vismem import TYPES
from jaxmem.model import Spec, init_memory
from jaxmem.planning import needed
from jaxmem.planning.architecture import backbone_of, spec_of
from jaxmem.planning.batches import Shape, abstract, item_lengths
from jaxmem.sampling import generate, insertion
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.splicing import Spliced, text_room
from jaxmem.training import descent, grpo, grpo_run, sft, trees
from jaxmem.training.descent import TrainState
from jaxmem.training.grpo import Samples
from jaxmem.training.settings import TrainConfig
from jaxmem.training.vismem_stages import Stage


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: "train step", "score", "update", "prefill" or "rollout".
      lower: lowers it for the mesh.
      arguments: by kind, trees of ShapeDtypeStruct with shardings.
      resting: what lies in the memory meanwhile without being an argument, by kind.
      flops: needed for one execution on all devices together (`jaxmem.planning.needed`).
      tokens: that one execution learns from, reads or writes.
      trips: of loops whose length the program leaves open, by nesting (`hlo.count`); empty where there are none.
      branch_share: share of the executions of conditionals that take the costliest branch, by their names.
    """

    name: str
    lower: Callable[[], Any]
    arguments: Mapping[str, Any]
    resting: Mapping[str, Any]
    flops: float
    tokens: float
    trips: tuple[float, ...]
    branch_share: Mapping[str, float]


def programs(config: TrainConfig, mesh: Mesh, shape: Shape | None = None) -> list[Program]:
    """The programs of a run.

    Args:
      config: resolved for the mesh (`TrainConfig.resolved`).
      mesh: of the topology's devices.
      shape: lengths of the batch.

    Raises:
      ConfigError: the mesh does not divide the heads, or a pattern of `trainable` matches nothing.
    """
    backbone = backbone_of(config)
    run = _Run(config, spec_of(config, backbone), mesh, shape or Shape.longest(config))
    for part in (backbone, run.encoder):
        if part is not None:
            check_heads(part.text, mesh)
    if config.encoder:
        transfer.check_run(run.spec, run.split[0])
    if config.grpo is None:
        return [run.train_step()]
    if run.stage == "warm_up":  # learns from references
        return [run.update()]
    scored = [run.score()] if config.grpo.old_logprobs == "trainer" or config.grpo.loss.kl_weight else []
    return [*run.rollout(), *scored, run.update()]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Abstract trees of a run, made when they are asked for."""

    config: TrainConfig
    spec: Spec
    mesh: Mesh
    shape: Shape

    @functools.cached_property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.dtype or "bfloat16")

    @property
    def encoder(self) -> BackboneConfig | None:
        """The backbone that reads knowledge items and prompts for the one that answers, where it is another one."""
        return None if self.spec.comem is None else self.spec.comem.encoder

    @functools.cached_property
    def tree(self) -> Any:
        """{"base", "memory"} in the dtypes that they are loaded in."""
        lib = registry.backbone(self.spec.backbone.model_type)
        base = lib.shapes(self.spec.backbone, self.dtype)
        if self.encoder is not None:
            base = {**base, "encoder": registry.backbone(self.encoder.model_type).shapes(self.encoder, self.dtype)}
        if self.config.lora is not None:
            settings = build(lora.LoRAConfig, self.config.lora, "config.lora")
            base = jax.eval_shape(lambda base: lora.attach(jax.random.key(0), settings, base), base)
        memory = jax.eval_shape(lambda: init_memory(jax.random.key(0), self.spec))
        return {"base": base, "memory": memory}

    @functools.cached_property
    def split(self) -> tuple[Any, Any]:
        """(trainable, frozen)."""
        return trees.split(self.tree, self.config.trainable)

    @functools.cached_property
    def frozen(self) -> Any:
        return self.placed(self.split[1])

    @functools.cached_property
    def state(self) -> TrainState:
        start = lambda tree: descent.init_state(self.config.optimizer, tree, 0)  # noqa: E731
        return self.placed(jax.eval_shape(start, self.split[0]))

    @property
    def state_kinds(self) -> dict[str, Any]:
        """The training state by kind, of what trains."""
        return {
            "trained weights": (self.state.trainable, self.state.step, self.state.key),
            "optimizer": self.state.opt_state,
        }

    def placed(self, tree: Any) -> Any:
        """Shapes with the shardings that the rules give them."""
        return jax.tree.map(_with_place, tree, shardings(self.mesh, tree))

    def rows(self, tree: Any, leading: int = 0) -> Any:
        """Shapes [..., B, ...] with their rows over the mesh; `leading` axes stand in front of B."""
        return jax.tree.map(_with_place, tree, batch_shardings(self.mesh, tree, leading))

    def batch(self, *leading: int) -> Batch:
        """A batch of shapes [*leading, ...], rows last."""
        asks = any(getattr(config, "asks", False) for config in self.spec.memories)
        shape = dataclasses.replace(self.shape, items=self.items, query=self.query, question=asks)
        return self.rows(abstract(leading, shape, self.spec.backbone, self.encoder), len(leading) - 1)

    @property
    def items(self) -> tuple[int, int, int]:
        """Number and lengths of the knowledge items of a row."""
        return (0, 0, 0) if self.spec.comem is None else item_lengths(self.config.data.buckets)

    @property
    def query(self) -> tuple[int, int]:
        """T and P of a row's prompt as an encoder beside the model reads it."""
        if self.spec.comem is None or self.encoder is None or not self.spec.comem.query:
            return 0, 0
        return self.config.data.buckets.query_tokens[-1], self.shape.patches if self.encoder.vision else 0

    @property
    def needed(self) -> needed.Needed:
        """What one row takes."""
        lengths = (self.shape.tokens, self.shape.patches)
        return needed.Needed(self.spec, self.split[0], *lengths, *self._memories, self.items, self.query)

    @property
    def stage(self) -> str:
        """VisMem's: "warm_up", "memory" or "invocation"; empty for every other run."""
        return "" if self.config.grpo is None or self.config.grpo.vismem is None else self.config.grpo.vismem.stage

    @property
    def _memories(self) -> tuple[int, int]:
        """Memories of a completion, as many as there may be, and the text of one: its share of the slots. The warm-up's
        only one stands in front of all text, behind its invocation token, or anywhere."""
        if not self.stage:
            return 0, 0
        invoke, new = self._method.vismem.invoke, self._method.max_new_tokens
        if self.stage == "warm_up":
            return 1, new // 2 if invoke.anywhere else 2
        return invoke.max_invocations, new // invoke.max_invocations

    @property
    def group(self) -> int:
        """Completions of a prompt, G: the warm-up's is the reference."""
        return 1 if self.stage == "warm_up" else self._method.group

    def program(
        self,
        name: str,
        lower: Callable[[], Any],
        arguments: Mapping[str, Any],
        flops: float,
        tokens: float,
        resting: Mapping[str, Any] | None = None,
        trips: tuple[float, ...] = (),
    ) -> Program:
        """A Program with this run's defaults; it is lowered with the mesh as the current one."""

        def on_mesh() -> Any:
            with jax.set_mesh(self.mesh):
                return lower()

        layers = sum(len(memory.layers) for memory in self.spec.memories)
        shares = {**self._text_share(), "DecoderLayer": layers / self.spec.backbone.text.layers}
        return Program(name, on_mesh, arguments, resting or {}, flops, tokens, trips, shares)

    def _text_share(self) -> dict[str, float]:
        """Of a former's branches by the size of its text: between the smallest and the largest, what stands for the one
        that holds the text of `_memories`."""
        config = self.spec.vismem
        if config is None or not self.stage:
            return {}
        sizes = insertion.text_sizes(min(config.text_cap, self._method.max_new_tokens + 1))
        size = next((size for size in sizes if size >= self._memories[1]), sizes[-1])
        return {"former": (size - sizes[0]) / max(1, sizes[-1] - sizes[0])}

    def train_step(self) -> Program:
        """A step of supervised fine-tuning."""
        config, trainable = self.config, self.split[0]
        forward = sft.model_forward(self.spec, trainable, remat=config.remat, base_dtype=self.dtype)
        report = functools.partial(sft.gates, self.spec)
        step: Any = sft.make_train_step(
            forward, config.optimizer, 1000, trainable, report=report, chunk=config.loss_chunk, dtype=self.dtype,
            donate=config.donate,
        )  # fmt: skip
        rows, parts = config.loop.batch_size, config.loop.accumulate
        batches = self.batch(parts, rows // parts)
        return self.program(
            "train step",
            lambda: step.lower(self.state, self.frozen, batches),
            {**self.state_kinds, "weights": self.frozen, "inputs": batches},
            flops=rows * self.needed.learn_row(),
            tokens=rows * self.shape.tokens,
        )

    def samples(self) -> Samples:
        """Completions of the step [A, B, G, N], all as long as they may be."""
        method, loop = self._method, self.config.loop
        lead = (loop.accumulate, loop.batch_size // method.minibatches // loop.accumulate)
        group = (*lead, self.group)
        new = lambda dtype: jax.ShapeDtypeStruct((*group, method.max_new_tokens), dtype)  # noqa: E731
        each = lambda dtype: jax.ShapeDtypeStruct(group, dtype)  # noqa: E731
        sampled = {"tokens": new(jnp.int32), "lengths": each(jnp.int32), "advantages": each(jnp.float32)}
        warm = self.stage == "warm_up"
        sampled |= {"mask": new(jnp.float32), "old": None if warm else new(jnp.float32)}
        sampled |= {"reference": new(jnp.float32) if method.loss.kl_weight and not warm else None}
        sampled |= self._spliced(group)
        return Samples(prompts=self.batch(*lead), **self.rows(sampled, 1))

    def _spliced(self, group: tuple[int, ...]) -> dict[str, Any]:
        """Where memories stand in completions [A, B, G], as many and with as long texts as there may be."""
        config, new = self.spec.vismem, self._method.max_new_tokens
        if config is None or not self.stage:
            return {}
        most, text = self._memories
        first = self.stage == "warm_up" and not self._method.vismem.invoke.anywhere
        longest = text if first else new
        shape = lambda dtype, *sizes: jax.ShapeDtypeStruct((*group, *sizes), dtype)  # noqa: E731
        spliced = Spliced(
            place=shape(jnp.int32, new),
            types=shape(jnp.int32, most),
            text=shape(jnp.int32, most, text_room(config, longest)),
            control=shape(jnp.bool_, new, 4),
        )
        return {"spliced": spliced, "memories": shape(jnp.float32, most, config.longest, config.width)}

    @property
    def _method(self) -> Any:
        assert self.config.grpo is not None, "a program of GRPO"
        return self.config.grpo

    @functools.cached_property
    def _score(self) -> grpo.Score:
        forward = grpo.model_forward(self.spec, self.split[0], remat=self.config.remat, base_dtype=self.dtype)
        return grpo.make_score(forward, self._method.temperature, self.config.loss_chunk)

    def score(self) -> Program:
        """Log-probabilities of a step's completions in front of its updates."""
        samples, method = self.samples(), self._method
        trainable = {"trained weights": self.state.trainable}
        score: Any = grpo_run.compiled_score(self._score)
        rows = self.config.loop.batch_size // method.minibatches
        return self.program(
            "score",
            lambda: score.lower(self.state.trainable, self.frozen, samples),
            {**trainable, "weights": self.frozen, "inputs": samples},
            resting={"optimizer": self.state.opt_state},
            flops=rows * self.needed.score_group(method.group, method.max_new_tokens),
            tokens=rows * method.group * method.max_new_tokens,
        )

    def update(self) -> Program:
        """One update of GRPO."""
        config, method, samples = self.config, self._method, self.samples()
        update: Any = grpo.make_update(
            self._score, method.loss, config.optimizer, 1000, self.split[0], method.max_new_tokens, self.dtype,
            config.donate,
        )  # fmt: skip
        rows = config.loop.batch_size // method.minibatches
        return self.program(
            "update",
            lambda: update.lower(self.state, self.frozen, samples),
            {**self.state_kinds, "weights": self.frozen, "inputs": samples},
            flops=rows * self.needed.learn_group(self.group, method.max_new_tokens),
            tokens=rows * self.group * method.max_new_tokens,
        )

    def rollout(self) -> list[Program]:
        """Prefill, and the loop that samples until the longest completion ends."""
        method, config = self._method, self.config
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = min(method.prompts_at_once * ways or config.loop.batch_size, config.loop.batch_size)
        plain = SamplerConfig(stop_tokens=(1,), banned_tokens=self.spec.backbone.media_tokens)
        settings = self._staged(method.sampler(plain))
        cast = jax.eval_shape(lambda tree: descent.computing(tree, self.dtype), self.split[0])
        tree = trees.merge(self.placed(cast), self.frozen)
        kinds = {"weights": tree}
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (rows, method.group)))
        batch, size = self.batch(rows), self.shape.tokens + settings.max_new_tokens
        start = lambda: generate.start.lower(  # noqa: E731
            self.spec, settings, size, tree["base"], tree["memory"], batch, self.placed(keys)
        )
        resting = {"trained weights": self.split_if_cast(), "optimizer": self.state.opt_state}
        prefill = self.program(
            "prefill", start, {**kinds, "inputs": (batch, keys)}, resting=resting,
            flops=rows * self.needed.read_row(), tokens=rows * self.shape.tokens,
        )  # fmt: skip

        begin = functools.partial(generate.start, self.spec, settings, size)
        state = self.sampling(jax.eval_shape(begin, tree["base"], tree["memory"], batch, keys))
        until = jax.ShapeDtypeStruct((), jnp.int32)
        decode = self.program(
            "rollout",
            lambda: generate.proceed.lower(self.spec, settings, tree["base"], tree["memory"], state, until),
            {**kinds, "cache": state},
            resting=resting,
            flops=rows * self.needed.write_group(method.group, settings.max_new_tokens),
            tokens=rows * method.group * settings.max_new_tokens,
            trips=self._trips(rows // ways),
        )
        return [prefill, decode]

    def _staged(self, plain: SamplerConfig) -> SamplerConfig:
        """The sampling with VisMem's memories, as at the end of its stage."""
        if not self.stage or self.spec.vismem is None:
            return plain
        settings, steps = self._method.vismem, 1000
        stage = Stage(settings, self.spec.vismem, (), steps, settings.probability_anywhere or 0.5)
        return stage.sampler(plain, steps)

    def _trips(self, prompts: int) -> tuple[float, ...]:
        """Of the open loops of a rollout of so many prompts on a device: one pass per token; in it, passes for all
        memories that there may be; in those, passes for what is computed once per prompt and type."""
        new = self._method.max_new_tokens
        if not self.stage:
            return (new,)
        invoke = self._method.vismem.invoke
        rows = min(invoke.rows_at_once, prompts * self.group)
        turns = -(-invoke.max_invocations * self.group * prompts // rows)
        return (new, turns / new, min(1.0, len(TYPES) * prompts / turns))

    def sampling(self, state: generate.State) -> generate.State:
        """The state of the sampling with the places of its caches."""
        put = lambda tree, name: jax.tree.map(  # noqa: E731
            lambda leaf: _with_place(leaf, activation_sharding(self.mesh, leaf.shape, name)), tree
        )
        cache, tail = state.cache, state.cache.tail
        assert tail is not None, "a cache of continuations"
        nothing: Any = None
        rest = self.rows(dataclasses.replace(state, cache=nothing, insertions=None))
        # What memories remember of prompts is [B, ...] or, of several layers, [slots, B, ...].
        states = jax.tree.map(lambda leaf: self.rows(leaf, int(leaf.ndim > 2)), cache.states)
        if self.spec.vismem is not None:
            states |= {self.spec.vismem.name: self.rows(cache.states[self.spec.vismem.name])}
        tail = dataclasses.replace(self.rows(tail), layers=put(tail.layers, "branch_keys"))
        cache = dataclasses.replace(self.rows(cache), layers=put(cache.layers, "trunk_keys"), tail=tail)
        rest = dataclasses.replace(rest, cache=dataclasses.replace(cache, states=states))
        if (own := state.insertions) is None:
            return rest
        placed = self.rows(dataclasses.replace(own, past=None))
        placed = dataclasses.replace(placed, ring=put(own.ring, "members"), filled=self.rows(own.filled, 1))
        return dataclasses.replace(rest, insertions=dataclasses.replace(placed, past=put(own.past, "prefixes")))

    def split_if_cast(self) -> Any:
        """The float32 originals that rest while their copies sample; nothing where they sample themselves."""
        return {name: tree for name, tree in self.state.trainable.items() if name == "base"}


def _with_place(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
