"""Acceptance checks 26 to 28 of PVM: dilution of the backbone's attention, and a branch that text cannot dilute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import model
from jaxmem.backbones import decoder
from jaxmem.backbones.layers import attend, rms_normalise
from tests.memory import oracle
from tests.memory import world as w

M, H, LONGEST = 64, 128, 10_000
SWEEP = np.unique(np.geomspace(1, LONGEST, 40).astype(int))


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["unit-weights", "random-weights"])
def heads(request):
    """Scores of 16 normalised queries against 64 visual and 10,000 text keys, and Omega(t) of the library's softmax."""
    rng = np.random.default_rng(1)
    scales = 1 + request.param * rng.standard_normal((2, H))
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    query, keys = (
        oracle.rms(a, 1e-6, scale) for a, scale in zip((draw(16, H), draw(M + LONGEST, H)), scales, strict=True)
    )
    library = rms_normalise(jnp.asarray(draw(4, H), jnp.float32), 1e-6)
    assert np.allclose(np.mean(np.square(library), -1), 1, atol=1e-5)
    is_visual = (np.arange(M + LONGEST) < M).astype(np.float32)
    values = jnp.broadcast_to(jnp.asarray(is_visual)[None, :, None, None], (1, M + LONGEST, 1, H))
    mask = np.arange(M + LONGEST) < M + SWEEP[:, None]  # query t sees the image and t text tokens
    asked = jnp.broadcast_to(jnp.asarray(query, jnp.float32), (len(SWEEP), 16, H))[None]
    keys32 = jnp.asarray(keys, jnp.float32)[None, :, None]
    omega = attend(asked, keys32, values, jnp.asarray(mask)[None])[0].reshape(len(SWEEP), 16, H)[..., 0]
    return scales, query @ keys.T / np.sqrt(H), np.asarray(omega, np.float64)


def test_check_26_dilution_bound_holds_for_every_t(heads):
    scales, scores, omega = heads
    bound = np.sqrt(H) * np.abs(scales).max(1).prod()  # |q.k| / sqrt(h) of normalised heads
    assert np.abs(scores).max() <= bound
    visual = np.exp(scores[:, :M]).sum(1)
    text = np.cumsum(np.exp(scores[:, M:]), axis=1)
    exact = visual[:, None] / (visual[:, None] + text)
    np.testing.assert_allclose(omega.T, exact[:, SWEEP - 1], rtol=1e-4)
    t = np.arange(1, LONGEST + 1)
    mu = np.minimum.accumulate(text / t, axis=1)
    beta = M * np.exp(bound)
    assert np.all(exact <= beta / (beta + mu * t))
    assert np.all(exact <= visual[:, None] / (visual[:, None] + mu * t) * (1 + 1e-12))
    assert np.all(omega.T <= (visual[:, None] / (visual[:, None] + mu * t))[:, SWEEP - 1] * (1 + 1e-4))
    assert beta / (beta + mu.max() * LONGEST) > 0.9  # the worst case is true and says nothing at this length


def test_check_26_mass_falls_as_one_over_t(heads):
    scales, scores, omega = heads
    visual = np.exp(scores[:, :M]).sum(1)
    limit = visual / np.exp(scores[:, M:]).mean(1)
    np.testing.assert_allclose(SWEEP[-1] * omega[-1], limit, rtol=0.05)
    ratio = (1 - omega) / omega  # TVR grows linearly
    slope = np.polyfit(np.log(SWEEP[-10:]), np.log(ratio[-10:].mean(1)), 1)[0]
    assert slope == pytest.approx(1, abs=0.05)
    if np.all(scales == 1):
        at = lambda t: omega[np.abs(SWEEP - t).argmin()].mean() * SWEEP[np.abs(SWEEP - t).argmin()] / t  # noqa: E731
        assert at(1_000) == pytest.approx(0.0602, rel=0.15)
        assert at(10_000) == pytest.approx(0.00609, rel=0.15)


def one_row(config, params, visual, x):
    """The branch for one row whose image stands in front: x [T, D] -> [slots, T, D]."""
    rows = jnp.where(jnp.arange(len(visual) + len(x)) < len(visual), jnp.arange(len(visual) + len(x)), -1)[None]
    ones = jnp.ones_like(rows)
    stream = decoder.Stream(jnp.arange(rows.shape[1])[None], ones, rows >= 0, jnp.zeros(1, bool))
    front = jnp.concatenate([jnp.zeros_like(visual), x])[None]
    out, _ = w.injected(config, params, visual[None], rows, stream, front, None, None)
    return out[:, 0, len(visual) :]


quick_row = jax.jit(one_row, static_argnums=0)


@pytest.mark.parametrize("config", [w.CAUSAL, w.ALL], ids=["causal", "all"])
def test_check_27_no_position_reads_another(world, branch, config):
    """d inj_i / d x_j is exactly zero for i != j, and not zero for i == j."""
    visual, x = branch.visual[0, :6], branch.x[0, :7]
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda x: one_row(config, world.params, visual, x)))(x))  # [s, T, D, T, D]
    assert jacobian.shape == (3, 7, 48, 7, 48)
    for i in range(7):
        for j in range(7):
            block = jacobian[:, i, :, j]
            assert np.abs(block).max() > 1e-3 if i == j else not block.any()


def test_check_27_what_is_found_does_not_depend_on_length(world, branch):
    visual, state = branch.visual[0, :6], branch.x[0, 0]
    found = []
    for t in (1, 10, 1_000, 10_000):
        context = jax.random.normal(jax.random.key(t), (t, 48)).at[-1].set(state)
        found.append(np.asarray(quick_row(w.CAUSAL, world.params, visual, context)[:, -1]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-6)
    norms = np.linalg.norm(found, axis=-1)
    slopes = [np.polyfit((1, 10, 1_000, 10_000), norms[:, s], 1)[0] for s in range(3)]
    np.testing.assert_allclose(slopes, 0, atol=1e-9)


def test_check_28_backbone_dilutes_the_memory_does_not(world):
    """One image and 190 text tokens: the backbone's visual mass falls as 1/t, PVM's stays 1."""
    row = w.example(((2, 3), 190), 9)
    batch = w.batch_of([row], tokens=198, patches=24)
    is_visual = batch.is_visual[0]

    def mass(query, keys, values, mask):
        groups = query.shape[2] // keys.shape[2]
        scores = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(keys, groups, 2)) * query.shape[-1] ** -0.5
        shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
        return (shares * is_visual).sum(-1)[0]

    look = jax.jit(lambda base, memory, batch: model.observed(w.WITH_CAUSAL, base, memory, batch, mass))
    states, omega = look(world.base, world.memory, batch)
    text = np.asarray(omega)[:, :, 8:]  # [L, heads, t]
    assert text.shape == (5, 8, 190) and np.all((text > 0) & (text < 1))
    t = np.arange(1, 191)
    curve = text.mean((0, 1))
    windows = [curve[a:b].mean() for a, b in ((0, 5), (10, 20), (40, 60), (90, 120), (160, 190))]
    assert np.all(np.diff(windows) < 0) and windows[-1] < 0.15 * windows[0]
    tvr = ((1 - text) / text).mean((0, 1))
    assert np.corrcoef(t, tvr)[0, 1] > 0.8

    prompt = w.read_prompt(w.WITH_CAUSAL, world.base, world.memory, batch)
    shares, seen = w.weights(w.CAUSAL, world.params, prompt.states["pvm"], prompt.stream, states)
    assert np.asarray(seen)[0, 8:].all()
    np.testing.assert_allclose(np.asarray(shares).sum(-1)[..., 8:], 1, atol=1e-6)
