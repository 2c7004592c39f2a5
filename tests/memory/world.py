"""The tiny random model of these tests, its prompts, and one jitted form of every function that they call.

All prompts are padded to the same shapes, so that the whole folder compiles each function once per architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import model
from jaxmem.backbones import decoder, qwen3_vl
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.positions import mrope_positions, patch_tables
from jaxmem.memory import pvm
from jaxmem.model import Spec
from jaxmem.sampling import cache

IMAGE, VIDEO, START, END, VOCAB = 60, 61, 62, 63, 64
TOKENS, PATCHES, SLOTS = 27, 36, 64  # T and P of every batch, slots of every cache
BACKBONE = BackboneConfig(
    model_type="qwen3_vl",
    text=TextConfig(
        layers=5, width=48, mlp_width=80, heads=8, kv_heads=4, head_dim=8, vocab=VOCAB, rope_section=(2, 1, 1)
    ),
    vision=VisionConfig(
        depth=3, width=32, mlp_width=40, heads=2, out_width=48, taps=(0, 2), patch_size=4, table_side=5
    ),
    image_token=IMAGE,
    video_token=VIDEO,
    vision_start_token=START,
    vision_end_token=END,
)
CAUSAL = pvm.create(BACKBONE, layers=(1, 3, 4), latent=32)
ALL = dataclasses.replace(CAUSAL, visibility="all")
BARE, WITH_CAUSAL, WITH_ALL = Spec(BACKBONE), Spec(BACKBONE, (CAUSAL,)), Spec(BACKBONE, (ALL,))
GATES = (0.3, -0.2, 0.25)
ROWS = (  # numbers are text tokens, pairs are images of (rows, columns) visual tokens
    (3, (2, 3), 4, (1, 2), 5),
    ((3, 1), 6),
    (10,),
    (2, (1, 1), 3),
)


def random_like(shapes: Any, seed: int) -> Any:
    """Kernels that keep the size of their input, norm scales around 1, biases around 0: nothing is trivial."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "scale":
            return 1 + 0.3 * noise
        return noise / leaf.shape[-2] ** 0.5 if kind == "kernel" else (0.1 if kind == "bias" else 1.0) * noise

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def random_memory(config: pvm.PVMConfig, seed: int, gates: Sequence[float] = GATES) -> Any:
    """Random parameters of one PVM with open gates."""
    params = random_like(jax.eval_shape(lambda: pvm.init(jax.random.key(0), config)), seed)
    return {**params, "gate_alpha": jnp.asarray(gates, jnp.float32)}


def with_gates(params: Any, gates: Any) -> Any:
    """The same parameters with other gates."""
    return {**params, "gate_alpha": jnp.broadcast_to(jnp.asarray(gates, jnp.float32), params["gate_alpha"].shape)}


def _laid_out(tokens: np.ndarray, images: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Positions, loss mask and visual rows that follow from the tokens and the images' sizes."""
    places = np.flatnonzero((tokens == IMAGE) | (tokens == VIDEO))
    visual_rows = np.full(len(tokens), -1, np.int32)
    visual_rows[places] = np.arange(len(places))
    first = itertools.accumulate((rows * columns for rows, columns in images), initial=0)
    blocks = [(int(places[at]), (1, 2 * h, 2 * w)) for at, (h, w) in zip(first, images, strict=False)]
    return {
        "positions": mrope_positions(len(tokens), blocks, 2),
        "loss_mask": ((visual_rows < 0) & (np.arange(len(tokens)) > 0)).astype(np.float32),
        "visual_rows": visual_rows,
    }


def example(parts: Sequence[Any], seed: int) -> Example:
    """A row of random text and images; every second image is marked as a video frame."""
    rng, tokens, images = np.random.default_rng(seed), [], []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(0, IMAGE, part).tolist()
        else:
            tokens += [START, *[(IMAGE, VIDEO)[len(images) % 2]] * (part[0] * part[1]), END]
            images.append(part)
    ids = np.array(tokens, np.int32)
    tables = patch_tables([(1, 2 * h, 2 * w) for h, w in images], BACKBONE.vision.table_side, 2)
    return Example(
        tokens=ids,
        **_laid_out(ids, images),
        patches=rng.standard_normal((len(tables.segments), BACKBONE.vision.patch_dim)).astype(np.float32),
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
        images=tuple(images),
    )


def join(one: Example, two: Example) -> Example:
    """One row as if both turns had been encoded together; positions are laid out afresh."""
    both = lambda name: np.concatenate([getattr(one, name), getattr(two, name)])  # noqa: E731
    tokens, images = both("tokens"), one.images + two.images
    later = two.patch_segments + one.patch_segments.max(initial=0)
    return Example(
        tokens=tokens,
        **_laid_out(tokens, images),
        **{name: both(name) for name in ("patches", "patch_coords", "patch_table", "patch_weights")},
        patch_segments=np.concatenate([one.patch_segments, later]),
        images=images,
    )


def batch_of(rows: Sequence[Example], padding: str = "right", tokens: int = TOKENS, patches: int = PATCHES) -> Batch:
    """A padded batch on the device."""
    return jax.tree.map(jnp.asarray, collate(rows, Buckets((tokens,), (patches,)), padding=padding))


def rows_of(seed: int) -> list[Example]:
    """Four rows: two images, image first, text alone, one visual token."""
    return [example(parts, 10 * seed + i) for i, parts in enumerate(ROWS)]


TAIL = 8
"""Tokens that a cache has room for behind its prompts."""

exact = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
"""For programs whose bits are compared with another program's: not optimised at all, equal sums may differ in them."""
hidden = exact(model.hidden_states, static_argnames="spec")


def prefill_and_fork(spec: Spec, base: Any, memory: Any, batch: Any, size: int) -> Any:
    """States of the last tokens [B, D], and a cache that is ready to decode one continuation per prompt."""
    states, kept = cache.prefill(spec, base, memory, batch, size)
    return states, cache.fork(kept, 1, TAIL)


prefill = exact(prefill_and_fork, static_argnames=("spec", "size"))
quick_hidden = jax.jit(model.hidden_states, static_argnames="spec")
quick_prefill = jax.jit(prefill_and_fork, static_argnames=("spec", "size"))
extend = jax.jit(cache.extend, static_argnames="spec")
read_prompt = jax.jit(model.read_prompt, static_argnames="spec")


@functools.partial(jax.jit, static_argnames="spec")
def logits(spec: Spec, base: Any, states: Any) -> Any:
    """float32 [..., V]."""
    return model.logits(spec, base, states)


def decode_step(spec: Spec, base: Any, memory: Any, kept: Any, tokens: Any, active: Any) -> Any:
    """One token per row through the cache."""
    layers = decoder.unstack(base["layers"], spec.backbone.text.layers)
    angle_of = functools.partial(qwen3_vl.rotary_angles, spec.backbone)
    tokens, active = tokens[:, None], active[:, None]
    place = jnp.broadcast_to(kept.tail.index, tokens.shape)
    states, kept = cache.step(spec, base, layers, memory, kept, tokens, active, place, angle_of)
    return states[:, 0], kept


decode = exact(decode_step, static_argnames="spec")
quick_decode = jax.jit(decode_step, static_argnames="spec")


@dataclasses.dataclass(frozen=True)
class Functions:
    """The forward, and the two stages of cached decoding, compiled alike."""

    hidden: Any = hidden
    prefill: Any = prefill
    decode: Any = decode


QUICKLY = Functions(quick_hidden, quick_prefill, quick_decode)
DEFAULT = Functions()


def through(config: pvm.PVMConfig, params: Any, state: Any, stream: Any, x: Any, normed: Any = None, key: Any = None):
    """What each layer's branch adds to the stream, [slots, B, T, D], through the port that the decoder calls."""
    (port,) = pvm.ports(config, params, state, stream, key).beside_ffn
    return jax.vmap(lambda slot: port.act(slot, x, normed))(port.slots)


def injected(config: pvm.PVMConfig, params: Any, visual: Any, rows: Any, stream: Any, x: Any, normed: Any, key: Any):
    """The branch from visual rows to injection, and the state it remembers."""
    state = pvm.prepare(config, params, visual, rows, stream)
    return through(config, params, state, stream, x, normed, key), state


inject = jax.jit(injected, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def weights(config: pvm.PVMConfig, params: Any, state: Any, stream: Any, x: Any):
    """Attention over the visual set, [slots, B, K, N/K, T, M], and what is visible, [B, T, M]."""
    seen = pvm.visible(config, state, stream)

    def look(module: pvm.PVM, keys: Any) -> Any:
        return module.cross_attn.weights(module.query(x), keys, seen)

    apply = lambda slot, keys: pvm.PVM(config).apply({"params": slot}, keys, method=look)  # noqa: E731
    return jax.vmap(apply)(params, state.keys), seen


@dataclasses.dataclass(frozen=True)
class Branch:
    """Random arguments of the branch alone, for the prompts of a batch."""

    batch: Batch
    params: Any
    visual: Any
    x: Any
    normed: Any

    @property
    def stream(self) -> Any:
        """Of the batch."""
        return decoder.stream_of(self.batch)

    def inject(self, config: pvm.PVMConfig, params: Any = None, key: Any = None, **changed: Any) -> Any:
        """[slots, B, T, D]; `changed` replaces visual, x or normed."""
        return self.inject_and_state(config, params, key, **changed)[0]

    def inject_and_state(self, config: pvm.PVMConfig, params: Any = None, key: Any = None, **changed: Any) -> Any:
        """The injection and the PVMState."""
        values = {"visual": self.visual, "x": self.x, "normed": self.normed} | changed
        params = self.params if params is None else params
        return inject(
            config, params, values["visual"], self.batch.visual_rows, self.stream, values["x"], values["normed"], key
        )

    @property
    def text(self) -> np.ndarray:
        """[B, T] bool: valid text."""
        return np.asarray((self.batch.segments > 0) & ~self.batch.is_visual)
