"""A LLaVA-style model with Vision Remember on meshes of eight devices: it learns and samples what one device does."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxmem.backbones import llava
from jaxmem.backbones.config import BackboneConfig, TextConfig
from jaxmem.backbones.llava_config import TileVision
from jaxmem.backbones.projectors import ProjectorConfig
from jaxmem.backbones.vit import ViTConfig
from jaxmem.data.assembly import Written, join_tiles
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.tiles import Tiled, TileProcessor
from jaxmem.distributed import mesh as meshes
from jaxmem.memory import vision_remember
from jaxmem.model import Spec
from jaxmem.training import trees
from tests.distributed import world as w
from tests.memory import world as random

TILE, PATCH, WIDTH, VOCAB = 32, 8, 64, 128
POINTS = ((32, 64), (64, 32), (64, 64))
TEXT = TextConfig(4, WIDTH, 96, 4, 2, 16, VOCAB, rope_section=(8, 0, 0), rope_interleaved=False, qkv_bias=True,
                  qk_norm=False)  # fmt: skip
TOWER = ViTConfig(width=32, depth=4, heads=4, mlp_width=64, act="quick_gelu", norm_eps=1e-5, image_size=TILE,
                  patch_size=PATCH)  # fmt: skip
VISION = TileVision(TOWER, ProjectorConfig("avgpool", 32, WIDTH, 4, ratio=2), (-2,), False, "anyres", POINTS)
BACKBONE = BackboneConfig("llava_next", TEXT, VISION, image_token=VOCAB - 1)
CONFIG = vision_remember.create(BACKBONE, preset="vr_v2", layers=(0, 2), inner=32, heads=4, gate=0.5)
SPEC = Spec(BACKBONE, (CONFIG,))
NEW, ONE = 12, "one device"
MESHES = {
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 4 x sequence 2": {"fsdp": 4, "sequence": 2},
}
SIZES = ((64, 64), (90, 20), (18, 70), None)


def row(rng, size, words):
    """A random row with one picture of `size` pixels, or none."""
    tiles = TileProcessor(tile=TILE, patch_size=PATCH, pinpoints=POINTS, mean=(0.5,) * 3, std=(0.5,) * 3, cells=2)
    tokens = rng.integers(10, VOCAB - 2, words).astype(np.int32)
    mask = (np.arange(words) >= words - 5).astype(np.float32)
    question = (np.arange(words) > 4) & (mask == 0)
    pictures = ()
    if size is not None:
        tokens[2] = VOCAB - 1
        layout = tiles.layout(size)
        count = (1 + layout.tiles[0] * layout.tiles[1]) * VISION.tile_patches
        patches = rng.normal(size=(count, VISION.patch_dim)).astype(np.float32)
        pictures = (Tiled(patches, rng.random(count) > 0.1, layout, count // 16, count // 4),)
    prompt = Written(tokens, mask, question)
    return join_tiles(prompt, (2,) if pictures else (), pictures, VISION.patch_dim, VISION.tile_patches)


@functools.cache
def batch():
    """Four rows: pictures of several shapes, and one without."""
    rng = np.random.default_rng(0)
    rows = [row(rng, size, 16 + 2 * place) for place, size in enumerate(SIZES)]
    return collate(rows, Buckets((64,), (80,)), 1)


@functools.cache
def whole():
    base = random.random_like(llava.shapes(BACKBONE), 3)
    memory = random.random_like(jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), CONFIG)), 4)
    return jax.device_get({"base": base, "memory": {"vision_remember": memory}})


def mesh_of(name):
    return None if name == ONE else meshes.make_mesh(**MESHES[name])


@functools.cache
def learnt(name):
    return w.learn(SPEC, whole(), batch(), "**", mesh_of(name))


@functools.cache
def sampled(name):
    return w.draw(SPEC, whole(), batch(), NEW, mesh_of(name))


@pytest.mark.parametrize("name", MESHES)
def test_training_equals_one_device(name):
    w.assert_learnt_alike(learnt(name), learnt(ONE), 2e-5)


@pytest.mark.parametrize("name", MESHES)
def test_sampling_equals_one_device(name):
    w.assert_drawn_alike(sampled(name), sampled(ONE))


def test_weights_are_cut_to_pieces():
    """At the size of LLaVA-VR-2B no leaf above a megabyte is whole on every device."""
    from jaxmem.backbones.published import PUBLISHED

    backbone, mesh = PUBLISHED["LLaVA-VR-2B"], mesh_of("fsdp 4 x sequence 2")
    memory = vision_remember.create(backbone, preset="vr_v2")
    shapes = {
        "base": llava.shapes(backbone),
        "memory": {"vision_remember": jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), memory))},
    }
    places = dict(trees.leaves(meshes.shardings(mesh, shapes)))
    large = {path: leaf.shape for path, leaf in trees.leaves(shapes) if 4 * leaf.size > 1e6}
    assert len(large) > 20
    whole_ones = [path for path in large if not any(axis for axis in places[path].spec)]
    assert not whole_ones
