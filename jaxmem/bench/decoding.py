"""`jaxmem bench decode`: greedy generation against transformers on the same weights, and the price of a PVM.

A random Qwen3-VL of about 100 M parameters in float32, 8 prompts with one image each, 128 new tokens per prompt;
prefill and vision tower are included on both sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmem.backbones import qwen3_vl
from jaxmem.backbones.batch import Batch
from jaxmem.backbones.config import BackboneConfig
from jaxmem.bench.models import backbone, hf_config, prompts
from jaxmem.bench.run import Comparison, alternate, median
from jaxmem.checkpoints.huggingface import save_backbone
from jaxmem.errors import ConfigError
from jaxmem.memory import pvm
from jaxmem.model import Spec, init_memory
from jaxmem.sampling.generate import generate
from jaxmem.sampling.logits import SamplerConfig

ROWS, GRID, TEXT, NEW = 8, (16, 16), 48, 128


def run(
    config: BackboneConfig | None = None, rows: int = ROWS, new: int = NEW, runs: int = 5, peer_runs: int = 3
) -> list[Comparison]:
    """Measures both comparisons.

    Args:
      config: the backbone; 12 layers of width 768 by default.
      rows: prompts per batch.
      new: tokens per prompt.
      runs: rounds of PVM on against off.
      peer_runs: rounds against transformers.

    Raises:
      ConfigError: torch is not installed.
    """
    config = config or backbone(layers=12, width=768, mlp_width=2304, heads=12, kv_heads=4, vocab=16_384)
    base = jax.jit(lambda key: qwen3_vl.init(key, config))(jax.random.key(0))
    batch, settings = prompts(config, rows, GRID, TEXT), SamplerConfig(max_new_tokens=new)
    spec, tokens = Spec(config), rows * new

    def ours(spec: Spec, memory: Any) -> Callable[[], np.ndarray]:
        return lambda: generate(spec, base, memory, batch, settings).tokens

    peer = _transformers(config, base, batch, new)
    agreement = float(np.mean(ours(spec, {})() == peer()))
    seconds = alternate({"ours": ours(spec, {}), "peer": peer}, peer_runs)
    rates = {side: [tokens / s for s in times] for side, times in seconds.items()}
    mine, theirs = median(rates["ours"]), median(rates["peer"])
    label = f"greedy decode, {_millions(base)} M, batch {rows} (same tokens: {agreement:.1%})"
    against = Comparison(label, "tokens/s", mine, theirs, mine / theirs, "ours / transformers >= 1.5", rates)
    return [against, _price(spec, ours, tokens, runs)]


def _price(spec: Spec, ours: Callable, tokens: int, runs: int) -> Comparison:
    """PVM on against off; its latent width is an eighth of the model's, as in the paper's 8B."""
    text = spec.backbone.text
    latent = -(-text.width // (8 * text.head_dim)) * text.head_dim
    with_memory = Spec(spec.backbone, (pvm.create(spec.backbone, latent=latent, gate=0.1),))
    memory = init_memory(jax.random.key(1), with_memory)
    seconds = alternate({"ours": ours(with_memory, memory), "peer": ours(spec, {})}, runs)
    rates = {side: [tokens / s for s in times] for side, times in seconds.items()}
    on, off = median(rates["ours"]), median(rates["peer"])
    return Comparison(
        f"PVM (latent {latent}) on against off", "tokens/s", on, off, off / on - 1, "share of time added <= 0.02", rates
    )


def _millions(base: Any) -> int:
    return round(sum(leaf.size for leaf in jax.tree.leaves(base)) / 1e6)


def _transformers(config: BackboneConfig, base: Any, batch: Batch, new: int) -> Callable[[], np.ndarray]:
    """The same weights and prompts in torch: a function that generates [B, new] tokens greedily."""
    try:
        import torch
        from transformers import Qwen3VLForConditionalGeneration
    except ImportError as error:
        raise ConfigError('bench decode compares with transformers in torch: pip install "jaxmem[torch]"') from error
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(folder, base, config, hf_config=hf_config(config))
        model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows, width = batch.tokens.shape
    inputs = {
        "input_ids": torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
        "attention_mask": torch.ones(rows, width, dtype=torch.long),
        "mm_token_type_ids": torch.tensor(np.asarray(batch.is_visual), dtype=torch.int32),
        "pixel_values": torch.tensor(np.asarray(batch.patches)).flatten(0, 1),
        "image_grid_thw": torch.tensor([(1, *GRID)] * rows),
    }
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def work() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(**inputs, **options, eos_token_id=None)[:, width:].numpy()

    return work
