"""The names and shapes of CoMEM's tensors at the sizes of the published models (acceptance check 33)."""

import math
from typing import Any

import jax
import pytest

from jaxmem.backbones import registry
from jaxmem.checkpoints import comem_names
from jaxmem.checkpoints.qwen_names import FLAT
from jaxmem.checkpoints.table import expected
from jaxmem.memory import comem

FULL = {  # sizes of the published 7B models
    "qwen2_vl": ({"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584}, 326, 51_159_040),
    "qwen2_5_vl": (
        {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        358,
        51_824_640,
    ),
}


def test_check_33_names_and_shapes_of_the_published_q_former() -> None:
    wide, inner = (3584, 3584), (14336, 3584)
    norms = {
        f"{name}.{leaf}": (3584,)
        for name in ("norm_out", "layers.0.norm1", "layers.0.norm2", "layers.1.0")
        for leaf in ("weight", "bias")
    }
    listed = {
        "latents": (1, 8, 3584),
        **{f"{end}.weight": wide for end in ("proj_in", "proj_out")},
        **{f"{end}.bias": (3584,) for end in ("proj_in", "proj_out")},
        "layers.0.to_q.weight": wide,
        "layers.0.to_kv.weight": (7168, 3584),
        "layers.0.to_out.weight": wide,
        "layers.1.1.weight": inner,
        "layers.1.3.weight": inner[::-1],
        **norms,
    }
    config = comem.create(full("qwen2_5_vl"))
    shapes = jax.eval_shape(lambda: comem.init(jax.random.key(0), config))
    found = expected(comem_names.q_former(config.q_former), {"q_former": shapes["q_former"]})
    assert found == listed and len(found) == 18
    assert sum(map(math.prod, found.values())) == 179_895_296


def full(family: str) -> Any:
    """The published 7B backbone, by its sizes."""
    vision = {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return registry.config_from_hf(
        {
            "model_type": family,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "tie_word_embeddings": False,
            "vision_config": vision | FULL[family][0],
        }
    )


@pytest.mark.parametrize("family", FULL)
def test_the_published_adapters_are_expected_by_name(family: str) -> None:
    backbone = full(family)
    config = comem.create(backbone)
    shapes = {"encoder": jax.eval_shape(lambda: comem.init(jax.random.key(0), config))["encoder"]}
    released = comem_names.encoder(config, backbone, layout=FLAT)
    found, (_, modules, parameters) = expected(released, shapes), FULL[family]
    assert len(found) == 2 * modules and sum(map(math.prod, found.values())) == parameters
    assert found["visual.blocks.31.attn.qkv.lora_B.weight"] == (3840, 16)
    assert found["visual.merger.mlp.2.lora_A.weight"] == (16, 5120)
    assert found["model.layers.27.mlp.down_proj.lora_A.weight"] == (16, 18944)
    nested = expected(
        comem_names.table(config, backbone), jax.eval_shape(lambda: comem.init(jax.random.key(0), config))
    )
    assert len(nested) == len(found) + 18
    assert nested["memory.encoder.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"] == (3584, 16)
    assert nested["memory.knowledge_processor.layers.0.to_kv.weight"] == (7168, 3584)
