"""A tiny random backbone with a VisMem whose adapters, rows and slots are far from trivial, and recorded rollouts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import model
from jaxmem.memory import vismem
from jaxmem.model import Spec
from jaxmem.sampling import generate
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import Rollout
from jaxmem.sampling.slots import Slot
from tests.memory import world as w

KNOWN = 60  # the backbone's other rows belong to no token: V_tok is smaller than the matrix, as published
CONFIG = vismem.create(
    dataclasses.replace(w.BACKBONE),
    vocab=KNOWN,
    queries=3,
    short=2,
    long=4,
    builder_heads=4,
    rank=3,
    text_cap=24,
    builder_length=64,
    long_targets=("q", "k", "o", "up"),
)
SPEC = Spec(w.BACKBONE, (CONFIG,))
NEW, STOP, PAD = 30, 7, 1
FREE = InvokeConfig(max_invocations=3)
RANDOM = InvokeConfig(mode="random", anywhere=True, probability=0.3, max_invocations=3)


def base_of(seed: int = 0) -> Any:
    """Random backbone weights; embeddings and states of like size."""
    from jaxmem.backbones import qwen3_vl

    return w.random_like(qwen3_vl.shapes(w.BACKBONE), seed)


def memory_of(config: vismem.VisMemConfig = CONFIG, seed: int = 1, eagerness: float = 1.0) -> Any:
    """VisMem with noise in every leaf; `eagerness` is the size of the output rows."""
    shapes = jax.eval_shape(lambda: vismem.init(jax.random.key(0), config))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return 1 + 0.2 * noise
        if name.endswith("lora_b"):
            return 0.2 * noise
        if "unembed" in name:
            return eagerness * noise
        return noise / leaf.shape[-2] ** 0.5 if name.endswith(("kernel", "lora_a")) else 0.5 * noise

    return {"vismem": jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))}


def sampler(**settings: Any) -> SamplerConfig:
    banned = (w.IMAGE, w.VIDEO, w.START, w.END)
    banned = tuple(token for token in banned if token < KNOWN)
    invoke = settings.pop("invoke", FREE)
    fixed = {"max_new_tokens": NEW, "temperature": 1.0, "stop_tokens": (STOP,), "pad_token": PAD}
    return SamplerConfig(**{**fixed, "banned_tokens": banned, "invoke": invoke, **settings})


def last_state(spec: Spec, base: Any, memory: Any, batch: Any, settings: SamplerConfig, keys: Any, group: int) -> Any:
    """The state after the whole rollout."""
    *_, state = generate.states(spec, base, memory, batch, settings, keys, group)
    return state


def rolled(state: Any) -> Rollout:
    """A Rollout of a final state."""
    own = state.insertions
    leaves = (state.tokens, state.logprobs, state.kinds, state.count, ~state.done)
    return Rollout(*map(np.asarray, leaves), np.asarray(own.permits), np.asarray(own.memories))


def row_text(tokens: np.ndarray, kinds: np.ndarray) -> list[int]:
    return [int(t) for t, k in zip(tokens, kinds, strict=True) if k == Slot.TEXT]


def kept_rows(count: int = 4) -> Any:
    """A left-padded batch of the world's rows: two images, image first, text alone, one visual token."""
    return w.batch_of(w.rows_of(3)[:count], padding="left")


def memories_in(rolled: Rollout, row: int, member: int) -> list[tuple[int, int, int]]:
    """(slot of the invocation, slot of the end, type) of every memory, read from the record alone."""
    kinds, tokens = rolled.kinds[row, member], rolled.tokens[row, member]
    found = []
    for slot in np.flatnonzero((kinds == Slot.INVOKE) | (kinds == Slot.FORCED)):
        ends = np.flatnonzero((kinds == Slot.END) & (np.arange(len(kinds)) > slot))
        if len(ends) and (kinds[slot + 1 : ends[0]] == Slot.MEMORY).all() and ends[0] > slot + 1:
            found.append((int(slot), int(ends[0]), CONFIG.end_ids.index(int(tokens[ends[0]]))))
    return found


@functools.partial(jax.jit, static_argnames="spec")
def plain_states(spec: Spec, base: Any, batch: Any, embedded: Any, positions: Any, valid: Any) -> Any:
    """One causal forward over [prompt | slots] as embeddings: states after the final norm [B, T + N, D].

    DeepStack acts on the prompt's own positions, as it must; nothing of caches, tails or branches is used.
    """
    from jaxmem.backbones import decoder, qwen3_vl
    from jaxmem.backbones.ports import Port, Ports

    prompt = model.read_prompt(Spec(spec.backbone), base, {}, batch)
    extra = embedded.shape[1]
    pad = lambda leaf, value: jnp.pad(leaf, ((0, 0), (0, extra)), constant_values=value)  # noqa: E731
    document = jnp.max(prompt.stream.segments, axis=1)[:, None]
    segments = jnp.concatenate([prompt.stream.segments, jnp.where(valid, document, 0)], axis=1)
    order = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    stream = decoder.Stream(order, segments, pad(prompt.stream.is_visual, False), prompt.stream.blind)
    x = jnp.concatenate([prompt.x, embedded], axis=1)
    both = jnp.concatenate([jnp.asarray(batch.positions), jnp.broadcast_to(positions[:, None], (len(x), 3, extra))], 2)
    tall = []
    for port in prompt.own.after_layer:
        act = (
            lambda slot, residual, normed, port=port: jnp.concatenate(  # noqa: E731
                [port.act(slot, residual[:, :-extra], None), residual[:, -extra:]], axis=1
            )
        )
        tall.append(Port(port.slots, act, port.layers))
    out, _ = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        x,
        qwen3_vl.rotary_angles(spec.backbone, both),
        decoder.among(stream, stream),
        ports=Ports(after_layer=tuple(tall)),
    )
    return model.final_norm(spec, base, out)
