"""Acceptance checks 2 to 4 and 40 of CoMEM: what trains at the released sizes. Nothing is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from jaxmem.backbones.published import PUBLISHED
from jaxmem.backbones.registry import backbone
from jaxmem.errors import ConfigError
from jaxmem.memory import comem, item_encoder
from jaxmem.model import Spec, hidden_states
from jaxmem.planning.batches import Shape, abstract
from jaxmem.training import trees
from jaxmem.training.optimizer import OptimizerConfig, transformation

SIZES = {  # Linears, their factors, everything that trains, one copy of the backbone
    "Qwen2.5-VL-7B-Instruct": (358, 51_824_640, 231_719_936, 8_292_166_656),
    "Qwen2-VL-7B-Instruct": (326, 51_159_040, 231_054_336, 8_291_375_616),
}


def shapes(name, **settings):
    config = comem.create(PUBLISHED[name], **settings)
    return config, jax.eval_shape(lambda: comem.init(jax.random.key(0), config))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SIZES)
def test_check_02_factors(name):
    config, params = shapes(name)
    modules, factors, *_ = SIZES[name]
    assert item_encoder.modules(config.kernels) == modules
    assert count(params["encoder"]) == factors
    assert count(params["encoder"]["layers"]) == 40_370_176
    assert len(jax.tree.leaves(params["encoder"])) == 2 * len(config.kernels)
    assert not any("patch_embed" in path or "head" in path or "embed" in path for path, _ in config.kernels)


@pytest.mark.parametrize("name", SIZES)
def test_check_03_all_that_trains(name):
    config, params = shapes(name)
    *_, trainable, whole = SIZES[name]
    assert count(params) == trainable and count(params["q_former"]) == 179_895_296
    base = backbone(PUBLISHED[name].model_type).shapes(PUBLISHED[name], jnp.bfloat16)
    assert count(base) == whole
    trains, frozen = trees.split({"base": base, "memory": {"comem": params}}, "memory")
    assert set(trains) == {"memory"} and set(frozen) == {"base"}
    transform = transformation(OptimizerConfig(), trains)
    state = jax.eval_shape(transform.init, trains)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sum(math.prod(leaf.shape) for leaf in moments) == 2 * trainable


def test_check_04_shares():
    report = comem.shares(comem.create(PUBLISHED["Qwen2.5-VL-7B-Instruct"]), PUBLISHED["Qwen2.5-VL-7B-Instruct"])
    assert "231,719,936" in report and "2.79 %" in report and "1.38 %" in report and "1.2 %" in report


def test_parts_and_rank_say_what_gets_factors():
    whole = count(shapes("Qwen2.5-VL-7B-Instruct")[1]["encoder"])
    _, half = shapes("Qwen2.5-VL-7B-Instruct", rank=8)
    assert 2 * count(half["encoder"]) == whole
    _, decoder = shapes("Qwen2.5-VL-7B-Instruct", parts=("layers",))
    assert set(decoder["encoder"]) == {"layers"} and count(decoder["encoder"]) == 40_370_176
    _, none = shapes("Qwen2.5-VL-7B-Instruct", rank=0)
    assert "encoder" not in none
    _, attention = shapes("Qwen2.5-VL-7B-Instruct", parts=("layers/attention/q",))
    assert count(attention["encoder"]) == 28 * 2 * 3584 * 16


def test_qwen3_vl_has_mergers_for_its_taps():
    config, params = shapes("Qwen3-VL-8B-Instruct")
    names = {path for path, _ in config.kernels}
    assert {"visual/deepstack/fc1", "visual/deepstack/fc2", "visual/merger/fc1", "visual/blocks/mlp/fc2"} <= names
    assert params["encoder"]["visual"]["deepstack"]["fc1"]["lora_a"].shape[0] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": 3}, "no setting ranks"),
        ({"parts": ("visual/heads",)}, r"\['visual/heads'\] name no kernels"),
        ({"rank": -1}, "rank -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"order": "best"}, "'best'"),
        ({"query_tower": "both"}, "'both'"),
        ({"encoder_layers": 29}, "0 to 28"),
        ({"latents": 0}, "latents 0"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ConfigError, match=words):
        comem.create(PUBLISHED["Qwen2.5-VL-7B-Instruct"], **settings)


def test_check_40_parameters_lie_in_memory_once():
    """A training step and the encoder take the backbone as one argument beside the memory, whatever reads it: no second
    copy among the arguments, and none is made, since what lives meanwhile is less than a copy."""
    name = "Qwen2.5-VL-7B-Instruct"
    config, params = shapes(name)
    full = PUBLISHED[name]
    small = dataclasses.replace(
        full,
        text=dataclasses.replace(full.text, layers=2, width=256, mlp_width=4096, heads=4, kv_heads=2, head_dim=64,
                                 rope_section=(8, 12, 12), vocab=30_000),
        vision=dataclasses.replace(full.vision, depth=2, width=128, mlp_width=512, heads=4, out_width=256,
                                   full_blocks=(1,)),
        image_token=1, video_token=2, vision_start_token=3, vision_end_token=4,
    )  # fmt: skip
    assert count(params) == SIZES[name][2] and config.rank == 16
    config = comem.create(small, heads=4, dropout=0.0)
    own = jax.eval_shape(lambda: comem.init(jax.random.key(0), config))
    base = backbone(small.model_type).shapes(small)
    batch = abstract((1,), Shape(32, 16, (2, 16, 16)), small)
    spec = Spec(small, (config,))
    compiled = jax.jit(hidden_states, static_argnums=0).lower(spec, base, {"comem": own}, batch).compile()
    used = compiled.memory_analysis()
    parameters = 4 * (count(base) + count(own))
    inputs = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    assert used.argument_size_in_bytes <= 1.05 * parameters + inputs
    assert used.argument_size_in_bytes + used.temp_size_in_bytes <= 1.05 * parameters + inputs + 4 * count(base) // 2
