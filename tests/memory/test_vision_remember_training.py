"""Acceptance check 21 of Vision Remember, and what its parameters and the backbone's learn from the answers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxmem.training import sft, trees
from tests.memory import vision_world as v

STAGES = {  # what trains
    "stage_1": ("memory", "base/projector"),
    "stage_2": ("**",),
    "memory": ("memory",),
}
LEVELS = (2, 4, 6)


@functools.cache
def backward(preset: str, stage: str, **settings: Any) -> Any:
    """(tree, the compiled gradient of the loss of answers) for some settings."""
    backbone = v.llava()
    config = v.config_of(backbone, preset, **settings)
    tree, batch = {"base": backbone.base, "memory": v.memory_of(config)}, v.batch_of(backbone)
    trainable, frozen = trees.split(tree, STAGES[stage])
    forward = sft.model_forward(v.spec_of(backbone, config), trainable)
    loss = lambda trainable, frozen: sft.token_loss(forward, trainable, frozen, batch).nll  # noqa: E731
    return config, tree, jax.jit(jax.grad(loss))


def gradients(
    preset: str, stage: str, gate: float | None = None, closed: Any = None, **settings: Any
) -> dict[str, np.ndarray]:
    """Gradients by path; `gate` everywhere where it is given. `closed(path)` -> an array of 0 and 1 to multiply by."""
    config, tree, graded = backward(preset, stage, **settings)
    tree = tree | {"memory": v.memory_of(config, gate=gate)}
    tree = trees.map_with_path(lambda path, leaf: leaf if closed is None else leaf * closed(path), tree)
    return {path: np.asarray(leaf) for path, leaf in trees.leaves(graded(*trees.split(tree, STAGES[stage])))}


def of_blocks(found: dict[str, np.ndarray]) -> np.ndarray:
    """[blocks] norms of the gradients of the tower's blocks."""
    parts = [leaf.reshape(v.BLOCKS, -1) for path, leaf in found.items() if path.startswith("base/visual/blocks/")]
    return np.linalg.norm(np.concatenate(parts, axis=1), axis=1)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("vr_v1", {"fusion": "weighted_sum", "impl": "absorbed"}), ("vr_v2", {})],
    ids=["v1_sum", "v2"],
)
def test_check_21_every_level_learns_when_the_tower_trains(preset, settings):
    found = gradients(preset, "stage_2", levels=LEVELS, **settings)
    assert all(np.isfinite(leaf).all() for leaf in found.values()) and np.all(of_blocks(found) > 1e-4)
    bare = of_blocks(gradients(preset, "stage_2", 0.0, levels=LEVELS, **settings))
    assert bare[5] == 0 and np.all(bare[:5] > 0)  # the projector reads hidden state 5
    for at, level in enumerate(LEVELS):  # through one level alone, and not through the projector

        def only(path: str, at: int = at) -> np.ndarray:
            if path.startswith("base/projector"):
                return np.zeros(1, np.float32)
            return np.eye(3, dtype=np.float32)[at][:, None] if "fusion/norm" in path else np.ones(1, np.float32)

        norms = of_blocks(gradients(preset, "stage_2", closed=only, levels=LEVELS, **settings))
        assert np.all(norms[:level] > 1e-4) and not norms[level:].any()
    kernels = [path for path, leaf in found.items() if path.startswith("memory/") and path.endswith("kernel")]
    assert len(kernels) > 3 and all(np.abs(found[path]).max() > 0 for path in kernels)


@pytest.mark.parametrize("preset", v.PRESETS)
def test_check_21_a_frozen_tower_gets_no_gradient(preset):
    found = gradients(preset, "stage_1")
    assert not [path for path in found if path.startswith("base/visual")]
    assert any(path.startswith("base/projector") for path in found)
    assert all(np.abs(leaf).max() > 0 for leaf in found.values())
    known = gradients(preset, "stage_2")
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, known[path], rtol=1e-3, atol=1e-4 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("preset", v.PRESETS)
def test_closed_gates_learn_first(preset):
    found = {path: leaf for path, leaf in gradients(preset, "stage_1", 0.0).items() if path.startswith("memory")}
    for path, leaf in found.items():
        assert np.abs(leaf).all() == path.endswith("gate") and np.abs(leaf).any() == path.endswith("gate"), path


def test_memories_alone_get_the_same_gradients_without_a_pass_below_their_first_layer():
    settings = {"layers": (1, 3)}
    assert v.spec_of(v.llava(), v.config_of(v.llava(), "vr_v2", **settings)).first_port_layer == 1
    found, known = gradients("vr_v2", "memory", **settings), gradients("vr_v2", "stage_1", **settings)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, known[path], rtol=1e-3, atol=1e-4 * np.abs(leaf).max(), err_msg=path)
