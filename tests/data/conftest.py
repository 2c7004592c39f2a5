"""A processor of a small folder, shared by the tests of the data room."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmem.backbones.config import BackboneConfig, TextConfig, VisionConfig
from jaxmem.data.loading import load_processor
from jaxmem.data.processor import Processor
from tests.helpers import write_tokenizer


@pytest.fixture(scope="session")
def config() -> BackboneConfig:
    text = TextConfig(layers=2, width=64, mlp_width=96, heads=4, kv_heads=2, head_dim=16, vocab=512)
    vision = VisionConfig(depth=3, width=32, mlp_width=48, heads=4, out_width=64, taps=(0, 2), table_side=8)
    return BackboneConfig("qwen3_vl", text, vision, 500, 501, 502, 503)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def processor(folder: Path, config: BackboneConfig) -> Processor:
    return load_processor(folder, config)
