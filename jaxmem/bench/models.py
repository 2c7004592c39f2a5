"""Random models and prompts of a stated size, for benches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.example import Example
from jaxmem.data.positions import mrope_positions, patch_tables


def backbone(layers: int, width: int, mlp_width: int, heads: int, kv_heads: int, vocab: int) -> BackboneConfig:
    """A Qwen3-VL with heads of 64 and a small vision tower."""
    text = TextConfig(layers, width, mlp_width, heads, kv_heads, 64, vocab, rope_section=(12, 10, 10))
    vision = VisionConfig(6, 256, 1024, 4, width, (1, 3, 5), table_side=16)
    return BackboneConfig("qwen3_vl", text, vision, vocab - 4, vocab - 3, vocab - 2, vocab - 1)


def hf_config(config: BackboneConfig) -> dict[str, Any]:
    """The `config.json` of a Qwen3-VL backbone: what `qwen3_vl.config_from_hf` reads."""
    t, v = config.text, config.vision
    rope = {"rope_type": "default", "rope_theta": t.rope_theta, "mrope_section": list(t.rope_section)}
    text = {
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": t.layers,
        "hidden_size": t.width,
        "intermediate_size": t.mlp_width,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "vocab_size": t.vocab,
        "rms_norm_eps": t.norm_eps,
        "max_position_embeddings": t.max_positions,
        "rope_parameters": {**rope, "mrope_interleaved": True},
        "tie_word_embeddings": t.tied,
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": v.depth,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_width,
        "num_heads": v.heads,
        "out_hidden_size": v.out_width,
        "deepstack_visual_indexes": list(v.taps),
        "patch_size": v.patch_size,
        "temporal_patch_size": v.temporal_patch_size,
        "spatial_merge_size": v.merge_size,
        "num_position_embeddings": v.table_side**2,
    }
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    ids = {f"{name}_id": getattr(config, name) for name in names}
    outer = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "float32"}
    return {**outer, "text_config": text, "vision_config": vision, "tie_word_embeddings": t.tied, **ids}


def prompts(config: BackboneConfig, rows: int, grid: tuple[int, int], text: int) -> Batch:
    """`rows` random prompts of one image of `grid` patches and `text` words, without padding."""
    examples = [prompt(config, (grid,), text, seed) for seed in range(rows)]
    return collate(examples, Buckets((len(examples[0]),), (grid[0] * grid[1],)))


def prompt(config: BackboneConfig, grids: Sequence[tuple[int, int]], text: int, seed: int, between: int = 4) -> Example:
    """A random prompt: each image of `grids` patches behind some words, `between` of them or, of the first, 4; and the
    rest of the `text` words behind the last image."""
    rng, seen = np.random.default_rng(seed), config.vision
    tables = patch_tables([(1, *grid) for grid in grids], seen.table_side, seen.merge_size)
    words = lambda count: rng.integers(0, config.text.vocab - 8, count).tolist()  # noqa: E731
    tokens, blocks, places = [], [], []
    for grid in grids:
        tokens += [*words(between if blocks else 4), config.vision_start_token]
        blocks.append((len(tokens), (1, *grid)))
        cells = grid[0] * grid[1] // seen.merge_unit
        places += range(len(tokens), len(tokens) + cells)
        tokens += [*[config.image_token] * cells, config.vision_end_token]
    tokens += words(text - 4)
    visual = np.full(len(tokens), -1, np.int32)
    visual[places] = np.arange(len(places))
    return Example(
        tokens=np.array(tokens, np.int32),
        positions=mrope_positions(len(tokens), blocks, seen.merge_size),
        loss_mask=(np.arange(len(tokens)) > places[-1] + 1).astype(np.float32),
        visual_rows=visual,
        patches=rng.normal(size=(len(tables.segments), seen.patch_dim)).astype(np.float32),
        patch_segments=tables.segments,
        patch_coords=tables.coords,
        patch_table=tables.table,
        patch_weights=tables.weights,
    )
