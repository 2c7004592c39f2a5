"""CoMEM from the command line: its encoder beside a decoder of another kind, and items in front of a prompt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jaxmem
from jaxmem import cli
from jaxmem.data.items import ItemFile
from jaxmem.retrieval.bank import Bank
from tests.backbones.prompts import picture, text, user

pytest.importorskip("torch")

from tests.memory import comem_world as w  # noqa: E402
from tests.memory import transfer_world as t  # noqa: E402

PROMPT = "which of them do they see?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Path]:
    """A decoder with a Qwen2.5-VL's CoMEM, the flags that name their folders, and a file of items."""
    folder = tmp_path_factory.mktemp("world")
    t.write_target(folder / "decoder")
    t.write_encoder(folder / "encoder")
    model = jaxmem.load(folder / "decoder", encoder=folder / "encoder").attach("comem", **(w.SMALL | {"alpha": 2.0}))
    model = dataclasses.replace(model, memory={"comem": w.noisy(model.memory["comem"])})
    model.save(folder / "memory")
    rows = []
    for number, size in enumerate([(64, 32), (32, 96), (48, 48)]):
        Image.fromarray(picture(*size, number)).save(folder / f"{number}.png")
        rows.append({"id": f"item {number}", "text": f"they see {number} streets", "image": f"{number}.png"})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, [f"--{name}={folder / path}" for name, path in FLAGS.items()], folder


FLAGS = {"model": "decoder", "encoder": "encoder", "memory": "memory"}


def said(capsys: Any, flags: list[str], *more: str) -> str:
    """What `jaxmem generate` prints."""
    capsys.readouterr()
    assert cli.main(["generate", *flags, f"--prompt={PROMPT}", "--max_new_tokens=12", *more]) == 0
    return capsys.readouterr().out


def test_generate_puts_items_in_front(world: Any, capsys: Any) -> None:
    model, flags, folder = world
    file = ItemFile(folder / "items.jsonl")
    cases = {(): [], ("item 2", "item 0"): file.find(["item 2", "item 0"]), None: [file[row] for row in range(3)]}
    found = []
    for ids, known in cases.items():
        words = [] if ids == () else [f"--items={folder / 'items.jsonl'}", *(f"--item={name}" for name in ids or ())]
        (answer,) = model.generate([user(text(PROMPT))], items=[known], max_new_tokens=12)
        found.append(said(capsys, flags, *words))
        assert found[-1] == answer.text + "\n"
    assert len(set(found)) == 3  # items, and which ones, change what is said


def test_generate_refuses_items_that_nothing_reads(world: Any, capsys: Any, tmp_path: Path) -> None:
    _, flags, folder = world
    items = f"--items={folder / 'items.jsonl'}"
    cases = [
        ([*flags, items, "--item=item 7"], "no item with the id 'item 7'"),
        ([*flags, "--item=item 1"], "give the file with --items"),
        ([flags[0], items], "belong to a CoMEM; name its folder with --memory"),
        (flags[:2], "belong to a CoMEM; name its folder with --memory"),
        ([flags[0], flags[2]], "another model reads items for this CoMEM"),
    ]
    for words, message in cases:
        assert cli.main(["generate", *words, f"--prompt={PROMPT}"]) == 2
        assert message in capsys.readouterr().err


def test_bank_is_built_by_the_encoder_beside(world: Any, capsys: Any, tmp_path: Path) -> None:
    model, flags, folder = world
    words = ["bank", "build", f"--folder={tmp_path / 'bank'}", f"--items={folder / 'items.jsonl'}", "--store=bfloat16"]
    assert cli.main([*words, *flags]) == 0
    items = [ItemFile(folder / "items.jsonl")[row] for row in range(3)]
    bank = Bank.open(tmp_path / "bank")
    wanted = np.asarray(model.encode_items(items).astype("bfloat16"), np.float32)
    np.testing.assert_array_equal(np.asarray(bank.get([item.id for item in items]), np.float32), wanted)
