"""Settings of Vision Remember: what follows from a backbone, how many parameters there are, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest

from jaxmem import model
from jaxmem.backbones import registry
from jaxmem.backbones.vision import Cells
from jaxmem.data.batching import collate
from jaxmem.errors import ConfigError, DataError
from jaxmem.memory import vision_remember
from tests.memory import vision_world as v
from tests.memory import world as w

D, W, INNER, HEADS, LEVELS, RATIO = 1536, 1024, 1024, 16, 3, 2  # Qwen2-1.5B behind CLIP-ViT-L/14-336


def backbone_of(layers: int = 28, tower: str = "clip", aspect: str = "anyres", **projector: Any) -> Any:
    """LLaVA-NeXT with a decoder of Qwen2-1.5B's width and a published tower."""
    text = {
        "model_type": "qwen2", "hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_936, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }  # fmt: skip
    sizes = {"hidden_size": W, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    sizes |= {"image_size": 336, "patch_size": 14}
    if tower == "siglip":
        sizes |= {"hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304, "image_size": 384}
    side = sizes["image_size"]
    onevision = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    return registry.config_from_hf(
        {
            "model_type": "llava_next",
            "text_config": text,
            "vision_config": {"model_type": f"{tower}_vision_model", **sizes},
            "image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
            "image_token_index": 151_646,
            "vision_aspect_ratio": aspect,
            "projector": {"name": "avgpool", "ratio": RATIO, **projector},
            **onevision,
        }
    )


def shapes(config: Any) -> Any:
    return jax.eval_shape(lambda: vision_remember.init(jax.random.key(0), config))


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def norm(width: int) -> int:
    """Scale and bias."""
    return 2 * width


def cross(features: int) -> int:
    """Query, key, value and output maps, the output's bias, two norms, a bias per head and place, a gate."""
    maps = D * INNER + 2 * features * INNER + INNER * D
    return maps + D + norm(D) + norm(features) + HEADS * RATIO**2 + 1


BIDIRECTIONAL = 4 * D * INNER + D + norm(D) + 1
TEXT = norm(D)


def test_parameters_of_v1_at_full_size():
    tree = shapes(vision_remember.create(backbone_of()))
    each = size(tree["blocks"]["cross"]) // 3
    assert size(tree["blocks"]) == 3 * each and each == cross(LEVELS * W) == 9_448_001
    assert size(tree["fusion"]) == LEVELS * norm(W)
    assert size(tree) == 3 * 9_448_001 + 6_144 == 28_350_147


def test_parameters_of_v2_at_full_size():
    tree = shapes(vision_remember.create(backbone_of(), preset="vr_v2"))
    of = {part: size(leaves) // 3 for part, leaves in tree["blocks"].items()}
    assert of == {"cross": cross(W), "bidirectional": BIDIRECTIONAL, "text": TEXT}
    assert (of["cross"], of["bidirectional"], of["text"]) == (5_249_601, 6_296_065, 3_072)
    assert math.prod(tree["fusion"]["kernel"].shape) == LEVELS * W * W == 3_145_728
    assert size(tree) == 3 * (5_249_601 + 6_296_065 + 3_072) + 3_145_728 + 6_144 == 37_798_086


def test_defaults_are_the_published_ones():
    v1, v2 = (vision_remember.create(backbone_of(), preset=preset) for preset in v.PRESETS)
    assert v1.layers == v2.layers == (3, 7, 11)  # the outputs of layers 4, 8 and 12
    assert v1.levels == v2.levels == (13, 18, 23)
    assert (v1.features, v2.features) == (3072, 1024)
    assert (v1.inner, v1.heads, v1.layer.head_dim, v1.layer.keys, v1.margin) == (1024, 16, 64, 4, 0)
    assert not (v1.bidirectional or v1.asks or v1.ffn or v2.ffn) and v2.bidirectional and v2.asks
    assert v2.order == "self_then_cross" and v2.text_token == "question_mean" and v1.saliency == "none"
    assert v1.cells == Cells(side=24, ratio=2, first=1) and v1.tile_patches == 576
    siglip = vision_remember.create(backbone_of(tower="siglip"))
    assert siglip.levels == (15, 20, 26) and siglip.cells == Cells(27, 2, 1) and siglip.features == 3 * 1152


@pytest.mark.parametrize(
    ("layers", "known"), [(28, (3, 7, 11)), (24, (2, 6, 9)), (32, (4, 8, 13)), (3, (0,)), (6, (0, 1, 2)), (1, (0,))]
)
def test_layers_are_in_proportion(layers, known):
    found = vision_remember.create(backbone_of(layers)).layers
    assert found == known == tuple(sorted({max(1, round(layers * part / 7)) - 1 for part in (1, 2, 3)}))


def test_windows_and_levels_of_other_projectors_and_towers():
    mlp = vision_remember.create(backbone_of(name="mlp", ratio=1))
    assert mlp.cells == Cells(24, 1, 1) and mlp.margin == 1 and mlp.layer.keys == 9
    assert vision_remember.create(backbone_of(name="ldpv2", queries=144, ratio=1)).cells == Cells(24, 2, 1)
    wide = vision_remember.create(backbone_of(ratio=3), halo=1)
    assert wide.layer.keys == 25
    qwen = v.config_of(v.qwen("qwen2_5_vl"), "vr_v2")
    assert qwen.cells == Cells(0, 2) and qwen.tile_patches == 0 and qwen.levels == (2, 3, 4)
    assert v.config_of(v.qwen("qwen3_vl"), levels=(-1, 1)).levels == (-1, 1)


def test_projectors_without_a_grid_need_whole_tiles():
    for settings in ({"name": "resampler"}, {"name": "ldpv2", "queries": 121}):
        backbone = backbone_of(**{"ratio": 1, **settings})
        with pytest.raises(ConfigError, match=r"has no grid of tokens.*local=False"):
            vision_remember.create(backbone)
        config = vision_remember.create(backbone, local=False)
        assert config.cells.first == 1 and config.layer.keys == 0 and config.layer.positions == "none"
        assert "position" not in shapes(config)["blocks"]["cross"]


FAULTS = [
    ({"preset": "vr_v3"}, "no preset 'vr_v3'; it has vr_v1, vr_v2"),
    ({"window": 3}, "no setting window; it has .*halo"),
    ({"layers": ()}, r"layers \(\) must be different and within 0..27"),
    ({"layers": (28,)}, r"layers \(28,\) must be different and within 0..27"),
    ({"layers": (3, 3)}, r"layers \(3, 3\) must be different"),
    ({"levels": ()}, "none cannot be given"),
    ({"levels": (13, 25)}, r"\[25\] cannot be given; 24 blocks have 0 .* to 24"),
    ({"levels": (24, -1)}, r"levels \(24, -1\): each can be looked at once"),
    ({"heads": 5}, "inner 1024 is not a multiple of 5 heads"),
    ({"heads": 0}, "inner 1024 is not a multiple of 0 heads"),
    ({"halo": -1}, "halo -1 must not be negative"),
    ({"order": "both"}, "'vision_remember.order' is 'both'; valid: 'self_then_cross', 'cross_then_self'"),
    ({"text_token": "answer_mean"}, "'vision_remember.text_token' is 'answer_mean'; valid: 'question_mean'"),
    ({"fusion": "sum"}, "'vision_remember.fusion' is 'sum'; valid"),
    ({"gate": "open"}, "'vision_remember.gate'"),
    ({"width": 64}, "width 64 must be the backbone's, width 1536"),
    ({"tile_patches": 0}, "tile_patches 0 must be the backbone's"),
    ({"name": "memory"}, "name 'memory' must be the backbone's"),
    ({"local": False, "saliency": "bias"}, "whole tiles have no windows, so leave out .*saliency='bias'"),
    ({"local": False, "impl": "absorbed"}, "whole tiles have no windows"),
    ({"local": False, "positions": "embedding"}, "whole tiles have no windows"),
]


@pytest.mark.parametrize(("settings", "message"), FAULTS)
def test_faults_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        vision_remember.create(backbone_of(), **settings)


def test_check_05_a_window_of_one_patch_is_refused():
    with pytest.raises(ConfigError, match=r"halo 0: a window of one patch makes every weight 1; set halo=1 \(3x3"):
        vision_remember.create(backbone_of(name="mlp", ratio=1), halo=0)
    assert vision_remember.create(backbone_of(name="mlp", ratio=1), halo=0, local=False).local is False


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="'anyres_max_9' scales grids of tokens.*set it to 'anyres'"):
        vision_remember.create(backbone_of(aspect="anyres_max_9"))
    decoder = dataclasses.replace(backbone_of(), vision=None, model_type="qwen2")
    with pytest.raises(ConfigError, match="needs a vision tower, and qwen2 is a decoder alone"):
        vision_remember.create(decoder)
    qwen = v.qwen("qwen3_vl")
    with pytest.raises(ConfigError, match="patches lie in blocks, not in square tiles; leave it at 0"):
        v.config_of(qwen, halo=1)
    with pytest.raises(ConfigError, match=r"levels \(0, 2\): of this tower the outputs of blocks 1 to 3 are kept"):
        v.config_of(qwen, levels=(0, 2))
    with pytest.raises(ConfigError, match=r"\[4\] cannot be given; 3 blocks"):
        v.config_of(qwen, levels=(4,))


def test_a_question_that_is_not_marked_is_missed():
    backbone, chat = v.llava(), v.CHATS["square"]
    config = v.config_of(backbone, "vr_v2")
    plain = collate([backbone.processor.encode(chat)], v.BUCKETS)
    assert not backbone.processor.mark_question and plain.question is None
    with pytest.raises(ConfigError, match=r"reads the question and the batch does not mark it: .*mark_question"):
        w.hidden(v.spec_of(backbone, config), backbone.base, v.memory_of(config), plain)
    for other in (v.config_of(backbone, "vr_v2", text_token="none"), v.config_of(backbone)):
        assert not other.asks
        jax.eval_shape(
            lambda memory, other=other: model.hidden_states(v.spec_of(backbone, other), backbone.base, memory, plain),
            v.memory_of(other),
        )
    with pytest.raises(DataError, match="some rows mark their question and some do not"):
        collate([backbone.processor.encode(chat), v.encoded(backbone, chat)], v.BUCKETS)
    asking = backbone.attach("vision_remember", preset="vr_v2", **v.SMALL)
    assert asking.processor.mark_question and asking.batch([chat], buckets=v.BUCKETS).question.any()
    with pytest.raises(DataError, match="chat 1 has no text in its first user turn, and a memory reads the question"):
        asking.batch([chat, [{"role": "user", "content": [v.SQUARE]}]])
