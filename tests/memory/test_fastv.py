"""FastV on a LLaVA-NeXT, against torch layers that really drop the tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxmem import model as functions  # noqa: E402
from jaxmem.backbones.batch import text_batch  # noqa: E402
from jaxmem.errors import ConfigError  # noqa: E402
from jaxmem.memory import fastv  # noqa: E402
from jaxmem.memory.fastv import FastVConfig  # noqa: E402
from jaxmem.model import Spec  # noqa: E402
from jaxmem.sampling import cache  # noqa: E402
from tests.memory import baseline_world as b  # noqa: E402

KEPT = 5
ANSWER = np.random.default_rng(3).integers(0, 400, (3, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> b.World:
    return b.make_world(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(world: b.World) -> Any:
    return world.model.attach("fastv", layer=2, keep=KEPT)


def trees(model: Any) -> tuple[Any, Any, Any]:
    return model.spec, model.base, model.memory


@functools.partial(jax.jit, static_argnames="spec")
def lost(spec: Spec, base: Any, memory: Any, batch: Any) -> Any:
    """[B, T] bool, what is dropped of the prompts."""
    return functions.read_prompt(spec, base, memory, batch).states["fastv"]


def published(world: b.World, row: int, keep: int, layer: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Places that stay, and their logits: from `layer` on the dropped tokens are no longer there (torch, eager)."""
    inner, x = world.theirs.model.language_model, b.embedded(world, row)
    places = torch.arange(x.shape[1])
    images = torch.tensor(np.asarray(world.batch.visual_rows[row, : x.shape[1]]) >= 0)
    before, weights = inner.config._attn_implementation, []
    inner.config._attn_implementation = "eager"
    hook = inner.layers[layer - 1].self_attn.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    try:
        with torch.no_grad():
            for at, block in enumerate(inner.layers):
                if at == layer:
                    scores = torch.where(images, weights[0][0].mean(0)[-1], -1.0)
                    chosen = torch.topk(scores, min(keep, int(images.sum()))).indices
                    stays = ~images
                    stays[chosen] = True
                    x, places = x[:, stays], places[stays]
                mask = torch.full((len(places),) * 2, float("-inf")).triu(1)[None, None]
                turned = inner.rotary_emb(x, places[None])
                out = block(x, attention_mask=mask, position_ids=places[None], position_embeddings=turned)
                x = out[0] if isinstance(out, tuple) else out
            return places.numpy(), world.theirs.lm_head(inner.norm(x))[0].numpy()
    finally:
        hook.remove()
        inner.config._attn_implementation = before


def test_check_26_it_equals_the_model_from_which_the_tokens_are_gone(world: b.World, model: Any) -> None:
    found, gone = np.asarray(model.logits(world.batch)), np.asarray(lost(*trees(model), world.batch))
    for row, n in enumerate(world.lengths()):
        places, wanted = published(world, row, KEPT)
        assert np.flatnonzero(~gone[row, :n]).tolist() == places.tolist()
        np.testing.assert_allclose(found[row, places], wanted, atol=1e-4, rtol=0)
        if row < 2:
            assert np.abs(found[row, n - 1] - world.logits[row, n - 1]).max() > 0.01
        else:
            np.testing.assert_allclose(found[row, :n], world.logits[row, :n], atol=1e-6, rtol=0)


def test_check_26_exactly_r_image_tokens_stay(world: b.World, model: Any) -> None:
    images = np.asarray(world.batch.visual_rows) >= 0
    gone = np.asarray(lost(*trees(model), world.batch))
    assert not (gone & ~images).any()
    assert (images & ~gone).sum(1).tolist() == [KEPT, KEPT, 0]
    half = world.model.attach("fastv", keep=0.5)
    gone = np.asarray(lost(*trees(half), world.batch))
    assert (images & ~gone).sum(1).tolist() == [n // 2 for n in images.sum(1)]


@pytest.mark.parametrize("keep", [1.0, 1000])
def test_check_26_with_all_tokens_kept_it_is_the_backbone(world: b.World, keep: Any) -> None:
    model, real = world.model.attach("fastv", keep=keep), np.asarray(world.batch.segments) > 0
    np.testing.assert_allclose(np.asarray(model.logits(world.batch))[real], world.logits[real], atol=1e-6, rtol=0)
    if keep == 1.0:
        options = {"max_new_tokens": 8, "buckets": b.BUCKETS}
        assert model.generate(b.CHATS, **options) == world.model.generate(b.CHATS, **options)


def test_check_19_prefill_and_decoding_equal_the_whole_forward(world: b.World, model: Any) -> None:
    whole_batch = b.answered(world.batch, ANSWER)
    gone = np.asarray(lost(*trees(model), world.batch))
    np.testing.assert_array_equal(np.asarray(lost(*trees(model), whole_batch)), gone)  # answers decide nothing
    wanted = b.behind(world, np.asarray(b.forward(*trees(model), whole_batch)), ANSWER.shape[1])
    found = np.asarray(b.stepped(*trees(model), world.batch, ANSWER))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    plain = np.asarray(b.stepped(world.model.spec, model.base, {}, world.batch, ANSWER))
    assert np.abs(found - plain)[:2].max(axis=(1, 2)).min() > 0.01


def test_continuations_of_a_prompt_see_what_it_kept(world: b.World, model: Any) -> None:
    group = np.stack([ANSWER, ANSWER[::-1]], axis=1)
    lengths = np.full(group.shape[:2], group.shape[2], np.int32)
    run = jax.jit(functions.continuation_states, static_argnames="spec")
    found = np.asarray(run(*trees(model), world.batch, group, lengths))
    for member in range(2):
        whole = np.asarray(b.forward(*trees(model), b.answered(world.batch, group[:, member])))
        wanted = b.behind(world, whole, group.shape[2])[:, :-1]
        np.testing.assert_allclose(found[:, member], wanted, atol=1e-4, rtol=0)


def test_generated_tokens_are_those_of_the_pruned_model(world: b.World, model: Any) -> None:
    answers = model.generate(b.CHATS, max_new_tokens=4, buckets=b.BUCKETS, stop_tokens=())
    tokens = np.array([answer.tokens for answer in answers], np.int32)
    whole = b.forward(*trees(model), b.answered(world.batch, tokens))
    states = b.behind(world, np.asarray(whole), 3)
    scores = np.array(functions.logits(model.spec, model.base, jnp.asarray(states)))
    scores[..., list(model.spec.backbone.media_tokens)] = -np.inf
    assert scores.argmax(-1).tolist() == tokens.tolist()


def test_a_later_turn_of_text_sees_what_the_first_kept(world: b.World, model: Any) -> None:
    @functools.partial(jax.jit, static_argnames="spec")
    def extended(spec: Spec, base: Any, memory: Any, batch: Any, turn: Any) -> Any:
        _, state = cache.prefill(spec, base, memory, batch, batch.tokens.shape[1] + turn.tokens.shape[1])
        return cache.extend(spec, base, memory, state, turn)[0]

    turn = text_batch(ANSWER, patch_dim=world.model.spec.backbone.patch_dim)
    whole = np.asarray(b.forward(*trees(model), b.answered(world.batch, ANSWER)))
    found = np.asarray(extended(*trees(model), world.batch, turn))
    np.testing.assert_allclose(found, b.behind(world, whole, ANSWER.shape[1])[:, -1], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="a later turn cannot bring images"):
        extended(*trees(model), world.batch, world.batch)


def test_left_padding_changes_nothing(world: b.World, model: Any) -> None:
    left = model.batch(b.CHATS, buckets=b.BUCKETS, padding="left")
    found, wanted = np.asarray(model.logits(left)), np.asarray(model.logits(world.batch))
    kept = ~np.asarray(lost(*trees(model), world.batch))
    for row, n in enumerate(world.lengths()):
        here = np.flatnonzero(kept[row, :n])
        np.testing.assert_allclose(found[row, -n:][here], wanted[row, here], atol=1e-4, rtol=0)


def test_the_answer_that_a_row_ends_with_does_not_decide() -> None:
    batch = text_batch(np.zeros((5, 8), np.int32), np.array([8, 8, 7, 8, 8]))
    taught = np.zeros((5, 8), np.float32)
    taught[1, 5:8] = 1  # ends with an answer
    taught[2, 4:6] = 1  # and a line break behind it
    taught[3, 2:4] = 1  # an earlier answer, then a prompt
    taught[4, 2:4], taught[4, 6:] = 1, 1  # two answers
    found = fastv.asking(dataclasses.replace(batch, loss_mask=taught))
    assert np.asarray(found).tolist() == [7, 4, 3, 7, 5]


@pytest.mark.parametrize("keep", [1, 3, 0.5, 0.34, 1.0, 40])
def test_the_highest_scores_stay_and_the_first_of_equals(keep: Any) -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 5, (6, 20)).astype(np.float32)
    images = rng.random((6, 20)) < np.linspace(0, 1, 6)[:, None]
    found = np.asarray(fastv.least(FastVConfig(keep=keep), scores, images))
    for row in range(6):
        places = np.flatnonzero(images[row])
        count = keep if isinstance(keep, int) else int(keep * len(places))
        best = sorted(places, key=lambda at, row=row: (-scores[row, at], at))[:count]
        assert np.flatnonzero(images[row] & ~found[row]).tolist() == sorted(best)
        assert not (found[row] & ~images[row]).any()


def test_attention_is_the_mean_over_heads_of_softmaxes() -> None:
    rng = np.random.default_rng(5)
    query, key = rng.standard_normal((2, 6, 8)), rng.standard_normal((2, 9, 3, 8))
    sees = rng.random((2, 9)) < 0.7
    found = np.asarray(fastv.received(query.astype(np.float32), key.astype(np.float32), sees))
    wanted = np.zeros((2, 9))
    for row, head in np.ndindex(2, 6):
        scores = np.where(sees[row], key[row, :, head // 2] @ query[row, head] / 8**0.5, -np.inf)
        weights = np.exp(scores - scores.max())
        wanted[row] += weights / weights.sum() / 6
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)


def test_it_says_what_it_cannot_do(world: b.World) -> None:
    config = world.model.spec.backbone
    for settings, message in (
        ({"layer": 0}, r"layer 0 must be within 1..4"),
        ({"layer": 5}, r"layer 5 must be within 1..4"),
        ({"keep": 0}, "keep 0 must be a share above 0"),
        ({"keep": 1.5}, "keep 1.5 must be a share above 0"),
        ({"ratio": 0.5}, "no setting ratio; it has keep, layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            fastv.create(config, **settings)
    with pytest.raises(ConfigError, match="decoder alone"):
        fastv.create(dataclasses.replace(config, vision=None))
    assert fastv.create(config) == FastVConfig(layer=2, keep=0.5)


def test_it_cannot_stand_beside_vismem(world: b.World) -> None:
    other = dataclasses.make_dataclass("Other", [("name", str)], frozen=True)("vismem")
    with pytest.raises(ConfigError, match="fastv and vismem cannot be attached together"):
        Spec(world.model.spec.backbone, (FastVConfig(), other))  # pyrefly: ignore
