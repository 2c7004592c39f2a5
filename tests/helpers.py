"""Files that a test model folder needs beside its weights: a small tokenizer, the chat template, the image settings."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# In this order at the end of the vocabulary; with 512 tokens the first four are the ids of tests/tiny.py (500..503).
SPECIAL_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_pad|>",
)
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards describe what they see in each picture and then "
    "answer the question about rows columns digits colours animals people streets and numbers one by one"
)
_SPLIT = (  # the published pre-tokenisation of Qwen2 and later
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: str | Path, vocab_size: int = 512, **preprocessor: Any) -> dict[str, int]:
    """Writes a byte-level BPE with Qwen's special tokens, a chat template and Qwen3-VL image settings.

    Args:
      folder: made when missing; existing files of the same names are replaced, config.json is left alone.
      vocab_size: tokens in all; the last twelve are SPECIAL_TOKENS and PLAIN_ADDED_TOKENS.
      **preprocessor: keys that replace those of preprocessor_config.json, e.g. `size={...}` or `patch_size=14`.

    Returns:
      The ids of the special tokens by their text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _bpe(vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS))
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False) for text in PLAIN_ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = importlib.resources.files("jaxmem") / "assets" / "chat_template.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    _write(folder / "tokenizer_config.json", _tokenizer_config())
    _write(folder / "preprocessor_config.json", _preprocessor_config() | preprocessor)
    ids = {text: tokenizer.token_to_id(text) for text in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)}
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return ids


QWEN2_TEMPLATE = """{#- Qwen2-VL's format: a system turn by default, media as one placeholder each. -#}
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) %}
        {%- if part.type == 'text' %}{{ part.text }}
        {%- else %}{{ '<|vision_start|><|' ~ part.type ~ '_pad|><|vision_end|>' }}{% endif %}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
QWEN2_PIXELS = {  # a released preprocessor_config.json, with a pixel range that suits small test images
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {},
    "min_pixels": 28 * 28,
    "max_pixels": 256 * 256,
    "patch_size": 14,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_qwen2_tokenizer(folder: str | Path, **preprocessor: Any) -> dict[str, int]:
    """The same with the chat template and the image settings of Qwen2-VL and Qwen2.5-VL."""
    ids = write_tokenizer(folder, **(QWEN2_PIXELS | preprocessor))
    (Path(folder) / "chat_template.jinja").write_text(QWEN2_TEMPLATE, encoding="utf-8")
    return ids


def _bpe(size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly `size` tokens, trained on a fixed text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprstvw", "aeiou")]
    pairs = " ".join("".join(pair) for pair in itertools.product(syllables, syllables))
    tokenizer.train_from_iterator([_WORDS] * 50 + ["user\nassistant\nsystem\n.?!,: \n\n"] * 50 + [pairs], trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    """The keys of a released Qwen3-VL tokenizer_config.json that matter."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 262_144,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
    }


def _preprocessor_config() -> dict[str, Any]:
    """A released Qwen3-VL preprocessor_config.json with a pixel range that suits small test images."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
