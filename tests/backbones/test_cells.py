"""Cells of patches against a loop over pixels: which patches every cell has, round trips, and no gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import cells
from jaxmem.errors import ConfigError, DataError

pack = jax.jit(cells.pack, static_argnums=(1, 2))
unpack = jax.jit(cells.unpack, static_argnums=(1, 2))
halo = jax.jit(cells.halo, static_argnums=(1, 2, 3))


def features(side, lead=(2,), width=3):
    """Every number differs from every other."""
    return np.arange(1, np.prod(lead) * side**2 * width + 1, dtype=np.float32).reshape(*lead, side**2, width)


def brute(x, side, ratio, margin=0):
    """Cells patch by patch: what is there, and whether it is."""
    count, reach = -(-side // ratio), range(-margin, ratio + margin)
    found = np.zeros((*x.shape[:-2], count**2, len(reach) ** 2, x.shape[-1]), x.dtype)
    valid = np.zeros((count**2, len(reach) ** 2), bool)
    for cell in range(count**2):
        places = [(cell // count * ratio + dy, cell % count * ratio + dx) for dy in reach for dx in reach]
        for key, (row, column) in enumerate(places):
            if 0 <= row < side and 0 <= column < side:
                found[..., cell, key, :] = x[..., row * side + column, :]
                valid[cell, key] = True
    return found, valid


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_check_01_packing_and_unpacking_is_the_identity(ratio):
    x = features(24)
    found, mask = pack(x, 24, ratio)
    assert found.shape == (2, (24 // ratio) ** 2, ratio**2, 3) and mask.all()
    np.testing.assert_array_equal(unpack(found, 24, ratio), x)


def test_check_01_27_patches_in_pairs_are_14_cells_and_729_valid_keys():
    x = features(27)
    found, mask = pack(x, 27, 2)
    assert found.shape == (2, 14 * 14, 4, 3) and mask.sum() == 729
    assert sorted(np.unique(mask.sum(1))) == [1, 2, 4] and mask[-1].tolist() == [True, False, False, False]
    np.testing.assert_array_equal(unpack(found, 27, 2), x)
    assert not np.any(np.asarray(found)[:, ~mask])


@pytest.mark.parametrize(("side", "ratio"), [(6, 2), (7, 2), (7, 3), (5, 4), (4, 4), (3, 1)])
@pytest.mark.parametrize("margin", [0, 1, 2])
def test_cells_hold_their_own_patches(side, ratio, margin):
    x = features(side, (2, 3))
    found, mask = halo(x, side, ratio, margin)
    known, valid = brute(x, side, ratio, margin)
    np.testing.assert_array_equal(found, known)
    np.testing.assert_array_equal(mask, valid)
    if margin == 0:
        np.testing.assert_array_equal(pack(x, side, ratio)[0], known)


def test_check_05_a_margin_of_1_around_single_patches():
    _, mask = halo(features(6, ()), 6, 1, 1)
    keys = mask.sum(1).reshape(6, 6)
    assert np.all(keys[1:-1, 1:-1] == 9)
    assert np.all(keys[[0, -1], 1:-1] == 6) and np.all(keys[1:-1, [0, -1]] == 6)
    assert np.all(keys[[0, 0, -1, -1], [0, -1, 0, -1]] == 4)


@pytest.mark.parametrize("margin", [0, 1])
def test_gradients_count_the_cells_that_a_patch_is_in(margin):
    found = jax.grad(lambda x: jnp.sum(cells.halo(x, 7, 3, margin)[0]))(features(7, ()))
    numbers = brute(np.arange(1, 50)[:, None], 7, 3, margin)[0]
    np.testing.assert_array_equal(found[:, 0], np.bincount(numbers.ravel(), minlength=50)[1:])


def test_check_10_nothing_is_gathered():
    for make, sizes in ((cells.pack, (27, 2)), (cells.halo, (27, 2, 1)), (cells.halo, (24, 3, 2))):
        text = jax.jit(lambda x, make=make, sizes=sizes: make(x, *sizes)[0]).lower(features(sizes[0])).compile()
        assert " gather(" not in text.as_text() and " parameter(" in text.as_text()


def test_faults_are_named():
    with pytest.raises(DataError, match=r"features \(2, 36, 3\) are not \[..., 49, C\], those of 7x7 patches"):
        cells.pack(features(6), 7, 2)
    with pytest.raises(DataError, match=r"cells \(16, 9, 2\) are not \[..., 16, 4, C\]"):
        cells.unpack(np.zeros((16, 9, 2)), 7, 2)
    for ratio in (0, 8):
        with pytest.raises(ConfigError, match=f"ratio {ratio}: a tile of 7x7 patches has cells of 1 to 7 patches"):
            cells.pack(features(7), 7, ratio)
    with pytest.raises(ConfigError, match="margin -1: must be at least 0"):
        cells.halo(features(7), 7, 2, -1)
