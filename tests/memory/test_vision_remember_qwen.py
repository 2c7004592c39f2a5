"""Vision Remember on Qwen2.5-VL (a tower with windows) and Qwen3-VL (DeepStack); the levels that all towers give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import registry
from jaxmem.memory import vision_remember
from tests.backbones import clip_folder
from tests.backbones.prompts import image, text, user
from tests.memory import vision_world as v
from tests.memory import world as w

torch = pytest.importorskip("torch")

FAMILIES = pytest.mark.parametrize("family", v.QWEN)
LARGE = user(image(250, 146, 4), text("which street?"))  # more than one attention window
CHATS = [LARGE, v.CHATS["several"], v.CHATS["text"], v.CHATS["answered"]]
LAYERS = v.SMALL["layers"]


def world(family: str, preset: str, gate: float | None = None, **settings: Any) -> tuple[Any, Any, Any, Any]:
    backbone = v.qwen(family)
    config = v.config_of(backbone, preset, **settings)
    return backbone, config, v.spec_of(backbone, config), v.memory_of(config, gate=gate)


def see(backbone: Any, batch: Any, levels: tuple[int, ...]) -> Any:
    lib = registry.backbone(backbone.spec.backbone.model_type)
    return jax.jit(lambda base, batch: lib.see(backbone.spec.backbone, base, batch, levels=levels))(
        backbone.base, batch
    )


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("preset", v.PRESETS)
@FAMILIES
def test_check_13_closed_gates_are_the_backbone_and_open_ones_are_not(family, preset, padding):
    backbone, config, spec, closed = world(family, preset, 0.0)
    assert backbone.spec.backbone.vision.window > 0 or backbone.spec.backbone.vision.taps
    batch = v.batch_of(backbone, CHATS, padding=padding)
    bare = np.asarray(w.hidden(v.spec_of(backbone), backbone.base, {}, batch))
    np.testing.assert_array_equal(w.hidden(spec, backbone.base, closed, batch), bare)
    opened = np.asarray(w.hidden(spec, backbone.base, v.memory_of(config), batch))
    np.testing.assert_array_equal(opened[2], bare[2])  # text alone
    valid = np.asarray(batch.segments) > 0
    taught = np.asarray(batch.loss_mask) > 0
    assert np.abs(opened - bare)[taught].max(-1).min() > 1e-2
    assert np.all(np.abs(opened - bare)[[0, 1, 3]].max((1, 2)) > 0.1)
    if padding == "left":  # neither the side of padding nor company matters
        for row, chat in enumerate(CHATS):
            alone = v.batch_of(backbone, [chat])
            known = np.asarray(w.hidden(spec, backbone.base, v.memory_of(config), alone))[0]
            known = known[np.asarray(alone.segments[0]) > 0]
            np.testing.assert_allclose(opened[row][valid[row]], known, rtol=0, atol=2e-5)


@FAMILIES
def test_levels_are_the_hidden_states_of_transformers_in_the_order_of_the_patches(family):
    backbone, theirs = v.qwen_pair(family)
    row = v.encoded(backbone, LARGE)
    depth, batch = backbone.spec.backbone.vision.depth, v.batch_of(backbone, [LARGE])
    found = see(backbone, batch, tuple(range(1, depth + 1))).levels
    tower, states = theirs.model.visual, []
    hooks = [
        block.register_forward_hook(lambda module, given, out: states.append(out.detach())) for block in tower.blocks
    ]
    rows, columns = row.images[0]
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    with torch.no_grad():
        tower(torch.tensor(row.patches), grid_thw=grid)
    for hook in hooks:
        hook.remove()
    if family == "qwen2_5_vl":
        places = [divmod(token, columns) for token in range(rows * columns)]  # its tower walks window by window
        order = sorted(range(len(places)), key=lambda n: (places[n][0] // 4, places[n][1] // 4, *places[n]))
        assert order != sorted(order)
        back = torch.argsort(torch.tensor(order))
        states = [state.reshape(len(order), 4, -1)[back].flatten(0, 1) for state in states]
    for level, state in enumerate(states, 1):
        np.testing.assert_allclose(found[level][0, : len(row.patches)], state.numpy(), rtol=0, atol=2e-5)


def test_levels_of_llava_are_those_of_clip_without_the_class_token(tmp_path):
    backbone = v.llava()
    theirs = clip_folder.tower_of(clip_folder.write("clip", tmp_path, vision_num_hidden_layers=v.BLOCKS))
    batch = v.batch_of(backbone, ("square",))
    wanted = (0, 1, 4, -1)
    found = see(backbone, batch, wanted).levels
    pixels = np.asarray(batch.patches).reshape(-1, v.SIDE, v.SIDE, 3, 7, 7)
    pixels = pixels.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, v.SIDE * 7, v.SIDE * 7)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 3), (0, 3)))  # pixels behind the last whole patch are not seen
    with torch.no_grad():
        states = theirs(torch.tensor(pixels), output_hidden_states=True).hidden_states
    assert len(states) == v.BLOCKS + 1
    for level in wanted:
        known = states[level][:, 1:].reshape(1, -1, 30).numpy()
        np.testing.assert_allclose(found[level], known, rtol=0, atol=2e-5)


@pytest.mark.parametrize("local", [True, False])
@FAMILIES
def test_a_token_sees_the_patches_that_were_merged_to_it(family, local):
    """By the coordinates that the host gives to patches: token (i, j) of an image stands for 2x2 patches of it."""
    backbone, config, _, memory = world(family, "vr_v1", local=local, layers=(1,))
    batch = v.batch_of(backbone, CHATS[1:2])
    x, levels = v.stream_like(batch, config.width), v.features(config, batch)
    function = lambda levels: v.act(config, memory["vision_remember"], batch, levels, x).sum(-1)[0]  # noqa: E731
    slopes = jax.jit(lambda levels: v.slopes(function, levels))(levels)
    found = np.asarray(sum(jnp.abs(slope[:, 0]).sum(-1) for slope in slopes.values())) > 0
    tokens = np.flatnonzero(batch.is_visual[0])
    assert not np.delete(found, tokens, axis=0).any()
    sizes, segments = v.encoded(backbone, CHATS[1]).images, np.asarray(batch.patch_segments[0])
    coords, token = np.asarray(batch.patch_coords[0]), iter(tokens)
    for number, (rows, columns) in enumerate(sizes, 1):
        for i, j in np.ndindex(rows, columns):
            own = (segments == number) & ((coords // 2 == (i, j)).all(1) | (not local))
            assert own.sum() == (4 if local else 4 * rows * columns)
            np.testing.assert_array_equal(found[next(token)], own)
    assert next(token, None) is None


@pytest.mark.parametrize("preset", v.PRESETS)
@FAMILIES
def test_check_19_prefill_and_decode_are_the_full_forward(family, preset):
    backbone, _, spec, memory = world(family, preset)
    whole = v.answered(LARGE, "people and animals"), v.answered(v.CHATS["turns"], "seven digits")
    prompts = v.batch_of(backbone, [LARGE, v.CHATS["turns"]], padding="left", prompt=True)
    rows = [v.encoded(backbone, chat).tokens for chat in whole]
    full = np.asarray(w.hidden(spec, backbone.base, memory, v.batch_of(backbone, whole)))
    lengths = np.asarray(prompts.segments > 0).sum(1)
    states, kept = w.prefill(spec, backbone.base, memory, prompts, 256)
    for step in range(4):
        np.testing.assert_allclose(states, full[np.arange(2), lengths - 1 + step], rtol=0, atol=1e-4)
        tokens = jnp.asarray([row[length + step] for row, length in zip(rows, lengths, strict=True)])
        states, kept = w.decode(spec, backbone.base, memory, kept, tokens, jnp.ones(2, bool))


def test_it_acts_behind_deepstack():
    """In a layer with both, Vision Remember reads what DeepStack has added."""
    backbone, config, spec, memory = world("qwen3_vl", "vr_v1", layers=(0,))
    batch = v.batch_of(backbone, CHATS[1:2])
    before, after, _ = v.watched(spec, backbone.base, memory, batch)
    _, stacked, _ = v.watched(v.spec_of(backbone), backbone.base, {}, batch)
    assert np.abs(np.asarray(stacked[0] - before[0])).max() > 0.1  # DeepStack's own part
    levels = see(backbone, batch, spec.levels).levels
    known = v.act(config, memory["vision_remember"], batch, levels, stacked[0])
    np.testing.assert_allclose(after[0], known, rtol=0, atol=2e-5)
    assert isinstance(config, vision_remember.VisionRememberConfig) and config.tile_patches == 0
