"""Chunked cross-entropy against float64 numpy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.training import losses

ROWS, LENGTH, WIDTH, VOCAB = 3, 13, 8, 29


@pytest.fixture(scope="module")
def case():
    draw = np.random.default_rng(0)
    weights = draw.choice([0.0, 0.5, 1.0, 2.0], (ROWS, LENGTH)).astype(np.float32)
    weights[1] = 0
    return (
        draw.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        draw.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        weights,
    )


def full(hidden, unembedding, tokens, weights):
    """float64 and all logits at once, one position at a time."""
    nll = total = 0.0
    correct = count = 0
    for row in range(ROWS):
        for at in range(1, LENGTH):
            if weights[row, at] > 0:
                logits = hidden[row, at - 1].astype(np.float64) @ unembedding.T.astype(np.float64)
                high = logits.max()
                nll += weights[row, at] * (high + np.log(np.exp(logits - high).sum()) - logits[tokens[row, at]])
                total += weights[row, at]
                correct += int(logits.argmax() == tokens[row, at])
                count += 1
    return nll, total, correct, count


@pytest.mark.parametrize("chunk", [1, 7, 12, 10_000])
def test_sums_equal_the_full_float64_computation(case, chunk):
    ours = losses.cross_entropy(*case, chunk=chunk)
    want = full(*case)
    np.testing.assert_allclose(ours[:2], want[:2], rtol=1e-6)
    assert tuple(map(int, ours[2:])) == want[2:]


def test_loss_and_gradients_equal_torch(case):
    hidden, unembedding, tokens, weights = case
    ours, grads = jax.value_and_grad(
        lambda h, u: losses.cross_entropy(h, u, tokens, weights, chunk=9).nll, argnums=(0, 1)
    )(hidden, unembedding)
    h, u = (torch.tensor(x, requires_grad=True) for x in (hidden, unembedding))
    each = torch.nn.functional.cross_entropy(
        (h[:, :-1] @ u.T).reshape(-1, VOCAB), torch.tensor(tokens[:, 1:]).reshape(-1).long(), reduction="none"
    )
    loss = (each * torch.tensor(weights[:, 1:]).reshape(-1)).sum()
    loss.backward()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], h.grad, atol=1e-5)
    np.testing.assert_allclose(grads[1], u.grad, atol=1e-5)


def test_logits_never_exist_at_once():
    rows, length, width, vocab, chunk = 2, 64, 4, 512, 16
    shape = jax.ShapeDtypeStruct

    def loss(hidden, unembedding, tokens, weights):
        return losses.cross_entropy(hidden, unembedding, tokens, weights, chunk=chunk).nll

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        shape((rows, length, width), jnp.bfloat16),
        shape((vocab, width), jnp.bfloat16),
        shape((rows, length), jnp.int32),
        shape((rows, length), jnp.float32),
    )
    largest = max(int(np.prod(size, dtype=np.int64)) for size in _shapes(jaxpr.jaxpr))
    assert largest <= chunk * vocab


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars if hasattr(var.aval, "shape"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_garbage_at_unsupervised_positions_does_not_matter(case):
    hidden, unembedding, tokens, weights = case
    state = np.array(hidden)
    unused = np.concatenate([weights[:, 1:] == 0, np.ones((ROWS, 1), bool)], axis=1)
    state[unused] = 1e4
    clean = losses.cross_entropy(hidden, unembedding, tokens, weights, chunk=9)
    dirty = losses.cross_entropy(state, unembedding, tokens, weights, chunk=9)
    assert float(clean.nll) == pytest.approx(float(dirty.nll), rel=1e-6)
    gradient = jax.grad(lambda h: losses.cross_entropy(h, unembedding, tokens, weights, chunk=9).nll)(state)
    assert not np.asarray(gradient)[unused].any()


def test_wrong_shapes_are_named(case):
    hidden, unembedding, tokens, weights = case
    with pytest.raises(ValueError, match=r"tokens \(3, 12\)"):
        losses.cross_entropy(hidden, unembedding, tokens[:, :-1], weights)
