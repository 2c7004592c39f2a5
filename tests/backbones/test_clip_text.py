"""The texts of CLIP and SigLIP against transformers in torch, by both rules of where a text is read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmem.backbones import clip, clip_text
from jaxmem.checkpoints import clip_folder
from jaxmem.errors import DataError
from tests.backbones.clip_folder import END, LENGTH, write
from tests.backbones.test_clip import close, pixels, tensor

read = jax.jit(clip_text.forward, static_argnums=(0, 3))
embed_images, embed_texts = (jax.jit(one, static_argnums=0) for one in (clip.embed_images, clip.embed_texts))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Kind to (torch model, our config, our parameters)."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        model = write(kind, folder)
        return model, *clip_folder.load(folder)

    return make


def texts(kind):
    """Token rows of unequal length, padded on the right."""
    draw = np.random.default_rng(1)
    if kind == "siglip":
        rows = [[*draw.integers(2, 11, size), 0] for size in (3, LENGTH - 1, 1)]
        return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)
    rows = [[END - 1, *draw.integers(0, 500, size), END] for size in (3, LENGTH - 2, 0)]
    return np.array([row + [END] * (LENGTH - len(row)) for row in rows], np.int32)


def assert_texts_equal(model, config, params, tokens):
    with torch.no_grad():
        theirs = model.text_model(torch.from_numpy(tokens).long(), output_hidden_states=True)
        pooled = theirs.pooler_output
        pooled = model.text_projection(pooled) if config.family == "clip" else pooled
    ours = read(config.text, params["text"], tokens, tuple(range(4)))
    for mine, its in zip(ours, theirs.hidden_states, strict=True):
        close(mine, its)
    close(clip_text.pool(config.text, params["text"], tokens, ours[-1]), pooled)
    unit = embed_texts(config, params, tokens)
    close(unit, pooled / pooled.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_equal_torch(loaded, kind):
    model, config, params = loaded(kind)
    assert_texts_equal(model, config, params, texts(kind))
    assert config.text.end_token == (END if kind == "clip" else None)


def test_texts_are_read_at_the_first_end_token_or_the_highest_id(tmp_path):
    """The legacy end token 2 stands for the highest id, wherever the token 2 itself lies."""
    tokens = texts("clip")
    tokens[:, 2] = 2
    old = write("clip", tmp_path / "old", text_eos_token_id=2)
    config, params = clip_folder.load(tmp_path / "old")
    assert config.text.end_token == clip_text.LEGACY_END
    assert_texts_equal(old, config, params, tokens)
    low = write("clip", tmp_path / "low", text_eos_token_id=7)  # an end token that is not the highest id
    tokens[:, 4] = 7
    config, params = clip_folder.load(tmp_path / "low")
    assert_texts_equal(low, config, params, tokens)


def test_both_towers_together_equal_the_whole_model(loaded):
    model, config, params = loaded("siglip")
    tokens = texts("siglip")
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=tensor(pixels()))
    images, said = embed_images(config, params, pixels()), embed_texts(config, params, tokens)
    logits = jnp.exp(params["logit_scale"]) * said @ images.T + params["logit_bias"]
    close(logits, theirs.logits_per_text)


def test_texts_longer_than_the_table_are_refused(loaded):
    _, config, params = loaded("clip")
    with pytest.raises(DataError, match=r"tokens \(1, 13\) are not \[texts, at most 12\]; cut the texts"):
        clip_text.forward(config.text, params["text"], np.zeros((1, 13), np.int32))
