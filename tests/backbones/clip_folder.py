"""Tiny random CLIPs and SigLIPs in Hugging Face folders with all their files, made by transformers itself.

Images have 31 pixels per side and patches 7, so that three pixels of each row belong to no patch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from tests.tiny import _save

SIDE, LENGTH, PROJECTION = 31, 12, 18
VISION = {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 5}
VISION |= {"image_size": SIDE, "patch_size": 7}
TEXT = {"hidden_size": 28, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": LENGTH}
_BYTES = list(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_MERGES = [("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>")]
_VOCAB = [*_BYTES, *(byte + "</w>" for byte in _BYTES), *map("".join, _MERGES), "<|startoftext|>", "<|endoftext|>"]
END, VOCAB = len(_VOCAB) - 1, len(_VOCAB)
WORDS = ["the", "dog", "cat", "a", "sees", "of", "picture", "on", "grass"]
SIGLIP_VOCAB = ["</s>", "<unk>", *WORDS]


def write(kind: str, folder: Path, *, seed: int = 0, **settings: Any) -> Any:
    """A model of one kind with random weights in a folder.

    Args:
      kind: "clip", "siglip", "clip_vision", "clip_vision_projected" or "siglip_vision".
      folder: gets config.json and model.safetensors.
      seed: of the weights.
      **settings: `vision_` and `text_` settings by their names in config.json, `dtype`, `max_shard_size`.

    Returns:
      The torch model, in eval mode; every parameter is random, norms and biases too.
    """
    part = lambda name: {key[len(name) :]: value for key, value in settings.items() if key.startswith(name)}  # noqa: E731
    seen, said = VISION | part("vision_"), TEXT | part("text_")
    if kind == "clip":
        said = {"vocab_size": VOCAB, "eos_token_id": END, "bos_token_id": END - 1, "pad_token_id": END} | said
        config = transformers.CLIPConfig(text_config=said, vision_config=seen, projection_dim=PROJECTION)
        model = transformers.CLIPModel(config)
    elif kind == "siglip":
        said = {"vocab_size": len(SIGLIP_VOCAB), "projection_size": 30, "pad_token_id": 0, "eos_token_id": 0} | said
        said |= {"bos_token_id": 0}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=said, vision_config=seen))
    elif kind == "siglip_vision":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**seen))
    else:
        config = transformers.CLIPVisionConfig(**seen, projection_dim=PROJECTION)
        projected = kind == "clip_vision_projected"
        model = (transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel)(config)
    return _save(model, folder, settings.get("dtype", "float32"), seed, settings.get("max_shard_size"))


def tower_of(model: Any) -> torch.nn.Module:
    """The vision tower of any of these models."""
    return getattr(model, "vision_model", model)


def write_settings(kind: str, folder: Path, **changed: Any) -> Any:
    """A tokenizer and preprocessor_config.json; `changed` replaces image settings. Returns transformers' processor."""
    family = kind.split("_")[0]
    name = "CLIPImageProcessorPil" if family == "clip" else "SiglipImageProcessorPil"
    sizes = {"size": {"height": SIDE, "width": SIDE}}
    if family == "clip":
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = getattr(transformers, name)(**(sizes | changed))
    processor.save_pretrained(folder)
    if "vision" not in kind:
        (_clip_tokenizer if family == "clip" else _siglip_tokenizer)().save_pretrained(folder)
    return processor


def _clip_tokenizer() -> Any:
    """CLIP's own byte-level BPE with a handful of merges."""
    return transformers.CLIPTokenizer(vocab={token: id_ for id_, token in enumerate(_VOCAB)}, merges=_MERGES)


def _siglip_tokenizer() -> Any:
    """Whole words, an end token behind them, and no mask, as SigLIP's."""
    words = tokenizers.models.WordLevel({word: id_ for id_, word in enumerate(SIGLIP_VOCAB)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(words)
    fast.normalizer = tokenizers.normalizers.Lowercase()
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
