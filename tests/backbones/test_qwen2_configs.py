"""`config.json` of Qwen2-VL and Qwen2.5-VL, flat as published and nested as transformers writes it; sizes; refusals."""

from __future__ import annotations

import copy
import json
import math

import jax
import pytest
import transformers

from jaxmem.backbones.published import PUBLISHED
from jaxmem.backbones.registry import backbone, config_from_hf
from jaxmem.backbones.rope import sectioned_axes
from jaxmem.errors import ConfigError

TEXT_7B = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
SHAPE = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2}
SHAPE |= {"spatial_patch_size": 14, "temporal_patch_size": 2}
QWEN2 = {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
QWEN2_5 = {
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
FLAT = {  # the keys of the released 7B files that say what is computed
    "qwen2_vl": {**IDS, **TEXT_7B, "max_position_embeddings": 32768, "vision_config": SHAPE | QWEN2},
    "qwen2_5_vl": {**IDS, **TEXT_7B, "max_position_embeddings": 128000, "vision_config": SHAPE | QWEN2_5},
}
NAMES = {"qwen2_vl": "Qwen2-VL-7B-Instruct", "qwen2_5_vl": "Qwen2.5-VL-7B-Instruct"}


def flat(model_type: str) -> dict:
    return copy.deepcopy(FLAT[model_type]) | {"model_type": model_type}


@pytest.mark.parametrize("model_type", FLAT)
def test_flat_and_nested_files_describe_the_published_model(model_type):
    assert config_from_hf(flat(model_type)) == PUBLISHED[NAMES[model_type]]
    theirs = transformers.AutoConfig.for_model(**flat(model_type))
    nested = json.loads(theirs.to_json_string(use_diff=False))
    assert "hidden_size" not in nested and nested["text_config"]["hidden_size"] == 3584
    assert config_from_hf(nested) == PUBLISHED[NAMES[model_type]]


@pytest.mark.parametrize("model_type", FLAT)
@pytest.mark.parametrize("inside", [False, True])
def test_a_tied_head_may_be_stated_outside_or_inside(model_type, inside):
    hf = flat(model_type)
    text = {key: hf.pop(key) for key in TEXT_7B}
    (text if inside else hf)["tie_word_embeddings"] = True
    assert config_from_hf(hf | {"text_config": text}).text.tied


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


SIZES = {  # parameters of the released checkpoints, and of their vision towers where the papers' tables have them
    "Qwen2-VL-2B-Instruct": (2_208_985_600, None),
    "Qwen2-VL-7B-Instruct": (8_291_375_616, 675_759_104),
    "Qwen2-VL-72B-Instruct": (73_405_560_320, None),
    "Qwen2.5-VL-3B-Instruct": (3_754_622_976, None),
    "Qwen2.5-VL-7B-Instruct": (8_292_166_656, 676_550_144),
    "Qwen2.5-VL-32B-Instruct": (33_452_718_336, None),
    "Qwen2.5-VL-72B-Instruct": (73_410_777_344, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_architectures_have_the_published_sizes(name):
    shapes = backbone(PUBLISHED[name].model_type).shapes(PUBLISHED[name])
    whole, tower = SIZES[name]
    assert count(shapes) == whole and tower in (None, count(shapes["visual"]))
    if name == "Qwen2.5-VL-7B-Instruct":
        assert shapes["visual"]["merger"]["fc1"]["kernel"].shape == (5120, 5120)
        assert shapes["visual"]["patch_embed"]["kernel"].shape == (1176, 1280)


def test_sections_stand_one_after_the_other():
    assert sectioned_axes((16, 24, 24)) == (0,) * 16 + (1,) * 24 + (2,) * 24


REFUSED = {
    "sliding window": ({"use_sliding_window": True}, {}, "config.json use_sliding_window: only attention to all"),
    "layer types": ({"layer_types": ["sliding_attention"]}, {}, "use_sliding_window"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, {}, "rope type 'yarn'"),
    "section": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 16]}},
        {},
        r"mrope_section \(24, 20, 16\)",
    ),
    "act": ({"hidden_act": "gelu"}, {}, "text hidden_act: only 'silu'"),
    "heads": ({"num_attention_heads": 27, "head_dim": 128}, {}, "27 heads of 128 must fill hidden_size 3584"),
    "key heads": ({"num_key_value_heads": 3}, {}, "28 heads are not a multiple of 3"),
    "missing": ({"rms_norm_eps": None}, {}, "config.json has no 'rms_norm_eps'"),
    "tower act": ({}, {"hidden_act": "gelu"}, "vision_config.hidden_act: only '(quick_gelu|silu)'"),
    "tower heads": ({}, {"num_heads": 7}, "vision width 1280 is not a multiple of 4 x 7"),
}
REFUSED_2_5 = {
    "output": ({}, {"out_hidden_size": 2048}, "output width 2048 differs from hidden_size 3584"),
    "blocks": ({}, {"fullatt_block_indexes": [7, 32]}, "reach beyond the 32 blocks"),
    "window": ({}, {"window_size": 14}, "window_size 14 is smaller than one visual token"),
    "seconds": ({}, {"tokens_per_second": None}, "vision_config has no 'tokens_per_second'"),
}
CASES = [(model, *case) for model in FLAT for case in REFUSED.values()]
CASES += [("qwen2_5_vl", *case) for case in REFUSED_2_5.values()]


@pytest.mark.parametrize(("model_type", "text", "seen", "message"), CASES)
def test_what_is_not_computed_is_refused(model_type, text, seen, message):
    hf = flat(model_type)
    hf |= text
    hf["vision_config"] |= seen
    for section in (hf, hf["vision_config"]):
        for key in [key for key, value in section.items() if value is None]:
            del section[key]
    with pytest.raises(ConfigError, match=message):
        config_from_hf(hf)
