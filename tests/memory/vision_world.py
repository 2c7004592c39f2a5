"""Tiny backbones with eyes, chats for them, and a decoder that can be watched layer by layer around Vision Remember."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmem
from jaxmem import model
from jaxmem.backbones import decoder
from jaxmem.backbones.ports import Port, Ports
from jaxmem.backbones.vision import Visual
from jaxmem.checkpoints.assemble import assemble
from jaxmem.data.batching import Buckets, collate
from jaxmem.memory import vision_remember
from jaxmem.model import Spec
from tests.backbones import clip_folder
from tests.backbones.prompts import image, text, user
from tests.helpers import write_qwen2_tokenizer, write_tokenizer
from tests.llava_folder import write_decoder
from tests.memory import world as w
from tests.tiny import write_qwen2_5_vl, write_qwen3_vl

SIDE, RATIO = 4, 2  # patches and tokens per side of LLaVA's tiles of 31 pixels
TILE = SIDE**2
DEPTH, BLOCKS = 4, 6  # decoder layers, vision blocks
BUCKETS = Buckets(tokens=(128, 224), patches=(160, 448))
SMALL: dict[str, Any] = {"layers": (0, 2), "inner": 24, "heads": 3}
PRESETS = ("vr_v1", "vr_v2")
QWEN = ("qwen2_5_vl", "qwen3_vl")
ANSWERS = ("seven dogs and a fox", "no")


def answered(chat: list[Any], answer: str, *later: Any) -> list[Any]:
    """A chat with an answer, and what comes behind it."""
    return [*chat, {"role": "assistant", "content": answer}, *later]


SQUARE, WIDE, TALL = image(70, 58, 1), image(100, 28, 2), image(26, 90, 3)  # tilings 2x2, 1x3 and 3x1
CHATS = {
    "square": user(SQUARE, text("what do they see?")),
    "several": user(text("first"), WIDE, TALL, text("which of them is older?")),
    "text": user(text("seven wizards describe what?")),
    "turns": answered(user(SQUARE, text("how many dogs?")), ANSWERS[0], *user(text("and what colours?"))),
}
CHATS["answered"] = answered(CHATS["turns"], ANSWERS[1])
ROWS = ("square", "several", "text", "answered")


@functools.cache
def llava(name: str = "avgpool", **settings: Any) -> jaxmem.Model:
    """LLaVA-NeXT with CLIP's tower, 4x4 patches a tile, and decoder layers enough for blocks at several depths.

    name, settings: of the projector; the usual one pools 2x2 patches.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)
        write_decoder(parts / "text", num_hidden_layers=DEPTH)
        clip_folder.write("clip", parts / "vision", vision_num_hidden_layers=BLOCKS)
        clip_folder.write_settings("clip", parts / "vision")
        projector = {"name": name, **({"ratio": RATIO} if name == "avgpool" else {}), **settings}
        assemble(parts / "text", parts / "vision", parts / "whole", projector=projector)
        return jaxmem.load(parts / "whole")


@functools.cache
def qwen_pair(family: str) -> tuple[jaxmem.Model, Any]:
    """Qwen2.5-VL, whose tower looks through windows, or Qwen3-VL, whose decoder has DeepStack; and the torch model."""
    write_words, write = {
        "qwen2_5_vl": (write_qwen2_tokenizer, write_qwen2_5_vl),
        "qwen3_vl": (write_tokenizer, write_qwen3_vl),
    }[family]
    with tempfile.TemporaryDirectory() as folder:
        write_words(folder)
        theirs = write(folder, layers=DEPTH, seed=3)
        return jaxmem.load(folder), theirs


def qwen(family: str) -> jaxmem.Model:
    """The first of the pair."""
    return qwen_pair(family)[0]


def config_of(backbone: jaxmem.Model, preset: str = "vr_v1", **settings: Any) -> vision_remember.VisionRememberConfig:
    """A small Vision Remember for a model."""
    return vision_remember.create(backbone.spec.backbone, preset=preset, **(SMALL | settings))


@functools.cache
def params_of(config: vision_remember.VisionRememberConfig, seed: int = 1) -> Any:
    """Random parameters: gates wide open, nothing trivial."""
    params = w.random_like(jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), config)), seed)
    gates = lambda path, leaf: 0.5 + 0.1 * leaf if path[-1].key == "gate" else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(gates, params)


def memory_of(config: vision_remember.VisionRememberConfig, seed: int = 1, gate: float | None = None) -> dict[str, Any]:
    """{"vision_remember": random parameters}, with other gates where `gate` says so."""
    params = params_of(config, seed)
    if gate is not None:
        put = lambda path, leaf: jnp.full_like(leaf, gate) if path[-1].key == "gate" else leaf  # noqa: E731
        params = jax.tree_util.tree_map_with_path(put, params)
    return {config.name: params}


def spec_of(backbone: jaxmem.Model, *configs: Any) -> Spec:
    """The model with some memories."""
    return Spec(backbone.spec.backbone, configs)


def encoded(backbone: jaxmem.Model, chat: list[Any], prompt: bool = False) -> Any:
    """One row that marks its question."""
    return dataclasses.replace(backbone.processor, mark_question=True).encode(chat, prompt)


def batch_of(backbone: jaxmem.Model, names: Any = ROWS, *, padding: str = "right", prompt: bool = False) -> Any:
    """Some of CHATS (or chats) as a batch on the device."""
    chats = [CHATS[name] if isinstance(name, str) else name for name in names]
    rows = [encoded(backbone, chat, prompt) for chat in chats]
    return jax.tree.map(jnp.asarray, collate(rows, BUCKETS, backbone.processor.pad_token, padding))


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Which tokens of a batch are what, [B, T] bool: patches stand for vision-grid rows, not newlines."""

    batch: Any
    first: int

    @property
    def valid(self) -> np.ndarray:
        return np.asarray(self.batch.segments) > 0

    @property
    def vision(self) -> np.ndarray:
        return np.asarray(self.batch.visual_rows) >= self.first

    @property
    def newline(self) -> np.ndarray:
        return np.asarray(self.batch.is_visual) & ~self.vision

    @property
    def text(self) -> np.ndarray:
        return self.valid & ~np.asarray(self.batch.is_visual)

    @property
    def question(self) -> np.ndarray:
        return np.asarray(self.batch.question)

    @property
    def behind(self) -> np.ndarray:
        """Text behind the row's last image."""
        seen = np.asarray(self.batch.is_visual)
        later = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1] == 0
        return self.text & later & seen.any(axis=1, keepdims=True)


def act(
    config: Any, params: Any, batch: Any, levels: Any, x: Any, slot: int = 0, per_tile: int = (SIDE // RATIO) ** 2
) -> Any:
    """What the port of one block makes of a residual stream [B, T, D].

    Args:
      config, params, batch: the block and the prompts.
      levels: {number: [B, P, W]} of the tower.
      x: [B, T, D].
      slot: of the block.
      per_tile: visual rows of a tile, or of a block of patches in the Qwen-VL family.
    """
    units = batch.patches.shape[1] // (config.tile_patches or config.cells.ratio**2)
    rows = jnp.zeros((len(x), config.cells.first + units * (per_tile if config.tile_patches else 1), 1))
    (port,) = vision_remember.prompt_ports(config, params, {}, Visual(rows, rows[None][:0], levels), batch).after_layer
    return port.act(jax.tree.map(lambda leaf: leaf[slot], port.slots), x, None)


def features(config: Any, batch: Any, seed: int = 5) -> dict[int, Any]:
    """Random levels, of different means and sizes."""
    rng = np.random.default_rng(seed)
    shape = (*batch.patches.shape[:2], config.tower_width)
    draw = lambda level: (1 + 0.3 * level) * rng.standard_normal(shape) + 0.5 * level  # noqa: E731
    return {level: jnp.asarray(draw(level), jnp.float32) for level in config.levels}


def stream_like(batch: Any, width: int, seed: int = 6) -> Any:
    """A random residual stream [B, T, D]."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(2 * rng.standard_normal((*batch.tokens.shape, width)) + 0.3, jnp.float32)


def watch(spec: Spec, base: Any, memory: Any, batch: Any, x: Any = None) -> tuple[Any, Any, Any]:
    """The decoder one layer at a time: the stream [L, B, T, D] in front of and behind the ports of each layer, and the
    state behind the final norm. `x` replaces the embeddings."""
    prompt, before, after = model.read_prompt(spec, base, memory, batch), [], []
    layers = tuple(range(spec.backbone.text.layers))

    def tap(seen: list[Any]) -> Port:
        return Port(jnp.zeros(len(layers)), lambda slot, x, _: (seen.append(x), x)[1], layers)

    ports = Ports(after_layer=(tap(before), *prompt.own.after_layer, tap(after)))
    look = decoder.among(prompt.stream, prompt.stream)
    out, _ = decoder.loop_layers(
        spec.backbone.text,
        decoder.unstack(base["layers"], len(layers)),
        prompt.x if x is None else x,
        prompt.angle,
        [look] * len(layers),
        ports=ports,
    )
    return jnp.stack(before), jnp.stack(after), model.final_norm(spec, base, out)


watched = jax.jit(watch, static_argnames="spec")


def embeddings(spec: Spec, base: Any, memory: Any, batch: Any) -> Any:
    """[B, T, D] what enters the first layer."""
    return w.read_prompt(spec, base, memory, batch).x


def slopes(function: Any, x: Any) -> Any:
    """d function(x)[i] / d x, with a leading axis for the flattened outputs."""
    return jax.jacrev(lambda x: function(x).ravel())(x)
