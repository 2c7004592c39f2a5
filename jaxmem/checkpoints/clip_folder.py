"""CLIP and SigLIP folders to our trees: both towers, or a vision tower alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmem.backbones import clip
from jaxmem.backbones.clip_config import ClipConfig, config_from_hf
from jaxmem.checkpoints import weights
from jaxmem.checkpoints.clip_names import VISION, table
from jaxmem.checkpoints.huggingface import load_tree
from jaxmem.errors import CheckpointError, ConfigError

_COUNTERS = r"position_ids$"  # 0, 1, 2, ... as integers, in files of early releases


def load(folder: str | Path, *, dtype: Any = None, sharding: Any = None) -> tuple[ClipConfig, Any]:
    """A CLIP or SigLIP from a Hugging Face folder: both towers, or a vision tower alone.

    Args:
      folder: with config.json and safetensors; of OpenAI's folders some hold pickled weights alone, which are refused.
      dtype: of the leaves, and so of the computation; None keeps what is stored.
      sharding: as in `huggingface.load_backbone`.

    Returns:
      The configuration, and the tree of `clip.init`.

    Raises:
      CheckpointError: no such folder, no weights, or missing, unexpected and wrongly shaped tensors in one message.
      ConfigError: another model type, or a setting that is not computed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        config = config_from_hf(weights.read_json(folder / "config.json"))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    tensors = weights.open_weights(folder, ignore=_COUNTERS)
    bare = config.text is None and not any(name.startswith(VISION) for name in tensors)
    rules = table(config, "" if bare else VISION)
    return config, load_tree(folder, tensors, rules, clip.shapes(config), dtype=dtype, sharding=sharding)
