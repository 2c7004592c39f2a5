"""The fast way from boards to batches equals the processor's, and the tokenizer makes one token of every word."""

import dataclasses

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxmem.assets import TINY
from jaxmem.assets.board_batches import BoardBatcher
from jaxmem.assets.tiny_tokenizer import train_tokenizer
from jaxmem.backbones.registry import config_from_hf
from jaxmem.checkpoints.huggingface import read_config
from jaxmem.data.batching import Buckets, collate
from jaxmem.data.boards import CELLS, WORDS, BoardDataset, board_tokens
from jaxmem.data.loading import load_processor

CONFIG = config_from_hf(read_config(TINY))


@pytest.mark.parametrize("blind", [False, True])
def test_batches_equal_the_processors(blind):
    boards = list(BoardDataset("train", k=(0, 1, 30), n=(1, 4, 16), size=8))
    processor = load_processor(TINY, CONFIG)
    examples = [processor.encode(board.messages) for board in boards]
    wanted = collate(examples, Buckets((160,), (64,)), processor.pad_token, blind=[blind] * len(boards))
    got = BoardBatcher(Tokenizer.from_file(str(TINY / "tokenizer.json")), CONFIG)(boards, 160, blind)
    for field in dataclasses.fields(got):
        ours, theirs = getattr(got, field.name), getattr(wanted, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is None:  # this backbone has no windows
            continue
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, field.name
        if field.name != "patch_table":  # entries without weight may name any row
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=field.name)
    table = np.eye(CONFIG.vision.table_side**2)
    dense = [np.einsum("bpcw,bpc->bpw", table[b.patch_table], b.patch_weights) for b in (got, wanted)]
    np.testing.assert_allclose(*dense, atol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)


def test_too_narrow_a_batch_is_an_error():
    batcher = BoardBatcher(train_tokenizer(), CONFIG)
    with pytest.raises(ValueError, match="the batch has 40"):
        batcher(list(BoardDataset(size=1)), 40)


def test_another_tower_is_refused():
    other = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, table_side=48))
    with pytest.raises(ValueError, match="side 8"):
        BoardBatcher(train_tokenizer(), other)


def test_every_word_is_one_token_and_training_is_repeatable():
    tokenizer = train_tokenizer()
    assert tokenizer.to_str() == train_tokenizer().to_str()
    assert tokenizer.to_str() == Tokenizer.from_file(str(TINY / "tokenizer.json")).to_str()
    for word in (*WORDS, *CELLS, "Read", "user", "assistant", "system"):
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(" " + word)) == 1, word
    assert len(set(board_tokens(tokenizer).cells)) == 32


def test_the_tokenizer_loads_in_transformers_and_knows_qwens_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == CONFIG.image_token
    assert len(tokenizer) <= CONFIG.text.vocab
    text = "<|im_start|>user\nrain Read and add C<|im_end|>\nC7=7 #7<think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "<|im_end|>" not in tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
