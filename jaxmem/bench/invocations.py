"""`jaxmem bench vismem`: what it costs when a model calls for memories while it generates.

A random Qwen3-VL of about 100 M parameters in float32, 8 prompts with one image each, 128 slots per continuation,
greedy. Prefill and vision tower are included on both sides. Measured are: the batch against a loop in Python over its
rows (`row_by_row`), with invocations forced at the same random places; VisMem that is on but never called, against the
plain backbone; one later invocation of a prompt with and without the former's prefix cache; and how many rows should
form their memories together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import decoder, qwen3_vl
from jaxmem.backbones.batch import Array, Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.bench.models import backbone, prompts
from jaxmem.bench.row_by_row import RowByRow, chances
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.memory import vismem
from jaxmem.model import Spec, init_memory
from jaxmem.sampling import insertion
from jaxmem.sampling.cache import fork, prefill
from jaxmem.sampling.generate import Generated, generate
from jaxmem.sampling.insertion import Turn
from jaxmem.sampling.invoking import InvokeConfig
from jaxmem.sampling.logits import SamplerConfig
from jaxmem.sampling.slots import Slot

ROWS, GRID, TEXT, NEW = 8, (16, 16), 48, 128
PROBABILITY = 1 / 24  # two to four invocations in 128 slots, of which their memories take up to 17 each
GRIDS = ((16, 16), (32, 32), (62, 62))  # 66, 258 and 963 visual states
AT_ONCE = (1, 2, 4, 8)
SPOKEN = 16
"""Text states that the invocation with and without a prefix cache is formed of."""
NEVER = -1e9


def run(
    config: BackboneConfig | None = None,
    rows: int = ROWS,
    new: int = NEW,
    runs: int = 3,
    peer_runs: int = 3,
    probability: float = PROBABILITY,
    grids: Sequence[tuple[int, int]] = GRIDS,
    at_once: Sequence[int] = AT_ONCE,
) -> list[Comparison]:
    """Measures all four.

    Args:
      config: the backbone; 12 layers of width 768 by default, as in `bench decode`.
      rows: prompts per batch.
      new: slots per continuation.
      runs: rounds of all but the first comparison.
      peer_runs: rounds against the loop over rows.
      probability: of a forced invocation behind a token.
      grids: patches of the images for the prefix cache, height and width.
      at_once: numbers of rows that form memories together.
    """
    config = config or backbone(layers=12, width=768, mlp_width=2304, heads=12, kv_heads=4, vocab=16_384)
    model, forced = random_model(config, rows), InvokeConfig(mode="random", anywhere=True, probability=probability)
    return [
        against_rows(model, forced, new, peer_runs),
        idle(model, new, runs),
        *(later(model, grid, runs) for grid in grids),
        *together(model, forced, new, runs, at_once),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A spec with VisMem, its two trees, and the prompts."""

    spec: Spec
    base: Any
    memory: Any
    batch: Batch

    def generate(self, invoke: InvokeConfig, new: int) -> Generated:
        """The greedy continuation."""
        settings = SamplerConfig(max_new_tokens=new, invoke=invoke)
        return generate(self.spec, self.base, self.memory, self.batch, settings, jax.random.key(0))


def random_model(config: BackboneConfig, rows: int) -> Model:
    """Random weights and prompts."""
    base = jax.jit(lambda key: qwen3_vl.init(key, config))(jax.random.key(0, impl="rbg"))  # compiles soonest
    spec = Spec(config, (vismem.create(config),))
    return Model(spec, base, _memory(spec, base), prompts(config, rows, GRID, TEXT))


def _memory(spec: Spec, base: Any) -> Any:
    """VisMem with noise in every leaf: no adapter is without effect."""

    @jax.jit
    def draw(key: Array, base: Any) -> Any:
        leaves, tree = jax.tree.flatten(init_memory(key, spec, base))
        keys = jax.random.split(key, len(leaves))
        noisy = [leaf + 0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return draw(jax.random.key(1, impl="rbg"), base)


def _rates(sides: dict[str, Callable[[], Any]], tokens: int, runs: int) -> dict[str, list[float]]:
    return {side: [tokens / s for s in seconds] for side, seconds in alternate(sides, runs).items()}


def against_rows(model: Model, invoke: InvokeConfig, new: int, runs: int) -> Comparison:
    """The batch against one row at a time; vectors of memories do not count as tokens."""
    spec, rows = model.spec, len(model.batch.tokens)
    assert spec.vismem is not None
    layers = decoder.unstack(model.base["layers"], spec.backbone.text.layers)
    loop = RowByRow(spec, invoke, model.base, model.memory, layers, new)
    dice = chances(spec.vismem, invoke, rows, new, jax.random.key(0))
    found, (tokens, kinds) = model.generate(invoke, new), loop(model.batch, *dice)
    same = float(np.mean((found.tokens == tokens) & (found.kinds == kinds)))
    invoked = np.sum(kinds == Slot.FORCED, axis=1)
    sides = {"ours": lambda: model.generate(invoke, new), "peer": lambda: loop(model.batch, *dice)}
    rates = _rates(sides, int(np.sum(kinds != Slot.MEMORY)), runs)
    ours, peer = median(rates["ours"]), median(rates["peer"])
    label = f"batch {rows}, {invoked.min()} to {invoked.max()} invocations a row (same tokens: {same:.1%})"
    return Comparison(label, "tokens/s", ours, peer, ours / peer, "ours / row by row >= 8", rates)


def idle(model: Model, new: int, runs: int) -> Comparison:
    """VisMem whose invocation tokens may be sampled but never are, against the plain backbone."""
    config = model.spec.backbone
    never = Spec(config, (vismem.create(config, invoke_bias=NEVER),))
    on, off = (dataclasses.replace(model, spec=spec) for spec in (never, Spec(config)))
    sides = {"ours": lambda: on.generate(InvokeConfig(), new), "peer": lambda: off.generate(InvokeConfig(), new)}
    same = float(np.mean(sides["ours"]().tokens == sides["peer"]().tokens))
    rates = _rates(sides, len(model.batch.tokens) * new, runs)
    ours, peer = median(rates["ours"]), median(rates["peer"])
    label = f"VisMem on, never called, against off (same tokens: {same:.1%})"
    return Comparison(label, "tokens/s", ours, peer, peer / ours - 1, "share of time added <= 0.02", rates)


def later(model: Model, grid: tuple[int, int], runs: int) -> Comparison:
    """A later invocation of one prompt, with and without the keys of its visual states."""
    config = model.spec.backbone
    one = dataclasses.replace(model, batch=prompts(config, 1, grid, TEXT))
    sides = {"ours": _invocation(one, prefix_cache=True), "peer": _invocation(one, prefix_cache=False)}
    sides["ours"]()
    apart = float(np.max(np.abs(sides["ours"]() - sides["peer"]())))
    seconds = {side: [1e3 * s for s in found] for side, found in alternate(sides, runs).items()}
    ours, peer = median(seconds["ours"]), median(seconds["peer"])
    states = grid[0] * grid[1] // config.vision.merge_unit + 2
    label = f"later invocation, {states} visual states, prefix cache (off by {apart:.0e})"
    return Comparison(label, "ms", ours, peer, peer / ours, "without / with > 1", seconds)


def _invocation(model: Model, *, prefix_cache: bool) -> Callable[[], np.ndarray]:
    """A function that forms a long memory, splices it in, and returns the state [D] of its end token."""
    spec, batch = model.spec, model.batch
    config, invoke = spec.vismem, InvokeConfig(max_invocations=1, prefix_cache=prefix_cache)
    assert config is not None
    slots = SPOKEN + config.longest + 2
    read = jax.jit(functools.partial(prefill, spec), static_argnames="size")
    hidden, cache = read(model.base, model.memory, batch, size=batch.tokens.shape[1])
    cache = fork(cache, 1, slots, insertion.columns(config, invoke))
    state = insertion.begin(spec, invoke, cache, hidden, 1, slots)
    ring = jnp.asarray(np.random.default_rng(0).normal(size=state.ring.shape), state.ring.dtype)
    state = dataclasses.replace(state, ring=ring)
    cache = dataclasses.replace(cache, states={config.name: None})  # `state` has them, and is donated
    layers = decoder.unstack(model.base["layers"], spec.backbone.text.layers)
    number = lambda value: jnp.full((1, 1), value, jnp.int32)  # noqa: E731

    @functools.partial(jax.jit, donate_argnames="state")
    def once(base: Any, memory: Any, layers: Any, cache: Any, state: Any) -> tuple[Array, Any]:
        state = dataclasses.replace(state, invoked=number(1), since=number(0))
        empty = jnp.zeros((1, 1, slots), jnp.int32)
        turn = Turn(
            pending=jnp.ones((1, 1), bool),
            hidden=state.ring[:, :, SPOKEN - 1],
            layers=cache.tail.layers,
            segments=cache.tail.segments,
            tokens=empty,
            kinds=empty,
            count=number(SPOKEN),
            state=state,
        )
        last = number(config.invoke_ids[vismem.LONG])
        _, turn = insertion.insert(spec, invoke, base, layers, memory, cache, turn, last, jnp.int32(SPOKEN - 1))
        # The end token's state took the place of the invocation's, from which the next call starts again.
        return turn.hidden[0, 0], dataclasses.replace(turn.state, ring=state.ring)

    def work() -> np.ndarray:
        nonlocal state
        end, state = once(model.base, model.memory, layers, cache, state)
        return np.asarray(end)

    return work


def together(model: Model, invoke: InvokeConfig, new: int, runs: int, at_once: Sequence[int]) -> list[Comparison]:
    """`rows_at_once` of several sizes, all in turns, against its default."""
    default = InvokeConfig().rows_at_once
    settings = {size: dataclasses.replace(invoke, rows_at_once=size) for size in sorted({*at_once, default})}
    sides = {str(size): functools.partial(model.generate, one, new) for size, one in settings.items()}
    tokens = int(np.sum(sides[str(default)]().kinds != Slot.MEMORY))
    rates = _rates(sides, tokens, runs)
    peer = rates[str(default)]
    return [
        Comparison(
            f"rows_at_once {size} against {default}",
            "tokens/s",
            median(rates[str(size)]),
            median(peer),
            median(rates[str(size)]) / median(peer),
            "> 1 would be a better default here",
            {"ours": rates[str(size)], "peer": peer},
        )
        for size in at_once
    ]
