"""A tiny random backbone with a VisMem whose adapters, rows and slots are far from trivial, and recorded rollouts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import model
from jaxmem.backbones import decoder, qwen3_vl
from jaxmem.backbones.ports import Port, Ports
from jaxmem.memory import former, vismem
from jaxmem.model import Spec
from jaxmem.sampling import generate
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.rollout import Rollout, rollout
from jaxmem.sampling.slots import Slot
from tests.memory import world as w

KNOWN = 60  # the backbone's other rows belong to no token: V_tok is smaller than the matrix, as published
BACKBONE = dataclasses.replace(
    w.BACKBONE,
    text=dataclasses.replace(w.BACKBONE.text, layers=2),
    vision=dataclasses.replace(w.BACKBONE.vision, depth=1, taps=(0,)),
)
CONFIG = vismem.create(
    BACKBONE,
    vocab=KNOWN,
    queries=3,
    short=2,
    long=4,
    builder_heads=4,
    rank=3,
    text_cap=10,
    builder_length=40,
    long_targets=("q", "k", "o", "up"),
)
SPEC = Spec(BACKBONE, (CONFIG,))
NEW, STOP, PAD, GROUP = 30, 7, 1, 3
FREE = InvokeConfig(max_invocations=3)
RANDOM = InvokeConfig(mode="random", anywhere=True, probability=0.3, max_invocations=3)


def base_of(seed: int = 0) -> Any:
    """Random backbone weights; embeddings and states of like size."""
    return w.random_like(qwen3_vl.shapes(BACKBONE), seed)


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
    """Sampling with the world's tokens; `invoke` is FREE unless given."""
    fixed = {"max_new_tokens": NEW, "temperature": 1.0, "stop_tokens": (STOP,), "pad_token": PAD, "invoke": FREE}
    return SamplerConfig(**{**fixed, **settings})


def play(
    batch: Any,
    invoke: InvokeConfig = FREE,
    *,
    base: Any,
    memory: Any,
    spec: Spec = SPEC,
    keys: Any = None,
    group: int = GROUP,
    **settings: Any,
) -> Rollout:
    """A rollout; keys [B] are those of seed 5 unless given."""
    keys = jax.random.split(jax.random.key(5), len(batch.tokens)) if keys is None else keys
    return rollout(spec, base, memory, batch, sampler(invoke=invoke, **settings), keys, group)


def last_state(spec: Spec, base: Any, memory: Any, batch: Any, settings: SamplerConfig, keys: Any, group: int) -> Any:
    """The state after the whole rollout."""
    *_, state = generate.states(spec, base, memory, batch, settings, keys, group)
    return state


def rolled(state: Any) -> Rollout:
    """A Rollout of a final state."""
    own = state.insertions
    leaves = (state.tokens, state.logprobs, state.kinds, state.count, ~state.done)
    return Rollout(*map(np.asarray, leaves), np.asarray(own.permits), np.asarray(own.memories))


def kept_rows(padding: str = "left", seed: int = 3) -> Any:
    """The world's rows: two images (the second a video's frame), image first, text alone, one visual token."""
    return w.batch_of(w.rows_of(seed), padding=padding)


@dataclasses.dataclass(frozen=True)
class Call:
    """One invocation, read from the record alone.

    Attributes:
      slot: of the invocation token.
      kind: 0 short, 1 long, of the invocation token.
      end: slot of the end token; -1 where none follows.
      formed: type of the end token; -1 likewise.
      first: slot whose state in front is the first that the memory was formed of.
    """

    slot: int
    kind: int
    end: int
    formed: int
    first: int


def calls(rolled: Rollout, row: int, member: int, config: vismem.VisMemConfig = CONFIG) -> list[Call]:
    """Every invocation of a continuation, in order."""
    kinds, tokens = rolled.kinds[row, member], rolled.tokens[row, member]
    found, first = [], 0
    for slot in np.flatnonzero(np.isin(kinds, (Slot.INVOKE, Slot.FORCED))):
        kind = config.invoke_ids.index(int(tokens[slot]))
        end = int(slot) + 1
        while end < len(kinds) and kinds[end] == Slot.MEMORY:
            end += 1
        if end == slot + 1:
            found.append(Call(int(slot), kind, -1, -1, first))
            continue
        found.append(Call(int(slot), kind, end, config.end_ids.index(int(tokens[end])), first))
        first = end + 1
    return found


def memories_in(rolled: Rollout, row: int, member: int) -> list[tuple[int, int, int]]:
    """(slot of the invocation, slot of the end, type) of every memory."""
    return [(call.slot, call.end, call.formed) for call in calls(rolled, row, member) if call.end >= 0]


def embedded_by_hand(config: vismem.VisMemConfig, base: Any, memory: Any, rolled: Rollout) -> np.ndarray:
    """[B, G, N, D] what the policy read in every slot, from the record."""
    rows = memory[config.name]["rows"]["embed"]
    own = np.stack([rows["invoke"][0], rows["end"][0], rows["invoke"][1], rows["end"][1]])
    table = np.concatenate([np.asarray(base["embed"])[: config.vocab], own])
    x = table[rolled.tokens].astype(np.float32)
    for row, member in np.ndindex(*rolled.lengths.shape):
        for nth, call in enumerate(calls(rolled, row, member, config)):
            if call.end >= 0:
                x[row, member, call.slot + 1 : call.end] = rolled.memories[row, member, nth, : call.end - call.slot - 1]
    return x


def states_by_hand(spec: Spec, base: Any, memory: Any, batch: Any, rolled: Rollout, shift: int = 0) -> np.ndarray:
    """[B, G, N, D] the states in front of every slot, each continuation by one full forward over the spliced
    embeddings; `shift` moves the positions of generated slots, which is wrong."""
    config, found = spec.vismem, []
    x = embedded_by_hand(config, base, memory, rolled)
    positions = np.asarray(model.next_position(spec, batch))[:, None] + np.arange(x.shape[2]) + shift
    last = np.asarray(model.last_places(batch))
    for member in range(x.shape[1]):
        valid = np.arange(x.shape[2]) < rolled.lengths[:, member, None]
        states = plain_states(spec, base, batch, x[:, member], positions, valid, memory)
        states, width = np.asarray(states), batch.tokens.shape[1]
        before = states[np.arange(len(states)), last][:, None]
        found.append(np.concatenate([before, states[:, width:-1]], axis=1))
    return np.stack(found, axis=1)


@functools.partial(jax.jit, static_argnames="spec")
def plain_states(
    spec: Spec, base: Any, batch: Any, embedded: Any, positions: Any, valid: Any, memory: Any = None
) -> Any:
    """One causal forward over [prompt | slots] as embeddings: states after the final norm [B, T + N, D].

    DeepStack acts on the prompt's own positions, as it must; nothing of caches, tails or branches is used. Other
    memories of the model act as in any forward.
    """
    bare = Spec(spec.backbone, tuple(config for config in spec.memories if config.name != "vismem"))
    prompt = model.read_prompt(bare, base, memory, batch)
    extra = embedded.shape[1]
    pad = lambda leaf, value: jnp.pad(leaf, ((0, 0), (0, extra)), constant_values=value)  # noqa: E731
    document = jnp.max(prompt.stream.segments, axis=1)[:, None]
    segments = jnp.concatenate([prompt.stream.segments, jnp.where(valid, document, 0)], axis=1)
    order = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    stream = decoder.Stream(order, segments, pad(prompt.stream.is_visual, False), prompt.stream.blind)
    x = jnp.concatenate([prompt.x, embedded], axis=1)
    both = jnp.concatenate([jnp.asarray(batch.positions), jnp.broadcast_to(positions[:, None], (len(x), 3, extra))], 2)
    tall = tuple(Port(port.slots, _on_prompt(port, extra), port.layers) for port in prompt.own.after_layer)
    out, _ = decoder.scan_layers(
        spec.backbone.text,
        base["layers"],
        x,
        qwen3_vl.rotary_angles(spec.backbone, both),
        decoder.among(stream, stream),
        ports=Ports(after_layer=tall) + model.memory_ports(bare, memory, prompt.states, stream),
    )
    return model.final_norm(spec, base, out)


def _on_prompt(port: Port, extra: int) -> Any:
    """What a port does, on all but the last `extra` tokens."""

    def act(slot: Any, residual: Any, normed: Any) -> Any:
        return jnp.concatenate([port.act(slot, residual[:, :-extra], None), residual[:, -extra:]], axis=1)

    return act


form = jax.jit(former.form, static_argnames=("config", "backbone"))
read = jax.jit(model.read, static_argnames="spec")
