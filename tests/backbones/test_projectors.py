"""Projectors against torch: tokens, gradients, pooling and resizing, sizes, which patches a token sees, and faults."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.backbones import projectors
from jaxmem.backbones.projectors import PROJECTORS, RESAMPLERS, ProjectorConfig, parts
from jaxmem.backbones.projectors.config import KINDS, PUBLISHED
from jaxmem.errors import ConfigError, DataError
from tests.backbones.projector_oracle import CASES, by_name, features, pair, read

torch = pytest.importorskip("torch")
F = torch.nn.functional

project = jax.jit(projectors.project, static_argnums=0)
LOCAL = [case for case, c in CASES.items() if c.name in ("mlp", "avgpool", "tokenpacker", "pixel_shuffle")]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def graded(config, params, x, levels, weights):
    """Tokens, and gradients of their weighted sum for parameters and features."""

    def loss(params, x):
        tokens = projectors.project(config, params, x, levels)
        return jnp.sum(tokens * weights), tokens

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("case", CASES)
def test_check_25_tokens_and_gradients_equal_torch(case):
    config = CASES[case]
    module, params = pair(case)
    x, levels = features(config)
    weights = np.random.default_rng(7).normal(size=(3, config.tokens, config.out_width)).astype(np.float32)
    theirs_x, theirs_levels = torch_of(x, levels)
    theirs = module(theirs_x.requires_grad_(), theirs_levels)
    module.zero_grad()
    (theirs * torch.from_numpy(weights)).sum().backward()
    (_, tokens), (grads, grad_x) = graded(config, params, x, levels, weights)

    theirs = theirs.detach().numpy()
    assert tokens.shape == theirs.shape == weights.shape and np.std(theirs, axis=(0, 1)).min() > 0.05
    np.testing.assert_allclose(tokens, theirs, rtol=0, atol=2e-5)
    np.testing.assert_allclose(grad_x, theirs_x.grad, rtol=1e-4, atol=1e-4)
    found = by_name(config, grads)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(found[name], value.grad, rtol=1e-4, atol=2e-4, err_msg=name)


def test_tokens_equal_transformers_own_projectors():
    """LLaVA-NeXT's MLP with and without biases, and InternVL's pixel shuffle, which are in transformers."""
    from transformers import CLIPVisionConfig, InternVLConfig, InternVLVisionConfig, LlavaNextConfig, Qwen2Config
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
    from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

    text = Qwen2Config(hidden_size=10, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2)
    for case in ("mlp", "mlp without biases"):
        ours = CASES[case]
        settings = {"multimodal_projector_bias": ours.bias, "projector_hidden_act": ours.act}
        tower = CLIPVisionConfig(hidden_size=8, num_attention_heads=2)
        hf = LlavaNextConfig(vision_config=tower, text_config=text, **settings)
        module, (x, _) = LlavaNextMultiModalProjector(hf), features(ours)
        close(ours, module, x, torch.from_numpy(x))
    ours = CASES["pixel_shuffle 2"]
    tower = InternVLVisionConfig(hidden_size=8, num_attention_heads=2)
    hf = InternVLConfig(vision_config=tower, text_config=text)
    module, (x, _) = InternVLMultiModalProjector(hf), features(ours)
    square = torch.from_numpy(x.reshape(3, 6, 6, 8))
    close(ours, module, x, InternVLModel.pixel_shuffle(None, square, 0.5).flatten(1, 2))


def close(config, module, x, theirs):
    torch.manual_seed(1)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn_like(value))
        known = module(theirs).numpy()
    params = read(config, module.state_dict(), style="hf")
    assert np.std(known) > 0.1
    np.testing.assert_allclose(project(config, params, x), known, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("side", "ratio"), [(24, 2), (24, 3), (24, 4), (27, 2), (27, 4), (7, 3), (5, 5)])
def test_check_04_pooling_does_not_count_padding(side, ratio):
    x = features(ProjectorConfig("mlp", 4, 4, side))[0]
    known = F.avg_pool2d(image(x, side), ratio, ceil_mode=True, count_include_pad=False)
    np.testing.assert_allclose(parts.cell_means(x, side, ratio), rows(known), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6])
def test_check_25_centres_of_cells_are_bilinear_resizing(ratio):
    x = features(ProjectorConfig("mlp", 4, 4, 24))[0]
    grid = 24 // ratio
    found = parts.cell_centres(x, 24, ratio)
    known = F.interpolate(image(x, 24), (grid, grid), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found, rows(known), rtol=0, atol=1e-6)
    square = x.reshape(3, grid, ratio, grid, ratio, 4)
    middle = slice((ratio - 1) // 2, ratio // 2 + 1)  # the identities: a centre, or the mean of four
    mean = square[:, :, middle][:, :, :, :, middle].mean((2, 4))
    np.testing.assert_allclose(found, mean.reshape(3, grid**2, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "grid"), [(24, 12), (27, 14), (27, 12), (27, 9), (5, 3), (6, 6), (4, 1)])
def test_adaptive_means_equal_torch(side, grid):
    x = features(ProjectorConfig("mlp", 4, 4, side))[0]
    known = rows(F.adaptive_avg_pool2d(image(x, side), grid))
    np.testing.assert_allclose(parts.adaptive_means(x, side, grid), known, rtol=0, atol=1e-6)


def image(x, side):
    return torch.from_numpy(x.reshape(len(x), side, side, -1)).permute(0, 3, 1, 2)


def rows(x):
    return x.permute(0, 2, 3, 1).flatten(1, 2).numpy()


@pytest.mark.parametrize("case", LOCAL)
def test_a_token_sees_the_patches_of_its_own_cell(case):
    """The gradient of token (i, j) for patch (y, x) is zero unless the patch lies in the token's cell."""
    config, (_, params) = CASES[case], pair(case)
    x, levels = features(config, tiles=1)

    def tokens(x, levels):
        return jnp.sum(projectors.project(config, params, x, levels)[0], axis=-1)

    jacobians = jax.tree.leaves(jax.jit(jax.jacrev(tokens, argnums=(0, 1)))(x, levels))
    touched = np.sum([np.abs(part).sum((1, 3)) for part in jacobians], axis=0) > 0  # [N', P]
    cell = np.arange(config.side) // config.cell
    own = (cell[:, None] * config.grid + cell).ravel()
    np.testing.assert_array_equal(touched, own == np.arange(config.tokens)[:, None])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_weights_give_bfloat16_tokens(case):
    config, (module, params) = CASES[case], pair(case)
    x, levels = features(config)
    rough = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = project(config, rough, x, levels)
    assert found.dtype == jnp.bfloat16
    with torch.no_grad():
        known = module(*torch_of(x, levels)).numpy()
    found = np.asarray(found, np.float32)
    assert np.sum(found * known) / np.linalg.norm(found) / np.linalg.norm(known) > 0.999


def torch_of(x, levels):
    return torch.from_numpy(x), [torch.from_numpy(level) for level in levels]


def test_the_published_sizes_have_the_published_number_of_parameters():
    clip, siglip = {"in_width": 1024, "out_width": 1536, "side": 24}, {"in_width": 1152, "out_width": 1536, "side": 27}
    two = lambda c, d: c * d + d + d * d + d  # noqa: E731
    table = {
        ProjectorConfig("mlp", **clip): (two(1024, 1536), 3.94, 576),
        ProjectorConfig("mlp", **siglip): (two(1152, 1536), 4.13, 729),
        ProjectorConfig("avgpool", **clip, ratio=3): (two(1024, 1536), 3.94, 64),
        ProjectorConfig("avgpool", **siglip, ratio=2): (two(1152, 1536), 4.13, 196),
        ProjectorConfig("ldpv2", **clip): (two(1024, 1536) + 10 * 1536, 3.95, 144),
        ProjectorConfig("tokenpacker", **clip, ratio=2): (
            1024**2 + 2 * two(4096, 1024) + 6 * 1024 + 4 * (1024**2 + 1024) + two(1024, 1536),
            19.68,
            144,
        ),
        ProjectorConfig("pixel_shuffle", **siglip, ratio=2): (2 * 4608 + two(4608, 1536), 9.45, 196),
    }
    for config, (exact, millions, tokens) in table.items():
        assert size(projectors.shapes(config)) == exact and round(exact / 1e6, 2) == millions, config
        assert config.tokens == tokens == config.grid**2


def test_the_other_published_sizes():
    """C-Abstractor and the resamplers, whose sizes follow from widths and depths."""
    clip = {"in_width": 1024, "out_width": 4096, "side": 24}
    w, d, se = 1024, 4096, 256
    block = w * w + 9 * w + w * w + 6 * w + w * se + se + se * w + w
    c_abstractor = 576 * w + 6 * block + w * d + d + d * d + d
    perceiver = 32 * w + 3 * (6 * w + 4 * 512 * w + 8 * w * w) + 2 * w + w * d + d + d * d + d
    honeybee_block = 4 * (w * w + w) + 3 * 4 * w * w + 9 * w + 8 * w + 6 * w
    honeybee = 64 * w + w * w + w + 6 * honeybee_block + w * d + d
    v = 768
    look, ffn = 4 * v * v + 4 * v + 2 * v, 8 * v * v + 5 * v + 2 * v
    cross = 2 * v * v + 2 * 1024 * v + 4 * v + 2 * v
    q_former = 32 * v + 2 * v + 12 * (look + ffn) + 6 * cross + v * d + d
    known = {"perceiver": (perceiver, 32), "honeybee": (honeybee, 64), "q_former": (q_former, 32)}
    for kind, (exact, tokens) in known.items():
        config = ProjectorConfig("resampler", **clip, kind=kind)
        assert (size(projectors.shapes(config)), config.tokens, config.grid) == (exact, tokens, None)
    config = ProjectorConfig("c_abstractor", **clip)
    assert (size(projectors.shapes(config)), config.tokens, config.ratio) == (c_abstractor, 144, 2)


def test_every_name_has_a_module():
    assert {*PROJECTORS, "resampler"} == set(PUBLISHED) and set(RESAMPLERS) == set(KINDS)
    assert {c.kind or c.name for c in CASES.values()} == {*PROJECTORS, *RESAMPLERS}


def test_ratio_queries_and_cells_agree():
    make = functools.partial(ProjectorConfig, in_width=4, out_width=4)
    c = make("ldpv2", side=24)
    assert (c.queries, c.grid, c.ratio, c.cell, c.layers) == (144, 12, 2, 2, ())
    c = make("c_abstractor", side=27, ratio=2, width=4)
    assert (c.queries, c.grid, c.tokens, c.cell) == (196, 14, 196, None)  # 27 patches in 14 bins, which overlap
    assert make("c_abstractor", side=27, queries=81).cell == 3
    c = make("avgpool", side=27, ratio=2)
    assert (c.grid, c.tokens, c.cell) == (14, 196, 2)
    assert make("mlp", side=24).cell == 1 and make("resampler", side=24).cell is None
    c = make("tokenpacker", side=24, ratio=2, levels=[3, 5])
    assert c.layers == (3, 5) and hash(c) == hash(dataclasses.replace(c)) and (c.width, c.heads) == (1024, 8)
    for c in CASES.values():
        assert ProjectorConfig(**dataclasses.asdict(c)) == c


def test_fresh_weights():
    config = ProjectorConfig("resampler", in_width=64, out_width=96, side=4, queries=50)
    fresh = jax.jit(projectors.init, static_argnums=1)(jax.random.key(0), config)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    assert np.std(fresh["latents"]) == pytest.approx(1, rel=0.05) and not np.any(fresh["mlp"]["fc1"]["bias"])
    assert np.std(fresh["blocks"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    kernels = fresh["blocks"]["q"]["kernel"]  # every block its own
    assert kernels.shape == (3, 64, 512) and not np.allclose(kernels[0], kernels[1])


def test_settings_that_do_not_fit_are_named():
    make = functools.partial(ProjectorConfig, in_width=8, out_width=8, side=6)
    faults = {
        r"projector 'conv' is not implemented; there are mlp, avgpool, ldpv2, tokenpacker": {"name": "conv"},
        r"activation 'tanh' is not implemented; there are quick_gelu": {"name": "mlp", "act": "tanh"},
        r"kind 'flamingo' is not implemented; there are perceiver": {"name": "resampler", "kind": "flamingo"},
        r"'mlp' of 6x6 patches: ratio 2 must be 1; avgpool, tokenpacker": {"name": "mlp", "ratio": 2},
        r"'resampler' of 6x6 patches: ratio 3 must be 1": {"name": "resampler", "ratio": 3},
        r"'avgpool' of 6x6 patches: ratio 7 must be 1 to 6": {"name": "avgpool", "ratio": 7},
        r"'avgpool': ratio 0 must be whole numbers of at least 1": {"name": "avgpool", "ratio": 0},
        r"queries 10 must be a square of at most 36, such as 9": {"name": "c_abstractor", "queries": 10},
        r"'ldpv2' of 6x6 patches: queries 144 must be a square of at most 36, such as 36": {"name": "ldpv2"},
        r"ratio 3 and queries 9 do not agree; give one": {"name": "ldpv2", "ratio": 3, "queries": 9},
        r"'mlp' has no heads, queries; it has none": {"name": "mlp", "queries": 9, "heads": 2},
        r"'avgpool' has no kind": {"name": "avgpool", "kind": "honeybee"},
        r"'ldpv2' has no width; it has queries": {"name": "ldpv2", "width": 9},
        r"width 10 is not a multiple of 4 heads": {"name": "tokenpacker", "width": 10, "heads": 4},
        r"Q-Former's layers come in pairs, not 3": {"name": "resampler", "kind": "q_former", "depth": 3},
        r"'tokenpacker' needs at least one hidden state": {"name": "tokenpacker", "levels": ()},
        r"in_width 0, depth -1 must be whole": {"name": "resampler", "in_width": 0, "depth": -1},
        r"side 6.0 must be whole": {"name": "mlp", "side": 6.0},
    }
    for message, settings in faults.items():
        with pytest.raises(ConfigError, match=message):
            make(**settings)


def test_features_that_do_not_fit_are_named():
    config, (_, params) = CASES["tokenpacker 2"], pair("tokenpacker 2")
    x, levels = features(config)
    with pytest.raises(DataError, match=r"'tokenpacker': features \(3, 37, 8\) are not \[B, 36, 8\]"):
        projectors.project(config, params, np.zeros((3, 37, 8)), levels)
    with pytest.raises(DataError, match=r"features \(36, 8\) are not \[B, 36, 8\]"):
        projectors.project(config, params, x[0], levels)
    with pytest.raises(DataError, match=r"levels \[\] are not one \(3, 36, 8\) for each .* states 12, 16, 22, 23"):
        projectors.project(config, params, x)
    with pytest.raises(DataError, match=r"'mlp': levels \[\(3, 36, 8\)\] are not one .* hidden states none"):
        projectors.project(CASES["mlp"], pair("mlp")[1], x, levels[:1])
