"""CLIP and SigLIP against transformers in torch: the hidden states and vectors of images, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.backbones import clip, vit
from jaxmem.backbones.clip_config import vision_config
from jaxmem.backbones.encoder import normed
from jaxmem.checkpoints import clip_folder
from jaxmem.distributed.mesh import make_mesh
from jaxmem.errors import ConfigError, DataError
from tests.backbones.clip_folder import LENGTH, PROJECTION, SIDE, VISION, tower_of, write

KINDS = ("clip", "siglip", "clip_vision", "clip_vision_projected", "siglip_vision")
DEPTH = VISION["num_hidden_layers"]
see = jax.jit(vit.forward, static_argnums=(0, 3), static_argnames="interpolate")
embed_images = jax.jit(clip.embed_images, static_argnums=0)
EVERY = tuple(range(DEPTH + 1))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Kind to (folder, torch model, our config, our parameters)."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        model = write(kind, folder)
        return folder, model, *clip_folder.load(folder)

    return make


@pytest.fixture(scope="module")
def states(loaded):
    """Kind to every hidden state of `pixels()`, ours and torch's."""

    @functools.cache
    def make(kind):
        _, model, config, params = loaded(kind)
        return see(config.vision, params["visual"], pixels(), EVERY), torch_states(model, pixels()).hidden_states

    return make


def pixels(rows=3, height=SIDE, width=SIDE, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, height, width, 3)).astype(np.float32)


def tensor(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def close(ours, theirs, atol=1e-5):
    theirs = theirs.detach().numpy()
    assert np.abs(theirs).max() > 0.1  # random weights that say something
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@torch.no_grad()
def torch_states(model, images, **more):
    return tower_of(model)(tensor(images), output_hidden_states=True, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_state_equals_torch(states, kind):
    ours, theirs = states(kind)
    assert len(ours) == len(theirs) == DEPTH + 1
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its)


@pytest.mark.parametrize("layers", [(2, 0, -1, 2), (-2,), (-DEPTH - 1,)])
def test_layers_are_given_as_asked_for(loaded, states, layers):
    *_, config, params = loaded("clip")
    theirs = states("clip")[1]
    for mine, layer in zip(see(config.vision, params["visual"], pixels(), layers), layers, strict=True):
        close(mine, theirs[layer])


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_check_22_features_are_not_normed_behind_the_blocks(loaded, states, kind):
    """transformers 4.57 put SigLIP's normed states in the place of the raw ones; backbones read the raw ones."""
    _, model, config, params = loaded(kind)
    ours, theirs = (found[-1] for found in states(kind))
    with torch.no_grad():
        after = tower_of(model).post_layernorm(theirs)
    assert np.abs(np.asarray(ours) - after.numpy()).max() > 0.5
    close(normed(config.vision, params["pool"]["norm"], ours), after)
    close(ours, theirs)


def test_check_24_clip_counts_states_from_behind_its_first_norm(loaded, states):
    first, tower = states("clip")[0][0], tower_of(loaded("clip")[1])
    with torch.no_grad():
        close(first, tower.pre_layrnorm(tower.embeddings(tensor(pixels()))))
    assert first.shape == (3, 4 * 4 + 1, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_images_equal_torch(loaded, states, kind):
    _, model, config, params = loaded(kind)
    with torch.no_grad():
        found = torch_states(model, pixels()).pooler_output
        projected = model.visual_projection(found) if config.projection else found
    close(jax.jit(clip.pool_image, static_argnums=0)(config, params, states(kind)[0][-1]), projected)
    unit = embed_images(config, params, pixels())
    close(unit, projected / projected.norm(dim=-1, keepdim=True))
    assert unit.shape == (3, config.width) and config.width == (PROJECTION if config.projection else 30)


@pytest.mark.parametrize(("kind", "size"), [("clip", (45, 24)), ("clip", (28, 28)), ("siglip", (14, 62))])
def test_other_sizes_get_interpolated_positions_when_asked(loaded, kind, size):
    _, model, config, params = loaded(kind)
    images = pixels(2, *size)
    theirs = torch_states(model, images, interpolate_pos_encoding=True)
    ours = see(config.vision, params["visual"], images, (0, -1), interpolate=True)
    close(ours[0], theirs.hidden_states[0])
    close(ours[1], theirs.hidden_states[-1])
    with pytest.raises(DataError, match=rf"{size[0]}x{size[1]} pixels.*table is for 31x31; resize them, or ask"):
        vit.forward(config.vision, params["visual"], images)


def test_patches_are_pixels(loaded, states):
    *_, config, params = loaded("siglip")
    patches = vit.patchify(config.vision, pixels())
    assert patches.shape == (3, 16, 3 * 7 * 7)
    np.testing.assert_array_equal(patches[1, 6].reshape(3, 7, 7), pixels()[1, 7:14, 14:21].transpose(2, 0, 1))
    found = see(config.vision, params["visual"], patches, EVERY)
    np.testing.assert_allclose(found, states("siglip")[0], rtol=0, atol=1e-6)


def test_gradients_of_several_layers_equal_torch(loaded):
    """Backbones train the tower through layers that are not the last; blocks behind them get none."""
    _, model, config, params = loaded("clip")
    tower = tower_of(model)
    states = tower(tensor(pixels()), output_hidden_states=True).hidden_states
    loss = (states[1] ** 2).mean() + (states[-2] ** 3).mean()
    names = ["embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight", "encoder.layers.2.mlp.fc1.weight"]
    conv, first, third = torch.autograd.grad(loss, [dict(tower.named_parameters())[name] for name in names])

    def ours(visual):
        low, high = vit.forward(config.vision, visual, pixels(), (1, -2))
        return jnp.mean(low**2) + jnp.mean(high**3)

    found = jax.jit(jax.grad(ours))(params["visual"])
    close(found["patch_embed"]["kernel"], conv.flatten(1).T, 1e-6)
    fc1 = found["blocks"]["mlp"]["fc1"]["kernel"]
    close(np.asarray(fc1[0]) * 10, first.T * 10, 1e-5)
    close(np.asarray(fc1[2]) * 10, third.T * 10, 1e-5)
    assert not np.any(fc1[3])


def test_a_third_activation(tmp_path):
    model = write("clip_vision", tmp_path, vision_hidden_act="gelu")
    config, params = clip_folder.load(tmp_path)
    close(see(config.vision, params["visual"], pixels(), (-1,))[0], torch_states(model, pixels()).hidden_states[-1])


def test_bfloat16_stays_near(loaded):
    folder, _, config, params = loaded("siglip")
    _, rough = clip_folder.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype(jnp.bfloat16)}
    state = jax.eval_shape(lambda: vit.forward(config.vision, rough["visual"], pixels())[0])
    found, known = (embed_images(config, tree, pixels()) for tree in (rough, params))
    assert state.dtype == jnp.bfloat16 and found.dtype == jnp.float32
    assert np.min(np.sum(found * known, axis=1)) > 0.999


def test_rows_spread_over_devices_give_the_same(loaded):
    *_, config, params = loaded("siglip")
    images = pixels(4)
    known = embed_images(config, params, images)
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
        found = embed_images(config, params, images)
    assert found.sharding.spec[0] == "data"
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-6)


def test_random_weights_have_the_shapes_of_a_folder(loaded):
    for kind in KINDS:
        *_, config, params = loaded(kind)
        assert jax.tree.map(jnp.shape, clip.shapes(config)) == jax.tree.map(jnp.shape, params)
    fresh = jax.jit(vit.init, static_argnums=1)(jax.random.key(0, impl="rbg"), config.vision)
    assert np.std(fresh["blocks"]["mlp"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.all(fresh["blocks"]["norm1"]["scale"] == 1) and not np.any(fresh["blocks"]["attention"]["q"]["bias"])


def test_a_siglip_without_its_head_gives_hidden_states_alone(tmp_path):
    write("siglip_vision", tmp_path, vision_vision_use_head=False)
    config, params = clip_folder.load(tmp_path)
    assert config.pool == "none" and set(params) == {"visual", "pool"} and set(params["pool"]) == {"norm"}
    with pytest.raises(ConfigError, match="siglip_vision_model has vision_use_head false"):
        clip.embed_images(config, params, pixels())
    with pytest.raises(ConfigError, match="holds no text tower"):
        clip.embed_texts(config, params, np.zeros((1, LENGTH), np.int32))


def test_the_published_large_sizes_have_the_published_number_of_parameters():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    large |= {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model"}
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
    so400m |= {"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}
    for section, places, millions in ((large, 577, 303.5), (so400m, 729, 397.7)):
        config = vision_config(section)
        tree = jax.eval_shape(lambda config=config: vit.init(jax.random.key(0), config))
        size = sum(leaf.size for leaf in jax.tree.leaves(tree))
        assert config.places == places and size / 1e6 == pytest.approx(millions, abs=0.06)


def test_faults_are_named(loaded):
    *_, config, params = loaded("clip")
    for layers, named in (((5, 1), r"\[5\]"), ((-6,), r"\[-6\]"), ((), "none")):
        with pytest.raises(ConfigError, match=rf"{named} cannot be given; 4 blocks have 0 .* to 4, or -5 to -1"):
            vit.forward(config.vision, params["visual"], pixels(), layers)
    with pytest.raises(
        DataError, match=r"\(2, 31, 31, 4\) are neither pixels \[B, 31, 31, 3\] nor patches \[B, 16, 147"
    ):
        vit.forward(config.vision, params["visual"], np.zeros((2, 31, 31, 4), np.float32))
    with pytest.raises(ConfigError, match="ViTConfig: width 31 is not a multiple of 5 heads"):
        dataclasses.replace(config.vision, width=31)
    with pytest.raises(ConfigError, match="ViTConfig: depth 0, mlp_width 1.5 must be whole numbers of at least 1"):
        dataclasses.replace(config.vision, depth=0, mlp_width=1.5)
    with pytest.raises(ConfigError, match="activation 'relu' is not implemented; there are quick_gelu"):
        vision_config({"hidden_act": "relu"}, "clip")
    with pytest.raises(ConfigError, match="num_channels 4 is not supported"):
        vision_config({"num_channels": 4}, "clip")
    with pytest.raises(ConfigError, match=r"image_size \[224, 448\] is not square"):
        vision_config({"image_size": [224, 448]}, "siglip")
    with pytest.raises(ConfigError, match="model_type 'dinov2' is not supported; supported: clip_vision_model"):
        vision_config({"model_type": "dinov2"})
