"""What VisMem costs: acceptance checks 53 to 55, by counting programs, transfers and the compiler's FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import text_batch
from jaxmem.backbones.published import PUBLISHED
from jaxmem.memory import former, query_builder, vismem
from jaxmem.memory.former import Seen
from jaxmem.model import Spec, init_memory
from jaxmem.sampling import generate, insertion
from jaxmem.sampling.logits import SamplerConfig
from tests.memory import vismem_world as v
from tests.memory import world as w
from tests.sampling.insertion_world import VARIANTS, base, play

PUBLISHED_4B = PUBLISHED["Qwen3-VL-4B-Instruct"]
BACKBONE = dataclasses.replace(  # the widths of 4B; fewer layers make what VisMem adds weigh more
    PUBLISHED_4B,
    text=dataclasses.replace(PUBLISHED_4B.text, layers=2),
    vision=dataclasses.replace(PUBLISHED_4B.vision, depth=1, taps=(0,)),
)
CONFIG = vismem.create(BACKBONE, vocab=151_669)
HOST = re.compile(r"callback|infeed|outfeed|stablehlo\.(send|recv)")


def test_check_53_two_programs_per_shape() -> None:
    """Prompts, paddings, keys and weights that make memories come at other places run what is compiled already."""
    before = (generate.start._cache_size(), generate.proceed._cache_size())
    rolled = [play("free", v.kept_rows(padding, seed)) for padding, seed in (("left", 3), ("right", 4), ("left", 5))]
    eager = v.memory_of(seed=9, eagerness=3.0)
    rolled.append(play("free", keys=jax.random.split(jax.random.key(8), 4), memory=eager))
    found = [sum(len(v.calls(one, row, 0)) for row in range(4)) for one in rolled]
    assert len(set(found)) > 1
    after = (generate.start._cache_size(), generate.proceed._cache_size())
    assert all(now - then <= 1 for now, then in zip(after, before, strict=True))


def test_check_53_nothing_goes_through_the_host_between_tokens() -> None:
    """One call decodes to the end: it needs nothing of the host, and no instruction in it asks for it."""
    settings, batch, keys = v.sampler(), v.kept_rows(), jax.random.split(jax.random.key(5), (4, v.GROUP))
    weights, until = jax.device_put((base(), VARIANTS["free"].memory, batch)), jax.device_put(jnp.int32(v.NEW))
    state = lambda: generate.start(v.SPEC, settings, w.TOKENS + v.NEW, *weights, keys)  # noqa: E731
    generate.proceed(v.SPEC, settings, *weights[:2], state(), until)  # compiled
    fresh = state()
    with jax.transfer_guard("disallow_explicit"):
        after = generate.proceed(v.SPEC, settings, *weights[:2], fresh, until)
    assert not bool(after.live.any()) and int(after.insertions.invoked.max()) > 1
    text = generate.proceed.lower(v.SPEC, settings, *weights[:2], state(), until).as_text()
    assert "stablehlo.while" in text and not HOST.search(text)
    shout = jax.jit(lambda x: jax.pure_callback(np.asarray, x, x)).lower(jnp.ones(3)).as_text()
    assert HOST.search(shout)
    with mock.patch.object(generate, "proceed", mock.Mock(wraps=generate.proceed)) as proceed:
        list(generate.states(v.SPEC, *weights, settings, keys[:, 0], v.GROUP))
    assert proceed.call_count == 1


def flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Of one pass through every loop, before any optimisation."""
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def token_flops(spec: Spec) -> float:
    """A decode step behind a prompt of 1,024 tokens in which no row invokes: the inner loop makes no turn."""
    settings = SamplerConfig(max_new_tokens=512, temperature=1.0)
    weights = qwen3_vl.shapes(BACKBONE, jnp.bfloat16), jax.eval_shape(lambda: init_memory(jax.random.key(0), spec))
    batch = text_batch(jnp.zeros((1, 1024), jnp.int32), patch_dim=BACKBONE.vision.patch_dim)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 1)))
    start = functools.partial(generate.start.__wrapped__, spec, settings, 1024 + 512)
    state = jax.eval_shape(start, *weights, batch, keys)
    nothing = lambda chunk, turn: dataclasses.replace(turn, pending=jnp.zeros_like(turn.pending))  # noqa: E731
    with mock.patch.object(insertion._Chunk, "__call__", nothing):
        return flops(functools.partial(generate.proceed.__wrapped__, spec, settings), *weights, state, jnp.int32(512))


def test_check_54_a_token_costs_no_more_where_nothing_invokes() -> None:
    text = BACKBONE.text
    attended = text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim
    layer = text.width * (attended + text.heads * text.head_dim + 3 * text.mlp_width)
    bare, ours = token_flops(Spec(BACKBONE)), token_flops(Spec(BACKBONE, (CONFIG,)))
    assert 1 < bare / (2 * (text.layers * layer + text.vocab * text.width)) < 1.1  # weights, and some attention
    assert 1 < ours / bare < 1.01


def former_flops(images: int, cached: bool) -> float:
    """Of the decoder in a former's call with `images` visual and 64 text states: one layer, the builder left out."""
    narrow = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)  # noqa: E731
    state = lambda count: Seen(narrow(count, CONFIG.width), jax.ShapeDtypeStruct((1, count), bool))  # noqa: E731
    params = jax.eval_shape(lambda: vismem.init(jax.random.key(0), CONFIG))
    text, kinds = BACKBONE.text, jax.ShapeDtypeStruct((1,), jnp.int32)
    kept = jax.ShapeDtypeStruct((text.layers, 1, images, text.kv_heads, text.head_dim), jnp.bfloat16)

    def form(base: Any, params: Any, visual: Seen, text: Seen, kinds: Any, past: Any) -> Any:
        return former.form(CONFIG, BACKBONE, base, params, visual, text, kinds, past=past)

    def build(params: Any, hidden: Any, valid: Any) -> Any:
        return query_builder.build(CONFIG.builder, params["query_builder"], hidden, valid)

    past, whole = (kept, kept) if cached else None, state(images + 64)
    base = qwen3_vl.shapes(BACKBONE, jnp.bfloat16)
    return flops(form, base, params, state(images), state(64), kinds, past) - flops(
        build, params, whole.rows, whole.valid
    )


def test_check_55_a_former_behind_a_prefix_cache_reads_no_image_again() -> None:
    """More visual states cost it the attention to them; without the cache they cost all that a token costs."""
    few, many = 64, 512
    queries, text = 64 + CONFIG.queries + CONFIG.longest, BACKBONE.text
    attention = 4.0 * queries * (many - few) * text.heads * text.head_dim
    grown, without = (former_flops(many, cached) - former_flops(few, cached) for cached in (True, False))
    assert attention <= grown < 1.5 * attention
    assert without > 20 * grown
    assert grown < 0.1 * former_flops(few, True)
