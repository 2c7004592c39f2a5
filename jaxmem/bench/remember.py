"""`jaxmem bench vr`: what Vision Remember costs.

Operations are those of the compiled layers (the compiler's count) at the size of LLaVA-VR-2B, for a picture of five
tiles with 144 tokens each and 64 words, against the decoder's layers by its formula. Seconds are those of a random
LLaVA-NeXT of about 100 M parameters in float32: prompts that are read with and without it, in its direct and its
absorbed form, and tokens generated behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.backbones import llava
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig
from jaxmem.backbones.llava_config import TileVision
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.published import PUBLISHED
from jaxmem.backbones.vit import ViTConfig
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.data.assembly import Written, join_tiles
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.tiles import Tiled, TileProcessor
from jaxmem.memory import vision_remember
from jaxmem.memory.resampling import CrossAttention, LayerSettings, SelfAttention
from jaxmem.memory.vision_remember import VisionRememberConfig
from jaxmem.model import Spec, init_memory, read
from jaxmem.sampling import generate
from jaxmem.sampling.logits import SamplerConfig

TILES, WORDS = 5, 64
_read = jax.jit(read, static_argnames="spec")


def run(config: BackboneConfig | None = None, rows: int = 2, new: int = 64, runs: int = 5) -> list[Comparison]:
    """Measures all.

    Args:
      config: the backbone whose seconds are taken; 12 layers of width 768 by default.
      rows: prompts per batch.
      new: tokens per prompt.
      runs: rounds.
    """
    config = config or small()
    return [*operations(), *seconds(config, rows, new, runs)]


def small(layers: int = 12, width: int = 768, mlp: int = 2304, heads: int = 12, vocab: int = 16_384) -> BackboneConfig:
    """A LLaVA-NeXT with a small CLIP of 24x24 patches a tile, averaged to 12x12 tokens."""
    half = width // heads // 2
    text = TextConfig(
        layers, width, mlp, heads, heads // 3 or 1, 2 * half, vocab, rope_section=(half, 0, 0), rope_interleaved=False,
        qk_norm=False, qkv_bias=True,
    )  # fmt: skip
    tower = ViTConfig(
        width=256, depth=6, heads=4, mlp_width=1024, act="quick_gelu", norm_eps=1e-5, image_size=336, patch_size=14
    )
    points = ((336, 672), (672, 336), (672, 672))
    vision = TileVision(tower, ProjectorConfig("avgpool", 256, width, 24, ratio=2), (-2,), False, "anyres", points)
    return BackboneConfig("llava_next", text, vision, image_token=vocab - 1)


def operations(name: str = "LLaVA-VR-2B") -> list[Comparison]:
    """Operations added to the decoder's layers while a prompt is read: three blocks of v1, and of v2's attention."""
    backbone = PUBLISHED[name]
    decoder, tokens = decoder_flops(backbone), TILES * backbone.vision.projector.tokens
    found = []
    for impl, most in (("direct", 0.06), ("absorbed", 0.021)):
        config = vision_remember.create(backbone, impl=impl)
        added = len(config.layers) * cross_flops(config.layer, tokens)
        title = f"{name}, cross-attention, {impl}"
        found.append(_share(title, added, decoder, most))
    both = vision_remember.create(backbone, preset="vr_v2")
    added = len(both.layers) * self_flops(both.layer, tokens)
    return [*found, _share(f"{name}, attention of tokens (v2)", added, decoder, 0.02)]


def _share(title: str, added: float, whole: float, most: float) -> Comparison:
    """Added operations against those of the decoder."""
    ours, peer = added / 1e12, whole / 1e12
    goal = f"share of operations added <= {most:g}"
    return Comparison(title, "TFLOP", ours, peer, added / whole, goal, {"ours": [ours], "peer": [peer]})


def decoder_flops(backbone: BackboneConfig) -> float:
    """The layers of the decoder over the bench's prompt, without head and tower; a causal row has half the pairs."""
    t, tokens = backbone.text, TILES * backbone.vision.projector.tokens + WORDS
    layer = t.width * t.head_dim * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.mlp_width
    return t.layers * (2.0 * tokens * layer + 4.0 * t.heads * t.head_dim * tokens**2 / 2)


def cross_flops(settings: LayerSettings, tokens: int) -> float:
    """The compiler's count for one cross-attention of so many tokens."""
    x = jax.ShapeDtypeStruct((1, tokens, settings.width), jnp.float32)
    windows = jax.ShapeDtypeStruct((1, tokens, settings.keys, settings.features), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, tokens, settings.keys), jnp.bool_)
    return _counted(CrossAttention(settings), x, windows, mask)


def self_flops(settings: LayerSettings, tokens: int) -> float:
    """The compiler's count for one attention among so many tokens and a question."""
    x, text = (jax.ShapeDtypeStruct((1, n, settings.width), jnp.float32) for n in (tokens, 1))
    return _counted(SelfAttention(settings), x, text, jax.ShapeDtypeStruct((1, tokens), jnp.int32))


def _counted(module: nn.Module, *inputs: Any) -> float:
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    analysis: Any = jax.jit(module.apply).lower(params, *inputs).compile().cost_analysis()
    return float(analysis["flops"])


def prompts(config: BackboneConfig, rows: int, words: int = WORDS, seed: int = 0) -> Batch:
    """Random prompts of one picture of five tiles and some words."""
    vision: TileVision = config.vision
    tiles = TileProcessor(
        tile=vision.tower.image_size, patch_size=vision.tower.patch_size, pinpoints=vision.pinpoints,
        mean=(0.5,) * 3, std=(0.5,) * 3, cells=vision.projector.grid,
    )  # fmt: skip
    layout, rng = tiles.layout((672, 672)), np.random.default_rng(seed)
    count = TILES * vision.tile_patches
    question = np.arange(words + 1) > 8
    examples = []
    for _ in range(rows):
        patches = rng.normal(size=(count, vision.patch_dim)).astype(np.float32)
        picture = Tiled(patches, np.ones(count, bool), layout, TILES, TILES * vision.projector.tokens)
        tokens = np.concatenate([[config.image_token], rng.integers(0, config.text.vocab - 8, words)])
        prompt = Written(tokens.astype(np.int32), np.zeros(words + 1, np.float32), question)
        examples.append(join_tiles(prompt, (0,), (picture,), vision.patch_dim, vision.tile_patches))
    return collate(examples, Buckets((len(examples[0]),), (count,)))


def seconds(config: BackboneConfig, rows: int, new: int, runs: int) -> list[Comparison]:
    """Prompts read per second, and tokens generated behind them."""
    base = jax.jit(lambda key: llava.init(key, config))(jax.random.key(0, impl="rbg"))
    batch, off = prompts(config, rows), Spec(config)
    inner = config.text.width * 2 // 3
    options = {"inner": inner - inner % 16, "gate": 0.5}
    direct = vision_remember.create(config, **options)
    memory = init_memory(jax.random.key(1), Spec(config, (direct,)))
    on, moved = (Spec(config, (dataclasses.replace(direct, impl=impl),)) for impl in ("direct", "absorbed"))
    both = _with(config, vision_remember.create(config, preset="vr_v2", **options))

    def reading(spec: Spec, memory: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(_read(spec, base, memory, batch).last)

    sides = {"off": reading(off, {}), "direct": reading(on, memory), "absorbed": reading(moved, memory)}
    np.testing.assert_allclose(sides["direct"](), sides["absorbed"](), rtol=0, atol=1e-3)
    taken = alternate(sides | {"v2": reading(*both)}, runs)
    rates = {side: [rows / s for s in values] for side, values in taken.items()}
    found = [_added(f"prompts read, {side} against none", rates, side) for side in ("direct", "absorbed", "v2")]
    return [*found, _form(rates), _decoding(on, off, base, memory, batch, new, runs)]


def _with(config: BackboneConfig, memory: VisionRememberConfig) -> tuple[Spec, Any]:
    spec = Spec(config, (memory,))
    return spec, init_memory(jax.random.key(2), spec)


def _added(title: str, rates: dict[str, list[float]], side: str) -> Comparison:
    """The share of time that one side adds to reading."""
    ours, peer = median(rates[side]), median(rates["off"])
    runs = {"ours": rates[side], "peer": rates["off"]}
    return Comparison(title, "prompts/s", ours, peer, peer / ours - 1, "share of time added", runs)


def _form(rates: dict[str, list[float]]) -> Comparison:
    """The absorbed form against the direct one, everything else included."""
    ours, peer = median(rates["absorbed"]), median(rates["direct"])
    runs = {"ours": rates["absorbed"], "peer": rates["direct"]}
    return Comparison("prompts read, absorbed against direct", "prompts/s", ours, peer, ours / peer, "ratio", runs)


def _decoding(on: Spec, off: Spec, base: Any, memory: Any, batch: Batch, new: int, runs: int) -> Comparison:
    """Tokens behind prompts that are read already."""
    settings = SamplerConfig(max_new_tokens=new)
    rows, width = batch.tokens.shape
    keys = jax.random.split(jax.random.key(0), (rows, 1))

    def writing(spec: Spec, memory: Any) -> Callable[[], Any]:
        state = generate.start(spec, settings, width + new, base, memory, batch, keys)
        fresh = lambda: jax.tree.map(jnp.copy, state)  # noqa: E731
        return lambda: jax.block_until_ready(
            generate.proceed(spec, settings, base, memory, fresh(), jnp.int32(new)).tokens
        )

    taken = alternate({"ours": writing(on, memory), "peer": writing(off, {})}, runs)
    rates = {side: [rows * new / s for s in values] for side, values in taken.items()}
    ours, peer = median(rates["ours"]), median(rates["peer"])
    return Comparison("tokens generated, on against off", "tokens/s", ours, peer, peer / ours - 1,
                      "share of time added <= 0.01", rates)  # fmt: skip
