"""Embedding by a CLIP or SigLIP folder against transformers' own processor, tokenizer and model."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from jaxmem.data.images import ImageError
from jaxmem.errors import CheckpointError, ConfigError, DataError
from jaxmem.retrieval import clip_embedder
from jaxmem.retrieval.clip_embedder import ClipEmbedder
from tests.backbones.clip_folder import LENGTH, PROJECTION, edit, write, write_settings
from tests.retrieval.test_clip_pixels import PICTURES, noise

TEXTS = {
    "clip": ["a dog", "The CAT, on  grass!", "", "dogs and cats and birds over the sea", "7"],
    "siglip": ["a dog", "The cat on grass", "", "the dog sees the picture of the cat on the grass of a dog", "bird"],
}


@dataclasses.dataclass(frozen=True)
class Thing:
    id: str
    images: tuple = ()
    text: str | None = None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind to (folder, torch model, transformers' image processor, our embedder)."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        model = write(kind, folder)
        processor = write_settings(kind, folder)
        return folder, model, processor, ClipEmbedder(folder)

    return make


@torch.no_grad()
def torch_images(model, processor, pictures):
    pixels = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    found = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
    found = found.image_embeds if "image_embeds" in found else found.pooler_output
    return (found / found.norm(dim=-1, keepdim=True)).numpy()


@torch.no_grad()
def torch_texts(model, folder, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    found = model.get_text_features(**tokens).pooler_output
    return (found / found.norm(dim=-1, keepdim=True)).numpy()


@pytest.mark.parametrize("kind", ["clip", "siglip", "clip_vision", "clip_vision_projected", "siglip_vision"])
def test_images_equal_the_whole_pipeline_of_transformers(made, kind):
    _, model, processor, embedder = made(kind)
    found = embedder.images(list(PICTURES.values()))
    assert found.dtype == np.float32 and found.shape == (len(PICTURES), embedder.width)
    assert embedder.width == (PROJECTION if kind in ("clip", "clip_vision_projected") else 30)
    np.testing.assert_allclose(found, torch_images(model, processor, PICTURES.values()), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.ptp(found @ found.T) > 1e-3  # pictures differ


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_equal_the_whole_pipeline_and_cut_ones_are_counted(made, kind):
    folder, model, _, embedder = made(kind)
    with pytest.warns(UserWarning) as caught:
        found = embedder.texts(TEXTS[kind])
    lengths = [len(ids) for ids in transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[kind])["input_ids"]]
    cut = sum(length > LENGTH for length in lengths)
    assert 1 <= cut <= 2 and min(lengths) < LENGTH
    message = f"{cut} of 5 texts are longer than {LENGTH} tokens and were cut (the longest has {max(lengths)})"
    assert [message in str(one.message) for one in caught] == [True]
    assert found.dtype == np.float32 and found.shape == (5, embedder.width)
    np.testing.assert_allclose(found, torch_texts(model, folder, TEXTS[kind]), rtol=0, atol=1e-5)
    assert np.max(found @ found.T - np.eye(5)) < 0.9999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.texts([TEXTS[kind][0], "", "a cat"])


def test_the_sentencepiece_tokenizer_of_siglip(made, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    folder = shutil.copytree(made("siglip")[0], tmp_path / "spm")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    lines = iter(["the dog sees a cat", "a picture of the grass", "cats and dogs on the grass"] * 30)
    sizes = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    marks = {"pad_id": -1, "bos_id": -1, "eos_id": 1, "unk_id": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "spiece"), **sizes, **marks)
    unmasked = {"model_input_names": ["input_ids"]}  # as released: padding is seen
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), **unmasked)
    tokenizer.save_pretrained(folder)
    model = write("siglip", folder, text_vocab_size=len(tokenizer))
    texts = ["The dog, a CAT!", "grass"]
    np.testing.assert_allclose(ClipEmbedder(folder).texts(texts), torch_texts(model, folder, texts), rtol=0, atol=1e-5)


def test_batches_do_not_matter_and_few_programs_are_compiled(made):
    folder, _, _, embedder = made("siglip")
    pictures = [noise(20 + number, 50, seed=number) for number in range(23)]
    known, small = embedder.images(pictures), ClipEmbedder(folder, batch=9)
    before = clip_embedder._embed_images._cache_size()
    np.testing.assert_allclose(small.images(pictures), known, rtol=0, atol=1e-6)  # 9, 9, 5 as 8
    np.testing.assert_allclose(small.images(pictures[:1]), known[:1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(small.images(pictures[4:19]), known[4:19], rtol=0, atol=1e-6)  # 9, 6 as 8
    assert clip_embedder._embed_images._cache_size() - before <= 3
    assert embedder.images([]).shape == embedder.texts([]).shape == (0, 30)


def test_items_by_image_text_or_both(made):
    folder, *_, embedder = made("clip")
    one, two, three = (PICTURES[name] for name in ("wide", "tall", "grey"))
    items = [Thing("a", (one,), "a dog"), Thing("b", (two, three), "a cat")]
    seen, said = embedder.images([one, two, three]), embedder.texts(["a dog", "a cat"])
    pair = seen[1] + seen[2]
    by_image = np.stack([seen[0], pair / np.linalg.norm(pair)])
    np.testing.assert_allclose(embedder.embed(items), by_image, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ClipEmbedder(folder, mode="text").embed(items), said, rtol=0, atol=1e-6)
    both = (by_image + said) / np.linalg.norm(by_image + said, axis=1, keepdims=True)
    np.testing.assert_allclose(ClipEmbedder(folder, mode="mean").embed(items), both, rtol=0, atol=1e-6)
    np.testing.assert_allclose(embedder.embed([Thing("a", (one,))]), seen[:1], rtol=0, atol=1e-6)
    assert embedder.embed([]).shape == (0, PROJECTION)


def test_what_an_item_lacks_is_named(made, tmp_path):
    folder, *_, embedder = made("clip")
    good = Thing("q1", (PICTURES["wide"],), "a dog")
    with pytest.raises(DataError, match='item q2 has no image, which mode "image" needs; leave it out or'):
        embedder.embed([good, Thing("q2", (), "a cat")])
    for mode in ("text", "mean"):
        with pytest.raises(DataError, match=f'item q3 has no text, which mode "{mode}" needs'):
            ClipEmbedder(folder, mode=mode).embed([good, Thing("q3", (PICTURES["tall"],), "  ")])
    broken = tmp_path / "broken.png"
    PICTURES["large"].save(broken)
    broken.write_bytes(broken.read_bytes()[:3000])
    with pytest.raises(ImageError, match=rf"image 1 of item q4 \({broken}\): the file is truncated or corrupt"):
        embedder.embed([good, Thing("q4", (PICTURES["tall"], str(broken)))])
    with pytest.raises(ImageError, match="image 2: there is no file 'nowhere.png'"):
        embedder.images([PICTURES["tall"], PICTURES["wide"], "nowhere.png"])
    with pytest.raises(DataError, match="text 1 is None; texts are strings"):
        embedder.texts(["a", None])


def test_the_digest_tells_weights_and_settings_apart(made, tmp_path):
    folder, *_, embedder = made("clip")
    assert ClipEmbedder(folder, "bfloat16", mode="mean").digest == embedder.digest
    assert len(embedder.digest) == 64 and embedder.digest == embedder.digest.lower()
    found = {embedder.digest}

    def changed(name):
        copy = shutil.copytree(folder, tmp_path / name)
        yield copy
        found.add(ClipEmbedder(copy).digest)

    for copy in changed("same"):
        edit(copy / "config.json", transformers_version="4.0.0")
    assert found == {embedder.digest}
    for copy in changed("weights"):
        tensors = safetensors.torch.load_file(copy / "model.safetensors")
        tensors["logit_scale"] += 1e-3
        safetensors.torch.save_file(tensors, copy / "model.safetensors")
    for copy in changed("pixels"):
        edit(copy / "preprocessor_config.json", resample=2)
    for copy in changed("activation"):
        vision = dict(embedder_config(copy)["vision_config"], hidden_act="gelu")
        edit(copy / "config.json", vision_config=vision)
    for copy in changed("tokenizer"):
        edit(copy / "tokenizer_config.json", added="x")
    assert len(found) == 5


def embedder_config(folder):
    return transformers.AutoConfig.from_pretrained(folder).to_dict()


def test_folders_that_do_not_fit_are_refused(made, tmp_path):
    folder, *_ = made("clip")
    vision_only = made("siglip_vision")[3]
    with pytest.raises(ConfigError, match="siglip_vision_model holds no text tower; use the whole model"):
        vision_only.texts(["a dog"])
    with pytest.raises(ConfigError, match='holds no text tower, which mode "mean" needs'):
        ClipEmbedder(vision_only.folder, mode="mean")
    write("siglip_vision", tmp_path, vision_vision_use_head=False)
    write_settings("siglip_vision", tmp_path)
    with pytest.raises(ConfigError, match="vision_use_head is false, so its tower gives no vectors of images"):
        ClipEmbedder(tmp_path)
    with pytest.raises(ConfigError, match="mode 'both' must be one of image, text, mean"):
        ClipEmbedder(folder, mode="both")
    with pytest.raises(ConfigError, match="batch 0 must be at least 1"):
        ClipEmbedder(folder, batch=0)
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings, before = copy / "preprocessor_config.json", (folder / "preprocessor_config.json").read_text()
    for change, message in (
        ({"crop_size": 28}, r"makes images of \(28, 28\), the tower sees 31x31; do config.json and"),
        ({"do_center_crop": False}, "makes images of any shape, the tower sees 31x31"),
    ):
        edit(settings, **change)
        with pytest.raises(CheckpointError, match=message):
            ClipEmbedder(copy)
        settings.write_text(before)
    tokenless = ClipEmbedder(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json; copy the tokenizer files"):
        tokenless.texts(["a dog"])
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="copy: cannot load the tokenizer .*; copy its files anew"):
        tokenless.texts(["a dog"])
    write_settings("siglip", copy)
    with pytest.raises(CheckpointError, match="the tokenizer does not end texts with token"):
        tokenless.texts(["a dog"])


def test_a_missing_package_is_named(made, monkeypatch):
    def absent(*_, **__):
        raise ImportError("SiglipTokenizer requires the SentencePiece library\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    message = r"requires the SentencePiece library\); SigLIP's needs sentencepiece: pip install 'jaxmem\[retrieval\]'"
    with pytest.raises(ConfigError, match=message):
        ClipEmbedder(made("siglip")[0]).texts(["a dog"])


def test_torch_is_not_needed(made):
    folder, *_, embedder = made("clip")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from PIL import Image\n"
        "from jaxmem.retrieval.clip_embedder import ClipEmbedder\n"
        f"embedder = ClipEmbedder({str(folder)!r}, batch=1)\n"
        "image = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))\n"
        "print(*embedder.images([image])[0], *embedder.texts(['a dog'])[0])\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    known = np.concatenate([embedder.images([image])[0], embedder.texts(["a dog"])[0]])
    np.testing.assert_allclose(np.array(done.stdout.split(), np.float32), known, rtol=0, atol=1e-5)
