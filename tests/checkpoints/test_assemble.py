"""`jaxmem assemble`: parts in, a folder out that transformers and we load alike."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import jaxmem
from jaxmem.checkpoints.assemble import assemble
from jaxmem.cli import main
from jaxmem.data.batching import Buckets, collate
from jaxmem.errors import ConfigError
from tests.backbones import clip_folder
from tests.backbones.prompts import picture, text, user
from tests.llava_folder import write_decoder

PICTURE = picture(80, 30, 3)
CHAT = user({"type": "image", "image": PICTURE}, text("what do they see?"))


@pytest.fixture(scope="module", params=["clip", "siglip_vision"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    decoder, tower = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp(request.param)
    write_decoder(decoder, "qwen2", seed=7)
    clip_folder.write(request.param, tower, seed=8)
    clip_folder.write_settings(request.param, tower)
    return decoder, tower


def test_the_folder_is_a_llava_next_that_transformers_loads_too(parts, tmp_path: Path) -> None:
    decoder, tower = parts
    config = assemble(decoder, tower, tmp_path / "out")
    ours = jaxmem.load(tmp_path / "out")
    assert ours.spec.backbone == config and config.model_type == "llava_next"
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="float32").eval()
    row = ours.processor.encode(CHAT, add_generation_prompt=True)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    inputs = pixels(images=Image.fromarray(PICTURE), return_tensors="pt")
    ids = torch.tensor(row.tokens, dtype=torch.long)[None]
    assert (ids == config.image_token).sum() == row.images[0][1]
    with torch.no_grad():
        wanted = theirs(input_ids=ids, **inputs).logits[0].numpy()
    found = np.asarray(ours.logits(collate([row], Buckets((128,), (96,)))))[0, : len(row)]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_parts_keep_their_weights_and_a_new_token_gets_the_mean(parts, tmp_path: Path) -> None:
    decoder, tower = parts
    assemble(decoder, tower, tmp_path / "out", projector={"name": "avgpool", "ratio": 2}, seed=3)
    whole, alone = jaxmem.load(tmp_path / "out"), jaxmem.load(decoder)
    table = np.asarray(whole.base["embed"])
    assert len(table) == len(alone.base["embed"]) + 1
    np.testing.assert_array_equal(table[:-1], alone.base["embed"])
    np.testing.assert_allclose(table[-1], table[:-1].mean(axis=0), atol=1e-6)
    for name in ("layers", "norm"):
        assert jax.tree.all(jax.tree.map(np.array_equal, whole.base[name], alone.base[name]))
    assert whole.spec.backbone.vision.projector.tokens == 4
    assert len(whole.generate(CHAT, max_new_tokens=3, stop_tokens=())[0].tokens) == 3


def test_the_command_line_says_what_it_wrote(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tower = map(str, parts)
    words = ["assemble", f"--text={decoder}", f"--vision={tower}", "--projector=pixel_shuffle", "--ratio=2"]
    assert main([*words, f"--output={tmp_path / 'out'}"]) == 0
    assert "pixel_shuffle: 4 tokens per tile of 31 pixels" in capsys.readouterr().out
    assert main([*words, f"--output={tmp_path / 'out'}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(words) == 2
    assert "--output" in capsys.readouterr().err


def test_parts_that_do_not_fit_are_refused(parts, tmp_path: Path) -> None:
    decoder, tower = parts
    with pytest.raises(ConfigError, match="ratio"):
        assemble(decoder, tower, tmp_path / "a", projector={"name": "avgpool", "ratio": 9})
    with pytest.raises(ConfigError, match="not supported"):
        assemble(tower, tower, tmp_path / "b")
    with pytest.raises(ConfigError, match="model_type 'qwen2' is not supported; supported: clip"):
        assemble(decoder, decoder, tmp_path / "c")
