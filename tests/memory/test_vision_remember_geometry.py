"""Acceptance checks 2 to 6 of Vision Remember: which patches a token sees, found by derivatives of the port."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmem.backbones import cells
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.vision import Cells
from jaxmem.data.assembly import Written, join_tiles
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.tiles import TileProcessor
from jaxmem.memory.resampling import CrossAttention, LayerSettings, WholeTiles
from jaxmem.memory.vision_remember import VisionRememberConfig
from tests.memory import oracle as plain
from tests.memory import vision_oracle as oracle
from tests.memory import vision_world as v
from tests.memory import world as w

torch = pytest.importorskip("torch")

TEXT = 3  # tokens in front of and behind the images
WIDTH, TOWER = 8, 5


def config_of(side: int, ratio: int, **settings: Any) -> VisionRememberConfig:
    """One block behind tiles of a size of our own."""
    sizes = {"width": WIDTH, "tower_width": TOWER, "inner": 6, "heads": 2, "tile_patches": side**2}
    return VisionRememberConfig(layers=(0,), levels=(1, 2), cells=Cells(side, ratio, first=1), **(sizes | settings))


@functools.partial(jax.jit, static_argnums=(0, 5))
def slopes(config: VisionRememberConfig, params: Any, batch: Batch, levels: Any, x: Any, per_tile: int) -> Any:
    """[B, T, B, P] sizes of the derivatives of the block's output by the tower's features."""
    found = v.slopes(lambda levels: v.act(config, params, batch, levels, x, per_tile=per_tile).sum(-1), levels)
    return sum(jnp.abs(slope).sum(-1) for slope in found.values()).reshape(*x.shape[:2], *batch.patch_segments.shape)


def seen(config: VisionRememberConfig, batch: Batch, per_tile: int) -> np.ndarray:
    """[B, T, B, P] bool: which patches' features each token's state depends on, behind the block."""
    x, levels = v.stream_like(batch, WIDTH), v.features(config, batch)
    return np.asarray(slopes(config, v.params_of(config), batch, levels, x, per_tile)) > 0


def tiles_of(config: VisionRememberConfig, tiles: int, inside: np.ndarray | None = None) -> Batch:
    """Two rows: text, every visual row of some tiles with a newline behind each, text; and text alone."""
    per_tile, patches = cells.per_side(config.cells.side, config.cells.ratio) ** 2, tiles * config.tile_patches
    rows = np.arange(1, 1 + tiles * per_tile).reshape(tiles, per_tile)
    index = np.concatenate([[-1] * TEXT, np.pad(rows, ((0, 0), (0, 1))).ravel(), [-1] * TEXT]).astype(np.int32)
    index = np.stack([index, np.full_like(index, -1)])
    segments = np.stack([np.arange(patches) // config.tile_patches + 1, np.zeros(patches)]).astype(np.int32)
    segments = segments if inside is None else np.where(inside, segments, 0)
    plain = lambda *shape: np.zeros((2, *shape), np.int32)  # noqa: E731
    return Batch(
        tokens=plain(index.shape[1]), positions=plain(3, index.shape[1]), segments=np.ones_like(index),
        loss_mask=np.zeros(index.shape, np.float32), visual_rows=index, blind=np.zeros(2, bool),
        patches=np.zeros((2, patches, 3), np.float32), patch_segments=segments, patch_coords=plain(patches, 2),
        patch_table=plain(patches, 4), patch_weights=np.zeros((2, patches, 4), np.float32),
    )  # fmt: skip


def covered(config: VisionRememberConfig, row: int) -> set[int]:
    """Patches that visual row `row` (newline not counted) may see, by the rule of the paper's regions."""
    side, ratio, reach = config.cells.side, config.cells.ratio, config.margin
    count = -(-side // ratio)
    tile, (i, j) = row // count**2, divmod(row % count**2, count)
    lines = [n for n in range(i * ratio - reach, (i + 1) * ratio + reach) if 0 <= n < side]
    columns = [n for n in range(j * ratio - reach, (j + 1) * ratio + reach) if 0 <= n < side]
    return {tile * side**2 + line * side + column for line, column in itertools.product(lines, columns)}


@pytest.mark.parametrize("impl", ["direct", "absorbed"])
@pytest.mark.parametrize(("side", "ratio", "halo"), [(6, 2, None), (6, 3, None), (5, 2, None), (5, 3, 1), (4, 1, None)])
def test_check_02_a_token_sees_its_own_cell_and_nothing_else(side, ratio, halo, impl):
    config = config_of(side, ratio, halo=halo, impl=impl)
    batch, per_tile = tiles_of(config, 3), cells.per_side(side, ratio) ** 2
    found = seen(config, batch, per_tile)
    assert not found[1].any() and not found[0, :, 1].any()
    for token, row in enumerate(batch.visual_rows[0]):
        known = covered(config, row - 1) if row > 0 else set()
        assert set(np.flatnonzero(found[0, token, 0])) == known, token
    keys = found[0, :, 0].sum(1)[batch.visual_rows[0] > 0].reshape(3, -1)
    if ratio == 1:  # check 5: with 3x3 patches
        assert sorted(np.unique(keys)) == [4, 6, 9] and (keys == 4).sum() == 12
    elif halo is None:
        assert np.all(keys.sum(1) == side**2)  # every patch is seen once


def test_bars_are_not_seen_and_a_window_of_bars_alone_sees_all_of_its_patches():
    config = config_of(5, 2)
    inside = np.ones((2, 2, 5, 5), bool)
    inside[:, 1, :, 3:] = False  # cells (., 1) keep one column of two, cells (., 2) nothing
    batch = tiles_of(config, 2, inside.reshape(2, -1))
    found = seen(config, batch, 9)[0, :, 0]
    for token, row in enumerate(batch.visual_rows[0]):
        if row > 0:
            known = covered(config, row - 1)
            shown = {patch for patch in known if inside[0].ravel()[patch]}
            assert set(np.flatnonzero(found[token])) == (shown or known)
    assert {len(covered(config, 9 + cell)) for cell in (2, 5, 8)} == {1, 2}
    params, levels, x = v.params_of(config), v.features(config, batch), v.stream_like(batch, WIDTH)
    out = jax.jit(v.act, static_argnums=(0, 5, 6))(config, params, batch, levels, x, 0, 9)
    row = jax.tree.map(lambda leaf: np.asarray(leaf)[0], batch)
    p, given = plain.float64(params), [plain.float64(levels[level])[0] for level in config.levels]
    known = oracle.remembered(config, p, plain.slot(p["blocks"], 0), plain.float64(x)[0], given, row, 9)
    np.testing.assert_allclose(out[0], known, rtol=0, atol=2e-5)  # nor do places over the border have a share


@functools.partial(jax.jit, static_argnums=0)
def local(settings: LayerSettings, params: Any, x: Any, windows: Any, mask: Any) -> Any:
    return CrossAttention(settings).apply({"params": params}, x, windows, mask)


def settings_of(side: int, ratio: int, **settings: Any) -> tuple[LayerSettings, Any, Any, Any, Any]:
    """Settings, random parameters and a tile: x [1, N', D], features [1, side^2, C], its windows and their mask."""
    rng, count = np.random.default_rng(side + ratio), cells.per_side(side, ratio) ** 2
    made = LayerSettings(**({"width": WIDTH, "features": TOWER, "inner": 6, "heads": 2} | settings), keys=ratio**2)
    x = jnp.asarray(rng.standard_normal((1, count, made.width)), jnp.float32)
    features = jnp.asarray(rng.standard_normal((1, side**2, made.features)), jnp.float32)
    packed, mask = cells.pack(features, side, ratio)
    shapes = jax.eval_shape(lambda: CrossAttention(made).init(jax.random.key(0), x, packed, mask[None]))["params"]
    return made, w.random_like(shapes, 1), x, features, (packed, mask[None])


@pytest.mark.parametrize(("side", "ratio"), [(12, 2), (12, 3), (12, 4), (27, 2)])
def test_check_03_local_is_global_attention_behind_a_block_mask(side, ratio):
    settings, params, x, features, (packed, mask) = settings_of(side, ratio, positions="none")
    found = local(settings, params, x, packed, mask)
    config = config_of(side, ratio, halo=0)
    block = np.zeros((1, x.shape[1], side**2), bool)
    for row in range(x.shape[1]):
        block[0, row, sorted(covered(config, row))] = True
    assert block.sum() == side**2 == mask.sum()
    whole = WholeTiles(settings).apply({"params": params}, x, features, block)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["direct", "absorbed"])
@pytest.mark.parametrize(("side", "ratio"), [(8, 2), (7, 2), (7, 3)])
def test_check_04_without_queries_it_is_average_pooling(side, ratio, impl):
    sizes = {"width": TOWER, "features": TOWER, "inner": TOWER, "heads": 1, "impl": impl}
    settings, params, x, features, (packed, mask) = settings_of(side, ratio, **sizes)
    eye = {"kernel": jnp.eye(TOWER)}
    params |= {"q": jax.tree.map(jnp.zeros_like, params["q"]), "v": eye, "o": eye | {"bias": jnp.zeros(TOWER)}}
    params |= {"position": jnp.zeros_like(params["position"])}
    found = np.asarray(local(settings, params, x, packed, mask))
    own = {name: torch.tensor(np.asarray(leaf)) for name, leaf in params["norm_key"].items()}
    tile = torch.nn.functional.layer_norm(torch.tensor(np.asarray(features)), (TOWER,), own["scale"], own["bias"], 1e-6)
    tile = tile.reshape(1, side, side, TOWER).movedim(-1, 1)
    pooled = torch.nn.functional.avg_pool2d(tile, ratio, ceil_mode=True, count_include_pad=False)
    np.testing.assert_allclose(found, pooled.movedim(1, -1).reshape(1, -1, TOWER), rtol=0, atol=1e-6)


PATCH, TILE, CELL = 7, 56, 2  # pixels per patch and per tile, patches per side of a token's cell
PICTURES = {  # (width, height), (rows, columns) of tiles, (rows, columns) of tokens of the fine grid that are kept
    "2x2": ((112, 70), (2, 2), (6, 8)),
    "2x2_tall": ((84, 112), (2, 2), (8, 6)),
    "1x3": ((168, 28), (1, 3), (2, 12)),
    "1x3_half": ((168, 42), (1, 3), (4, 12)),
    "3x1": ((28, 168), (3, 1), (12, 2)),
    "3x1_half": ((42, 168), (3, 1), (12, 4)),
}


def numbered(size: tuple[int, int]) -> Image.Image:
    """A picture whose patches are each of one colour that says where they lie: red 3 + 9 row, green 3 + 9 column."""
    columns, rows = size[0] // PATCH, size[1] // PATCH
    place = np.stack(np.broadcast_arrays(np.arange(rows)[:, None], np.arange(columns), 0), -1)
    return Image.fromarray((3 + 9 * place).astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1))


def numbers(patches: np.ndarray) -> np.ndarray:
    """[P, 2] the (row, column) that patches say, or -1 where they show the canvas."""
    values = np.rint(patches.reshape(len(patches), 3, -1) * 255)
    assert np.all(values == values[:, :, :1])  # nothing was resized
    return np.where(values[:, :2, 0] > 0, (values[:, :2, 0] - 3) // 9, -1).astype(int)


def laid_out(name: str) -> Any:
    """A prompt with the picture, as the host makes it: the thumbnail is a tile of its own."""
    (size, tiles, _), point = PICTURES[name], lambda tiles: (tiles[0] * TILE, tiles[1] * TILE)
    points = tuple(point(tiles) for tiles in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)))
    processor = TileProcessor(
        tile=TILE, patch_size=PATCH, pinpoints=points, mean=(0, 0, 0), std=(1, 1, 1), cells=TILE // PATCH // CELL
    )
    (picture,) = processor.images([numbered(size)])
    assert picture.layout.tiles == tiles
    prompt = Written(np.zeros(2 * TEXT + 1, np.int32), np.zeros(2 * TEXT + 1, np.float32))
    return join_tiles(prompt, [TEXT], [picture], 3 * PATCH**2, processor.unit)


@pytest.mark.parametrize("name", PICTURES)
def test_check_06_tokens_and_windows_stay_aligned(name):
    """Of every token that is left behind the stitching, the unpadding and the newlines, by what its patches show."""
    size, tiles, kept = PICTURES[name]
    config, row = config_of(TILE // PATCH, CELL), laid_out(name)
    tokens, patches = len(row) + 5, len(row.patches) + row.unit
    batch = collate([row], Buckets((tokens,), (patches,)), padding="left")
    found = seen(config, batch, 16)[0, :, 0]
    token = iter(range(5 + TEXT, tokens))
    for cell in range(16):  # the thumbnail: the first tile's own cells
        assert set(np.flatnonzero(found[next(token)])) == covered(config, cell)
    shown = numbers(row.patches[row.unit :])
    margins = [(TILE * count - side) // 2 // PATCH for count, side in zip(tiles, size[::-1], strict=True)]
    cut = [(count * TILE // PATCH // CELL - left) // 2 for count, left in zip(tiles, kept, strict=True)]
    for i in range(kept[0]):
        for j in range(kept[1]):
            known = set()
            for y, x in itertools.product(range(CELL), repeat=2):
                line, column = CELL * (i + cut[0]) + y - margins[0], CELL * (j + cut[1]) + x - margins[1]
                if 0 <= line < size[1] // PATCH and 0 <= column < size[0] // PATCH:
                    known.add((line, column))
            own = np.flatnonzero(found[next(token)]) - row.unit
            assert known and {tuple(shown[patch]) for patch in own} == known and len(own) == len(known)
        assert not found[next(token)].any()  # the newline
    assert len(list(token)) == TEXT and not found[-TEXT:].any() and not found[: 5 + TEXT].any()


def test_check_06_windows_follow_the_rows_that_tokens_stand_for():
    """The comparison notices tokens that are one visual row off."""
    config, row = config_of(TILE // PATCH, CELL), laid_out("2x2")
    vision = row.visual_rows > 0
    moved = dataclasses.replace(row, visual_rows=np.where(vision, row.visual_rows % 80 + 1, row.visual_rows))
    batch = collate([moved], Buckets((len(row),), (len(row.patches),)))
    found = seen(config, batch, 16)[0, :, 0]
    for token in np.flatnonzero(vision):
        inside = {patch for patch in covered(config, row.visual_rows[token] % 80) if row.patch_segments[patch]}
        assert set(np.flatnonzero(found[token])) == (inside or covered(config, row.visual_rows[token] % 80))
