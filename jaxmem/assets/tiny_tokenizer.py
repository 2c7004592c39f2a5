"""The tokenizer of the tiny backbone: Qwen2's byte-level BPE with the vocabulary of the digit boards.

Same normaliser, same pre-tokeniser and same special tokens as Qwen3-VL; only the merges are few. Every filler word,
cell name and digit is one token, with and without a leading space where text can have one.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxmem.data.boards import CELLS, QUESTION, WORDS

PRE_TOKENISER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pattern: numbers fall into digits, a word keeps the one character before it."""

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Qwen's control tokens, in Qwen's order."""

PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Qwen's other added tokens, which decoding shows."""


def train_tokenizer() -> Tokenizer:
    """Trains the merges until every word of a board is one token; the result is always the same.

    Returns:
      A `tokenizers.Tokenizer` with ids 0..255 for bytes, then merges, then the added tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENISER), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # not reached: training ends when nothing is left to merge
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return tokenizer


def _corpus() -> list[str]:
    """Every word alone and after a space, a few times each."""
    words = [*WORDS, *CELLS, *QUESTION.split(), "user", "assistant", "system"]
    return [text for word in words for text in (f"{word} {word}",) * 4] + ["1=2 #3"] * 4


def tokenizer_config() -> dict[str, Any]:
    """`tokenizer_config.json` as Qwen3-VL has it: no BOS, <|im_end|> ends a turn, <|endoftext|> pads."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "additional_special_tokens": list(SPECIAL[1:]),
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
