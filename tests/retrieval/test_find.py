"""From a question to items in rank order, through missing files, missing items and the command line."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from jaxmem.data.items import Item, ItemFile
from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import cli
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.build import build
from jaxmem.retrieval.find import fetch, search
from jaxmem.retrieval.index import create_index, open_index
from tests.retrieval.builder import HashEncoder


@dataclasses.dataclass
class Shades:
    """A vector from the grey of an item's first image, or from the number that is its text."""

    digest: str = "s" * 64
    width: int = 2
    mode: str = "image"

    def embed(self, items):
        return np.stack([self.one(item) for item in items])

    def one(self, item):
        if self.mode == "image" and not item.images:
            raise DataError(f"item {item.id} has no image")
        grey = float(item.text) if self.mode == "text" else np.asarray(Image.open(item.images[0])).mean()
        return np.array([np.cos(grey / 200), np.sin(grey / 200)], np.float32)


def picture(folder, grey):
    path = folder / f"{grey}.png"
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(path)
    return str(path)


@pytest.fixture
def world(tmp_path):
    """Six items whose greys are 10 apart, a bank of them and an index."""
    path = tmp_path / "items.jsonl"
    greys = [50, 20, 60, 10, 30, 40]
    records = [{"id": f"g{grey}", "text": f"grey {grey}", "image": picture(tmp_path, grey)} for grey in greys]
    path.write_text("\n".join(json.dumps(record) for record in records))
    items = ItemFile(path)
    build(tmp_path / "bank", items, HashEncoder())
    vectors = Shades().embed([items[n] for n in range(6)])
    create_index("exact", tmp_path / "index", items.ids, vectors, Shades().digest)
    return tmp_path, items


def question(folder, grey, name="q"):
    return Item(f"{name}{grey}", "", (picture(folder, grey),))


def test_check_29_ranks_stay_when_an_image_cannot_be_read(world):
    folder, items = world
    index, bank = open_index(folder / "index", Shades()), Bank.open(folder / "bank")
    asked = [question(folder, 13), question(folder, 59)]
    hits = search(index, bank, asked, 4, Shades())
    assert hits.ids == (("g10", "g20", "g30", "g40"), ("g60", "g50", "g40", "g30"))
    (folder / "20.png").write_bytes(b"cut off")
    (folder / "60.png").unlink()
    found = fetch(hits, items)
    assert [[(one.rank, one.item.id) for one in row] for row in found] == [
        [(1, "g10"), (2, "g20"), (3, "g30"), (4, "g40")],
        [(1, "g60"), (2, "g50"), (3, "g40"), (4, "g30")],
    ]
    assert [one.images[0] is None for one in found[0]] == [False, True, False, False]
    assert "item 'g20', image 1" in found[0][1].faults[0] and "there is no file" in found[1][0].faults[0]
    assert found[0][0].images[0].getpixel((0, 0)) == (10, 10, 10) and found[0][0].faults == ()
    assert [one.item.text for one in found[1]] == ["grey 60", "grey 50", "grey 40", "grey 30"]
    assert found[0][0].score == pytest.approx(np.cos(3 / 200), abs=1e-6)


def test_check_30_every_question_is_kept_with_the_items_there_are(world):
    folder, items = world
    hits = search(open_index(folder / "index"), None, Shades().embed([question(folder, n) for n in (13, 59, 30)]), 50)
    assert [len(row) for row in hits.ids] == [6, 6, 6] and [len(row) for row in fetch(hits, items, images=False)] == [
        6
    ] * 3


def test_items_that_the_bank_or_the_file_lacks_are_named(world):
    folder, items = world
    index, bank = open_index(folder / "index"), Bank.open(folder / "bank")
    index.add(["stray", "other"], np.array([[1, 0.05], [1, 0.06]]))
    with pytest.raises(DataError, match=r"items that bank .*bank lacks: 'stray', 'other'; add them to the bank"):
        search(index, bank, np.array([[1, 0.0]]), 4)
    assert search(index, bank, np.array([[1, 0.3]]), 1).ids == (("g60",),)
    with pytest.raises(DataError, match="items.jsonl: no item with the id 'stray'"):
        fetch(search(index, None, np.array([[1, 0.0]]), 1), items)


def test_questions_that_cannot_be_embedded_are_named(world):
    folder, _ = world
    with pytest.raises(DataError, match="item blank has no image"):
        search(open_index(folder / "index"), None, [question(folder, 13), Item("blank", "words")], 2, Shades())


FLAGS = {
    "folder": None,
    "items": None,
    "model": None,
    "memory": None,
    "encoder": None,
    "dtype": None,
    "store": "bfloat16",
    "shard_items": 1024,
    "batch": 16,
    "on_error": "stop",
    "index": None,
    "index_kind": "exact",
    "embedder": None,
    "mode": "image",
    "text": None,
    "image": [],
    "k": 10,
    "json": True,
}


@pytest.fixture
def verb(monkeypatch, capsys):
    """The verb as the command line calls it, with encoders of numpy; gives (exit code, what was printed)."""
    module, asked = types.ModuleType("encoder"), []

    def load_encoder(model, memory, dtype=None, *, encoder=None, batch=16):
        asked.append((model, memory, dtype, batch))
        return HashEncoder()

    module.load_encoder = load_encoder
    monkeypatch.setitem(sys.modules, "jaxmem.retrieval.encoder", module)
    monkeypatch.setattr(cli, "load_embedder", lambda folder, mode: Shades(mode=mode))

    def call(action, **flags):
        code = cli.main(
            action=action, **(FLAGS | {key: v if key in ("k", "json", "image") else str(v) for key, v in flags.items()})
        )
        return code, capsys.readouterr().out

    call.asked = asked
    return call


@pytest.mark.parametrize("kind", ["exact", "approximate", "lance"])
def test_the_verb_builds_adds_shows_and_searches(world, verb, kind):
    folder, items = world
    first, bank, index = folder / "first.jsonl", folder / "verb", folder / "verb-index"
    first.write_text("\n".join((folder / "items.jsonl").read_text().splitlines()[:4]))
    shared = {"folder": bank, "model": "M", "memory": "C", "index": index, "embedder": "E", "index_kind": kind}
    code, out = verb("build", items=first, **shared)
    assert code == 0 and json.loads(out) == {"items": 4, "added": 4, "present": 0, "rejected": 0, "indexed": 4}
    code, out = verb("add", items=folder / "items.jsonl", **shared)
    assert json.loads(out) == {"items": 6, "added": 2, "present": 4, "rejected": 0, "indexed": 2}
    assert verb.asked == [("M", "C", None, 16)] * 2

    code, out = verb("info", folder=bank, index=index)
    said = json.loads(out)
    assert code == 0 and said["verified"] and (said["items"], said["shards"], said["bytes per item"]) == (6, 2, 96)
    assert (said["encoder"], said["template"], said["dtype"]) == ("e" * 64, "t" * 64, "bfloat16")
    assert said["index"] == {"kind": kind, "items": 6, "width": 2, "embedder": "s" * 64}
    code, out = verb("info", folder=bank, json=False)
    assert "items             6\n" in out and "verified          yes" in out and "e" * 64 in out

    asked = {"index": index, "embedder": "E", "items": folder / "items.jsonl", "k": 3}
    code, out = verb("search", folder=bank, image=[picture(folder, 13)], **asked)
    hits = json.loads(out)["hits"]
    assert [(hit["rank"], hit["id"], hit["text"]) for hit in hits] == [
        (1, "g10", "grey 10"),
        (2, "g20", "grey 20"),
        (3, "g30", "grey 30"),
    ]
    code, out = verb("search", text="58", json=False, **asked)
    assert [line.split(maxsplit=2) for line in out.splitlines()] == [
        ["1", f"{np.cos(2 / 200):.4f}", "g60  grey 60"],
        ["2", f"{np.cos(8 / 200):.4f}", "g50  grey 50"],
        ["3", f"{np.cos(18 / 200):.4f}", "g40  grey 40"],
    ]


def test_the_verb_refuses_an_index_of_another_embedder_before_it_encodes(world, verb, monkeypatch):
    folder, _ = world
    monkeypatch.setattr(cli, "load_embedder", lambda folder, mode: Shades(digest="z" * 64))
    flags = {"folder": folder / "new", "items": folder / "items.jsonl", "memory": "C", "embedder": "E"}
    with pytest.raises(DataError, match="made by embedder ssssssssssssssss, this one is zzzzzzzzzzzzzzzz"):
        verb("build", index=folder / "index", **flags)
    assert verb.asked == [] and not (folder / "new").exists()


def test_the_verb_says_that_a_bank_is_broken(world, verb):
    folder, _ = world
    path = folder / "bank" / "shard_00000.bin"
    path.write_bytes(b"\0" * path.stat().st_size)
    code, out = verb("info", folder=folder / "bank")
    assert code == 1 and json.loads(out)["faults"] == [f"{path} has other bytes than were written"]


def test_the_verb_skips_and_says_where(tmp_path, verb):
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "bad"}\n')
    with pytest.raises(DataError, match="1 items cannot be used: .*items.jsonl:2: item b: its image is corrupt"):
        verb("build", folder=tmp_path / "bank", items=path, memory="C")
    code, out = verb("build", folder=tmp_path / "bank", items=path, memory="C", on_error="skip")
    assert json.loads(out)["rejected"] == 1 and json.loads(out)["see"] == str(tmp_path / "bank" / "rejected.jsonl")


@pytest.mark.parametrize(
    ("action", "flags", "message"),
    [
        ("biuld", {}, "biuld.*build"),
        ("build", {}, "bank build needs --folder=... and --items=..."),
        ("add", {"folder": "b"}, "bank add needs --items=..."),
        ("info", {}, "bank info needs --folder=..."),
        ("search", {}, "bank search needs --index=..."),
        ("build", {"folder": "b", "items": "i"}, "bank build needs --memory=..."),
        ("build", {"folder": "b", "items": "i", "memory": "m", "index": "x"}, "needs --embedder=... for an index"),
        ("build", {"folder": "b", "items": "i", "memory": "m", "index_kind": "flat"}, "flat.*exact"),
        ("search", {"index": "x", "embedder": "e"}, "needs --embedder=... and --text=... or --image=..."),
    ],
)
def test_the_verb_says_what_it_needs(verb, action, flags, message):
    with pytest.raises(ConfigError, match=message):
        verb(action, **flags)
