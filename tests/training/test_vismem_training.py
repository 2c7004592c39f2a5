"""VisMem's stages as updates: who gets a gradient, replay of rollouts, masks (checks 29, 30, 37, 38, 42)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.sampling import splicing
from jaxmem.sampling.slots import Slot
from jaxmem.training import descent, grpo, trees
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.policy import LossConfig
from tests.memory import vismem_world as v

GROUP, TEMPERATURE = 3, 0.8
FORMERS = ("memory/vismem", "!memory/vismem/rows")
ROWS = ("memory/vismem/rows/embed", "memory/vismem/rows/unembed/invoke")
BASE, MEMORY = v.base_of(), v.memory_of(eagerness=1.5)
TREE = {"base": BASE, "memory": MEMORY}
FRESH = {"base": BASE, "memory": {"vismem": {**MEMORY["vismem"]}}}
for _kind in ("short", "long"):  # adapters as they start: no change
    FRESH["memory"]["vismem"][_kind] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, MEMORY["vismem"][_kind]
    )


@functools.cache
def rolled(mode: str, fresh: bool = False) -> Any:
    """A recorded rollout: memories where the policy calls ("free"), or at random places."""
    invoke = v.FREE if mode == "free" else v.RANDOM
    keys, memory = jax.random.split(jax.random.key(5), 4), (FRESH if fresh else TREE)["memory"]
    settings = v.sampler(invoke=invoke, temperature=TEMPERATURE)
    return v.rolled(v.last_state(v.SPEC, BASE, memory, v.kept_rows(), settings, keys, GROUP))


def samples(mode: str, fresh: bool = False, reference: bool = False) -> grpo.Samples:
    """What the trainer makes of it, with made-up advantages."""
    found = rolled(mode, fresh)
    most = v.FREE.max_invocations
    spliced = splicing.locate(v.CONFIG, found.tokens, found.kinds, found.permits, most)
    mask = np.isin(found.kinds, (Slot.TEXT, Slot.INVOKE)).astype(np.float32)
    advantages = np.random.default_rng(2).standard_normal(found.lengths.shape).astype(np.float32)
    return grpo.Samples(
        v.kept_rows(), found.tokens, found.lengths, mask, found.logprobs, advantages,
        found.logprobs if reference else None, spliced, found.memories,
    )  # fmt: skip


def split(tree: Any, patterns: Any) -> tuple[Any, Any]:
    return trees.split(tree, patterns)


@functools.cache
def scorer(patterns: Any) -> Any:
    trainable, _ = split(TREE, patterns)
    return jax.jit(grpo.make_score(grpo.model_forward(v.SPEC, trainable, remat=False), TEMPERATURE, chunk=64))


@pytest.mark.parametrize("mode", ["free", "random"])
@pytest.mark.parametrize("patterns", [FORMERS, ROWS], ids=["memory", "invocation"])
def test_check_37_replay_equals_rollout(mode, patterns):
    """Whether memories are formed again (Stage I) or taken as recorded (Stage II)."""
    found, given = rolled(mode), samples(mode)
    assert (found.kinds == Slot.MEMORY).any(axis=-1).sum() >= 5
    logprobs, _ = scorer(patterns)(*split(TREE, patterns), given)
    np.testing.assert_allclose(np.asarray(logprobs) * given.mask, found.logprobs * given.mask, atol=1e-4)
    ratio = np.exp((np.asarray(logprobs) - found.logprobs) * given.mask)
    np.testing.assert_allclose(ratio, 1.0, atol=1e-4)


def test_check_38_what_counts_in_the_loss():
    """Stage I: text with its stop token; Stage II: sampled invocations, too; never memories, ends or forced tokens."""
    for mode in ("random", "free"):
        found, mask = rolled(mode), samples(mode).mask
        for row, member in np.ndindex(found.lengths.shape):
            kinds = found.kinds[row, member]
            memories = v.memories_in(found, row, member)
            slots = sum(end - start for start, end, _ in memories)  # vectors and end tokens
            forced = len(memories) if mode == "random" else 0
            assert mask[row, member].sum() == found.lengths[row, member] - slots - forced
            assert not (kinds == Slot.INVOKE).any() or mode == "free"
            assert not (kinds == Slot.FORCED).any() or mode == "random"
        assert (found.logprobs[(found.kinds != Slot.TEXT) & (found.kinds != Slot.INVOKE)] == 0).all()


def update(tree: Any, given: grpo.Samples, patterns: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """(trainable before, state after one update)."""
    trainable, frozen = split(tree, patterns)
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, clip_norm=0.0, **settings)
    score = grpo.make_score(grpo.model_forward(v.SPEC, trainable, remat=False), TEMPERATURE, chunk=64)
    step = grpo.make_update(score, LossConfig(kind="grpo", kl_weight=0.0), config, 10, trainable, v.NEW, donate=False)
    state = descent.init_state(config, trainable, 0)
    after, _, about, _ = step(state, frozen, jax.tree.map(lambda leaf: np.asarray(leaf)[None], given))
    assert bool(about["updated"])
    return state, after, (step, frozen)


def moved(before: Any, after: Any) -> dict[str, np.ndarray]:
    one, other = dict(trees.leaves(before)), dict(trees.leaves(after))
    return {path: np.asarray(other[path]) - np.asarray(one[path]) for path in one}


def test_check_29_stage_one_trains_all_of_the_formers_and_nothing_else():
    """A is still without a gradient where B is 0, and has one after a step."""
    given = samples("random", fresh=True)
    assert {0, 1} <= set(np.unique(given.spliced.types))
    state, after, (step, frozen) = update(FRESH, given, FORMERS)
    assert set(state.trainable) == {"memory"} and "rows" not in state.trainable["memory"]["vismem"]
    first = moved(state.trainable, after.trainable)
    still = {path for path, change in first.items() if not change.any()}
    a_factors = {path for path in first if path.endswith("lora_a")}
    assert still == a_factors, still ^ a_factors
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], given)
    second, *_ = step(after, frozen, batch)
    assert all(change.any() for change in moved(after.trainable, second.trainable).values())


def test_check_30_stage_two_trains_four_input_rows_and_two_output_rows():
    """Optimizer state exists for them alone; nothing else changes, with weight decay on."""
    given = samples("free")
    state, after, (step, frozen) = update(TREE, given, ROWS, weight_decay=0.1)
    shapes = {path: leaf.shape for path, leaf in trees.leaves(state.trainable)}
    width = v.CONFIG.width
    assert shapes == {
        "memory/vismem/rows/embed/invoke": (2, width),
        "memory/vismem/rows/embed/end": (2, width),
        "memory/vismem/rows/unembed/invoke": (2, width),
    }
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if getattr(leaf, "ndim", 0)]
    assert sorted(leaf.shape for leaf in moments) == sorted([*shapes.values()] * 2)
    assert all((np.abs(change) > 0).any(axis=-1).all() for change in moved(state.trainable, after.trainable).values())
    before = {path: np.asarray(leaf).tobytes() for path, leaf in trees.leaves(frozen)}
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], given)
    for _ in range(9):
        after, *_ = step(after, frozen, batch)
    assert {path: np.asarray(leaf).tobytes() for path, leaf in trees.leaves(frozen)} == before


@pytest.mark.parametrize("through", [False, True])
def test_check_42_gradients_stop_at_hidden_states_unless_asked(through):
    """The path of the images and of the text into a memory: of base weights it is the only way a memory depends on."""
    import dataclasses

    from jaxmem import model
    from jaxmem.model import Spec

    config = dataclasses.replace(v.CONFIG, backprop_hidden=through)
    spec, given = Spec(v.SPEC.backbone, (config,)), samples("random")

    def size(vision: Any, hidden: Any) -> jax.Array:
        base = {**BASE, "visual": vision}
        prompt = model.read(spec, base, MEMORY, v.kept_rows())
        made = splicing.formed(spec, base, MEMORY, prompt, hidden, given.spliced, remat=False)
        return jnp.sum(jnp.sin(made))

    prompt = model.read(spec, BASE, MEMORY, v.kept_rows())
    x = splicing.embeddings(spec, BASE, MEMORY, given.tokens, jnp.asarray(given.memories), given.spliced.place)
    hidden = model.follow(spec, BASE, MEMORY, v.kept_rows(), prompt, x, jnp.asarray(given.lengths))
    vision, states = jax.jit(jax.grad(size, argnums=(0, 1)))(BASE["visual"], hidden)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(vision))
    assert (largest > 0) is through and bool(jnp.any(states)) is through
