"""Acceptance checks 29 to 33 of PVM: cached decoding, what is cached, and what it costs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import Batch
from jaxmem.memory import pvm
from jaxmem.model import Spec
from jaxmem.sampling import cache
from tests.memory import oracle
from tests.memory import world as w
from tests.memory.test_pvm_counts import backbone

ANSWER = (7, 33, 58)


def spoken(rows, count):
    """The rows with the first tokens of the answer behind them."""
    if not count:
        return rows
    said = w.example((count,), 0)
    said.tokens[:] = ANSWER[:count]
    return [w.join(row, said) for row in rows]


def lasts(states, batch):
    """[B, D]: each row's last valid token, float64."""
    lengths = w.TOKENS - np.argmax(np.asarray(batch.segments)[:, ::-1] > 0, axis=1)
    return np.asarray(states, np.float64)[np.arange(len(lengths)), lengths - 1]


def cached(spec, base, memory, batch, run=w.DEFAULT):
    """Hidden states of the prompt's last token and of every token of the answer, [1 + N, B, D]; the last cache."""
    states, kept = run.prefill(spec, base, memory, batch, w.SLOTS)
    out, rows = [states], len(batch.tokens)
    for token in ANSWER:
        states, kept = run.decode(spec, base, memory, kept, jnp.full(rows, token), jnp.ones(rows, bool))
        out.append(states)
    return np.asarray(jnp.stack(out), np.float64), kept


def forward(spec, base, memory, rows, padding, run=w.DEFAULT):
    """The same from one full forward per length."""
    batches = [w.batch_of(spoken(rows, count), padding) for count in range(len(ANSWER) + 1)]
    return np.stack([lasts(run.hidden(spec, base, memory, batch), batch) for batch in batches])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("spec", [w.BARE, w.WITH_CAUSAL], ids=["bare", "pvm"])
def test_check_29_cached_decode_is_the_full_forward(world, spec, padding):
    rows = w.rows_of(8)
    memory = world.memory if spec.memories else {}
    ours, _ = cached(spec, world.base, memory, w.batch_of(rows, padding))
    np.testing.assert_allclose(ours, forward(spec, world.base, memory, rows, padding), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_check_29_cached_decode_in_bfloat16(world):
    """With PVM the error of cached decoding is of the size that the backbone's own has."""
    base, errors = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), world.base), []
    for spec, memory in ((w.BARE, {}), (w.WITH_CAUSAL, world.memory)):
        differences = []
        for seed in range(20, 26):
            rows = w.rows_of(seed)
            ours, _ = cached(spec, base, memory, w.batch_of(rows), w.QUICKLY)
            differences.append(ours - forward(spec, base, memory, rows, "right", w.QUICKLY))
        errors.append(np.sqrt(np.mean(np.square(differences))))
    assert 0 < errors[1] <= 1.1 * errors[0]


def test_check_30_what_is_cached_is_what_would_be_recomputed(world):
    batch = w.batch_of(w.rows_of(8))
    _, first = w.prefill(w.WITH_CAUSAL, world.base, world.memory, batch, w.SLOTS)
    _, kept = cached(w.WITH_CAUSAL, world.base, world.memory, batch)
    jax.tree.map(np.testing.assert_array_equal, kept.states, first.states)  # decoding leaves it alone
    prompt = w.read_prompt(w.WITH_CAUSAL, world.base, world.memory, batch)
    x, rows, params = (oracle.float64(prompt.x), np.asarray(batch.visual_rows), oracle.float64(world.params))
    for b in range(4):
        visual = x[b][rows[b] >= 0]
        for s in range(3):
            keys, values = oracle.keys_values(w.CAUSAL, oracle.slot(params, s), visual)
            np.testing.assert_allclose(kept.states["pvm"].keys[s, b, : len(visual)], keys, atol=1e-5)
            np.testing.assert_allclose(kept.states["pvm"].values[s, b, : len(visual)], values, atol=1e-5)


def test_check_30_folded_projection(world, branch):
    folded = pvm.fold(world.params)
    assert folded["cross_attn"]["k"]["kernel"].shape == (3, 48, 16) and "vision_reducer" not in folded
    out, state = branch.inject_and_state(w.CAUSAL)
    ours, short = branch.inject_and_state(w.CAUSAL, folded)
    for name in ("keys", "values"):
        a, b = np.asarray(getattr(short, name)), np.asarray(getattr(state, name))
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    assert np.linalg.norm(ours - out) <= 1e-5 * np.linalg.norm(out)


def test_check_31_rows_decode_alone_as_in_a_batch(world):
    """Rows of 8, 3, 0 and 1 visual tokens."""
    rows = w.rows_of(9)
    together, kept = cached(w.WITH_CAUSAL, world.base, world.memory, w.batch_of(rows))
    assert (np.asarray(kept.states["pvm"].segments) > 0).sum(1).tolist() == [8, 3, 0, 1]
    for i, row in enumerate(rows):
        alone, _ = cached(w.WITH_CAUSAL, world.base, world.memory, w.batch_of([row]), w.QUICKLY)
        np.testing.assert_allclose(together[:, i], alone[:, 0], rtol=0, atol=1e-5)


def test_check_32_sessions_do_not_share_anything(world):
    """Two sessions in turns give what each gives alone, and no input changes."""
    batches = [w.batch_of(w.rows_of(10)), w.batch_of(w.rows_of(11), "left")]
    before = jax.tree.map(np.array, (world.base, world.memory, batches))
    alone = [cached(w.WITH_CAUSAL, world.base, world.memory, batch)[0] for batch in batches]
    runs = [w.prefill(w.WITH_CAUSAL, world.base, world.memory, batch, w.SLOTS) for batch in batches]
    turns, kept = [[states] for states, _ in runs], [state for _, state in runs]
    for token in ANSWER:
        for s in (1, 0):
            arguments = (kept[s], jnp.full(4, token), jnp.ones(4, bool))
            states, later = w.decode(w.WITH_CAUSAL, world.base, world.memory, *arguments)
            again, _ = w.decode(w.WITH_CAUSAL, world.base, world.memory, *arguments)
            np.testing.assert_array_equal(states, again)
            turns[s].append(states)
            kept[s] = later
    for s in (0, 1):
        np.testing.assert_array_equal(np.asarray(jnp.stack(turns[s]), np.float64), alone[s])
    jax.tree.map(np.testing.assert_array_equal, before, (world.base, world.memory, batches))


VISUAL, CONTEXT = 1024, 1280  # visual tokens of the prompt, slots of the cache


def step_shapes(spec):
    """Shapes of everything that one decode step of a bf16 model reads, after a prompt of 1,024 visual tokens."""
    shape = jax.ShapeDtypeStruct
    integer = lambda *dims: shape((1, *dims), jnp.int32)  # noqa: E731
    real = lambda *dims: shape((1, *dims), jnp.float32)  # noqa: E731
    tokens, patches = CONTEXT - 64, 4 * VISUAL
    batch = Batch(
        tokens=integer(tokens), positions=integer(3, tokens), segments=integer(tokens), loss_mask=real(tokens),
        visual_rows=integer(tokens), blind=shape((1,), bool), patches=real(patches, spec.backbone.vision.patch_dim),
        patch_segments=integer(patches), patch_coords=integer(patches, 2), patch_table=integer(patches, 4),
        patch_weights=real(patches, 4),
    )  # fmt: skip
    base = qwen3_vl.shapes(spec.backbone, jnp.bfloat16)
    memory = jax.eval_shape(lambda: model.init_memory(jax.random.key(0), spec))
    prefill = lambda base, memory, batch: cache.prefill(spec, base, memory, batch, CONTEXT - 1)[1]  # noqa: E731
    kept = jax.eval_shape(lambda *trees: cache.fork(prefill(*trees), 1, 1), base, memory, batch)
    return base, memory, kept


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def eight(layers, memories):
    """The 8B size cut to a few decoder layers (and a short tower, which no decode step reads)."""
    full = backbone("8B")
    vision = dataclasses.replace(full.vision, depth=1, taps=(0,))
    cut = dataclasses.replace(full, text=dataclasses.replace(full.text, layers=layers), vision=vision)
    return Spec(cut, tuple(pvm.create(cut, layers=tuple(range(n))) for n in [memories] if n))


def test_check_39_keys_and_values_from_hidden_states(world):
    """The ablation: the branch asks what the decoder made of the image, cached decoding equals the full forward, and
    the rows of the tower alone no longer say what it finds."""
    spec = Spec(w.BACKBONE, (dataclasses.replace(w.CAUSAL, source="hidden"),))
    rows = w.rows_of(3)
    ours, kept = cached(spec, world.base, world.memory, w.batch_of(rows), w.QUICKLY)
    np.testing.assert_allclose(ours, forward(spec, world.base, world.memory, rows, "right", w.QUICKLY), atol=1e-5)
    asked = lambda spec: np.asarray(w.quick_hidden(spec, world.base, world.memory, w.batch_of(rows)))  # noqa: E731
    assert np.abs(asked(spec) - asked(w.WITH_CAUSAL)).max() > 0.05
    state = kept.states["pvm"]
    assert state.keys.shape[:2] == (len(w.CAUSAL.layers), len(rows))


def test_check_33_bytes_per_visual_token():
    _, _, kept = step_shapes(eight(1, 1))
    state = kept.states["pvm"]
    assert state.keys.dtype == state.values.dtype == jnp.bfloat16
    assert 3 * size((state.keys, state.values)) == 1_536 * VISUAL
    assert 36 * size((kept.layers, kept.tail.layers)) == 147_456 * CONTEXT  # the backbone's own, 36 layers


def flops(spec):
    """Of one decode step with logits, counted by XLA; nothing is compiled or allocated."""

    def step(base, memory, kept, tokens, active):
        states, kept = w.decode_step(spec, base, memory, kept, tokens, active)
        return model.logits(spec, base, states), kept

    rows = (jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool))
    return jax.jit(step).lower(*step_shapes(spec), *rows).cost_analysis()["flops"]


def test_check_33_decode_step_costs_half_a_percent_at_most():
    one, two, branch = flops(eight(1, 0)), flops(eight(2, 0)), flops(eight(1, 1))
    whole = one + 35 * (two - one)
    assert whole > 2 * 7.5e9  # two per weight of the decoder and the head
    overhead = 3 * (branch - one) / whole
    assert 0.002 < overhead < 0.005
