"""A memory bank gives back what was put in, bit for bit, and names whatever is wrong with it."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from jaxmem.data.items import Item, ItemFile, digest
from jaxmem.errors import ConfigError, DataError
from jaxmem.retrieval import files, shards
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.build import add, build
from tests.retrieval.builder import HashEncoder, SizedEncoder, numbered

BFLOAT16 = ml_dtypes.bfloat16


def sound(count, start=0):
    return [Item(f"i{n}", f"text {n}") for n in range(start, start + count)]


def contents(folder):
    """Name to bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(array):
    assert array.dtype == BFLOAT16
    return array.view(np.uint16)


@pytest.mark.parametrize("encoder", [HashEncoder(), SizedEncoder()])
def test_check_27_bank_round_trip(tmp_path, encoder):
    items, steps = sound(11), []
    done = build(tmp_path, items, encoder, shard_items=4, batch=3, progress=lambda *step: steps.append(step))
    assert (done.items, done.added, done.present, done.rejected) == (11, 11, 0, ())
    assert steps == [(4, 11), (8, 11), (11, 11)]
    bank = Bank.open(tmp_path, encoder)
    assert len(bank) == 11 and bank.ids == tuple(f"i{n}" for n in range(11)) and bank.rejected == ()
    fresh = np.stack([encoder.one(item) for item in items]).astype(BFLOAT16)
    assert np.array_equal(bits(bank.get(bank.ids)), bits(fresh))
    order = ["i10", "i0", "i7", "i0"]
    assert np.array_equal(bits(bank.get(order)), bits(fresh[[10, 0, 7, 0]]))
    assert bank.get([]).shape == (0, 2, 24)
    assert (bank.where("i0"), bank.where("i7"), bank.where("i10")) == ((0, 0), (1, 3), (2, 2))
    assert bank.faults() == () and bank.verify() is None
    with pytest.raises(DataError, match="no item with the id 'zz', 'y'; add it"):
        bank.get(["i1", "zz", "y", "zz"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "f" * 64}, "made by encoder eeeeeeeeeeeeeeee, this one is ffffffffffffffff; build another folder"),
        ({"template": "u" * 64}, "made by template tttttttttttttttt, this one is uuuuuuuuuuuuuuuu"),
        ({"latents": 3}, "2 embeddings of width 24 per item, this encoder makes 3 of width 24"),
        ({"width": 25}, "this encoder makes 2 of width 25"),
    ],
)
def test_check_27_another_encoder_is_refused(tmp_path, change, message):
    build(tmp_path, sound(3), HashEncoder())
    before, other = contents(tmp_path), HashEncoder(**change)
    uses = [
        lambda: Bank.open(tmp_path, other),
        lambda: build(tmp_path, sound(3), other),
        lambda: add(tmp_path, sound(3, 3), other),
    ]
    for use in uses:
        with pytest.raises(DataError, match=message):
            use()
    assert contents(tmp_path) == before and other.calls == []


@pytest.mark.parametrize(
    ("setting", "message"), [({"dtype": "int8"}, "dtype bfloat16.*int8"), ({"shard_items": 8}, "1024.*8")]
)
def test_a_bank_keeps_its_dtype_and_shard_size(tmp_path, setting, message):
    build(tmp_path, sound(3), HashEncoder())
    with pytest.raises(DataError, match=message):
        build(tmp_path, sound(3), HashEncoder(), **setting)


def test_check_27_another_format_is_refused(tmp_path):
    build(tmp_path, sound(3), HashEncoder())
    path = tmp_path / "bank.json"
    content = json.loads(path.read_text())
    assert content == {
        "format": 1,
        "latents": 2,
        "width": 24,
        "dtype": "bfloat16",
        "encoder": "e" * 64,
        "template": "t" * 64,
        "shard_items": 1024,
    }
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(DataError, match="a bank of format 2, this version reads 1"):
        Bank.open(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="bank.json: not readable as JSON"):
        Bank.open(tmp_path)
    with pytest.raises(DataError, match="no such file; this folder is no memory bank"):
        Bank.open(tmp_path / "nowhere")


def test_check_28_bytes_per_item():
    width = {"latents": 8, "width": 3584, "encoder": "", "template": "", "shard_items": 1}
    assert shards.Layout(dtype="bfloat16", **width).item_bytes == 57_344
    assert shards.Layout(dtype="int8", **width).item_bytes == 8 * 3584 + 8 * 4


def test_check_28_bytes_on_disk(tmp_path):
    build(tmp_path / "b", sound(3), HashEncoder(latents=8, width=3584))
    build(tmp_path / "i", sound(3), HashEncoder(latents=8, width=3584), dtype="int8")
    assert (tmp_path / "b" / "shard_00000.bin").stat().st_size == 3 * 57_344
    assert (tmp_path / "i" / "shard_00000.bin").stat().st_size == 3 * 28_672
    assert (tmp_path / "i" / "shard_00000.scale.bin").stat().st_size == 3 * 32
    raw = np.fromfile(tmp_path / "b" / "shard_00000.bin", "<u2").reshape(3, 8, 3584)
    assert np.array_equal(raw, bits(Bank.open(tmp_path / "b").get(["i0", "i1", "i2"])))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 60.0])
def test_int8_is_wrong_by_half_a_scale_at_most(tmp_path, scale):
    """Half a step of max / 127, and what reading it as bfloat16 (8 bits) rounds away."""
    encoder, items = HashEncoder(width=512, scale=scale), sound(6)
    build(tmp_path, items, encoder, dtype="int8")
    known = np.stack([encoder.one(item) for item in items]).astype(np.float64)
    largest = np.abs(known).max(-1, keepdims=True)
    error = np.abs(Bank.open(tmp_path).get([item.id for item in items]).astype(np.float64) - known)
    assert np.all(error <= largest / 254 * 1.00001 + np.abs(known) * 2.0**-8)
    assert error.max() > largest.min() / 600  # it is int8
    values, scales = shards.quantise(known.astype(np.float32))
    assert np.all(np.abs(values * scales[..., None].astype(np.float64) - known) <= largest / 254 * 1.00001)
    assert np.abs(values).max() == 127


def test_int8_of_zeros_is_zero():
    values, scales = shards.quantise(np.zeros((1, 2, 4), np.float32))
    assert not values.any() and not scales.any()


def test_items_are_encoded_by_size_and_kept_in_order(tmp_path):
    items, encoder = numbered(3) + numbered(4, 4), SizedEncoder()
    build(tmp_path, items, encoder, batch=2)
    sizes = {item.id: len(item.text) for item in items}
    seen = [sizes[name] for call in encoder.calls for name in call]
    assert seen == sorted(sizes.values()) and [len(call) for call in encoder.calls] == [2, 2, 2, 1]
    assert Bank.open(tmp_path).ids == tuple(item.id for item in items)


def test_adding_appends_what_is_new_in_a_new_shard(tmp_path):
    encoder = HashEncoder()
    build(tmp_path, sound(5), encoder, shard_items=4)
    first = contents(tmp_path)
    again = build(tmp_path, sound(5), encoder, shard_items=4)
    assert (again.items, again.added, again.present) == (5, 0, 5) and contents(tmp_path) == first
    encoder.calls.clear()
    more = add(tmp_path, sound(4, 3), encoder)
    assert (more.items, more.added, more.present) == (7, 2, 2) and encoder.calls == [["i5", "i6"]]
    after = contents(tmp_path)
    assert {name: after[name] for name in first} == first
    bank = Bank.open(tmp_path)
    assert bank.ids == tuple(f"i{n}" for n in range(7)) and bank.where("i5") == (2, 0)
    assert [len(shard.ids) for shard in bank.shards] == [4, 1, 2]
    with pytest.raises(DataError, match="no such file; this folder is no memory bank"):
        add(tmp_path / "new", sound(2), encoder)
    assert not (tmp_path / "new").exists()


def test_changed_and_doubled_items_are_named(tmp_path):
    encoder = HashEncoder()
    build(tmp_path, sound(4), encoder)
    before = contents(tmp_path)
    changed = [*sound(2), Item("i2", "other"), Item("i3", "text 3", (b"image",)), Item("new", "x")]
    for fill in (build, add):
        with pytest.raises(DataError, match=r"changed items: 'i2' \(row 2\), 'i3' \(row 3\); give the new"):
            fill(tmp_path, changed, encoder)
        with pytest.raises(DataError, match=r"found twice: 'i5' \(row 1 and row 3\)$"):
            fill(tmp_path, [*sound(3, 4), Item("i5", "text 5")], encoder)
    assert contents(tmp_path) == before


def test_bad_items_stop_a_build_by_name(tmp_path):
    encoder = HashEncoder()
    items = [Item("a", "x"), Item("b", "bad"), Item("c", "y"), Item("d", "nan"), Item("e", "bad bad")]
    message = (
        r"3 items cannot be used: row 1: item b: its image is corrupt, row 3: its embeddings are not finite, "
        r"row 4: item e: its image is corrupt. Put them right .* on_error \"skip\", which writes them to rejected.jsonl"
    )
    with pytest.raises(DataError, match=message):
        build(tmp_path, items, encoder, shard_items=8, batch=4)
    assert len(Bank.open(tmp_path)) == 0 and not (tmp_path / "rejected.jsonl").exists()
    unreadable = [Item("a", "x"), Item("f", "", ("/no/file.png",)), Item("g", "", ("/no/other.png",))]
    encoder.calls.clear()
    with pytest.raises(DataError, match=r"2 items cannot be used: .*'/no/file.png'.*'/no/other.png'"):
        build(tmp_path, unreadable, encoder, shard_items=8)
    assert encoder.calls == []  # nothing is encoded before all items were read
    with pytest.raises(ConfigError, match='on_error is "stop" or "skip".*\'ignore\''):
        build(tmp_path, items, encoder, shard_items=8, on_error="ignore")


def test_skipped_items_are_written_down_and_shift_nothing(tmp_path):
    """An item keeps its shard whatever else is rejected; a second build tries the rejected no more."""
    items, encoder = numbered(20), HashEncoder()
    done = build(tmp_path / "a", items, encoder, shard_items=4, batch=3, on_error="skip")
    rejected = ["i3", "i10", "i17"]
    assert [one.id for one in done.rejected] == rejected and (done.items, done.added) == (17, 17)
    bank = Bank.open(tmp_path / "a")
    assert all(bank.where(f"i{n}")[0] == n // 4 for n in range(20) if f"i{n}" not in rejected)
    assert [one.id for one in bank.rejected] == rejected
    lines = [json.loads(line) for line in (tmp_path / "a" / "rejected.jsonl").read_text().splitlines()]
    assert lines == [{"record": f"row {i[1:]}", "id": i, "reason": f"item {i}: its image is corrupt"} for i in rejected]
    fresh = np.stack([encoder.one(item) for item in items if item.id in bank])
    assert np.array_equal(bits(bank.get(bank.ids)), bits(fresh.astype(BFLOAT16)))
    before = contents(tmp_path / "a")
    encoder.calls.clear()
    again = build(tmp_path / "a", items, encoder, shard_items=4, on_error="skip")
    assert encoder.calls == [] and contents(tmp_path / "a") == before and again.rejected == done.rejected
    with pytest.raises(DataError, match="3 items cannot be used: row 3: item i3"):
        build(tmp_path / "a", items, encoder, shard_items=4)


def test_an_item_that_was_put_right_comes_in(tmp_path):
    encoder, items = HashEncoder(), numbered(8)
    build(tmp_path, items, encoder, shard_items=4, on_error="skip")
    items[3] = Item("i3", "mended")
    done = build(tmp_path, items, encoder, shard_items=4)
    assert (done.added, done.present, done.rejected) == (1, 7, ())
    bank = Bank.open(tmp_path)
    assert bank.where("i3") == (2, 0) and bank.rejected == () and not (tmp_path / "rejected.jsonl").exists()


def test_a_shard_of_rejected_items_alone(tmp_path):
    encoder = HashEncoder()
    build(tmp_path, [Item("a", "bad"), Item("b", "bad"), Item("c", "x")], encoder, shard_items=2, on_error="skip")
    bank = Bank.open(tmp_path)
    assert bank.ids == ("c",) and bank.where("c") == (1, 0) and bank.faults() == ()
    assert np.array_equal(bits(bank.get(["c"])[0]), bits(encoder.one(Item("c", "x")).astype(BFLOAT16)))


def test_lines_of_a_file_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{oops\n{"id": "c", "text": null}\n{"id": "d", "text": "y"}\n')
    with pytest.raises(
        DataError, match=r"2 items cannot be used: .*jsonl:2: not JSON.*jsonl:3: neither text nor image"
    ):
        build(tmp_path / "bank", ItemFile(path), HashEncoder(), shard_items=2)
    done = build(tmp_path / "bank", ItemFile(path), HashEncoder(), shard_items=2, on_error="skip")
    assert [(one.record.rpartition(":")[2], one.id) for one in done.rejected] == [("2", None), ("3", "c")]
    before = contents(tmp_path / "bank")
    build(tmp_path / "bank", ItemFile(path), HashEncoder(), shard_items=2, on_error="skip")
    assert contents(tmp_path / "bank") == before
    assert Bank.open(tmp_path / "bank").ids == ("a", "d")


def test_an_encoder_that_breaks_its_word(tmp_path):
    class Wrong(HashEncoder):
        def encode(self, items):
            return super().encode(items)[:, :1]

    with pytest.raises(
        ConfigError, match=r"the encoder made float32 \(2, 1, 24\), expected floating numbers \(2, 2, 24"
    ):
        build(tmp_path, sound(2), Wrong())

    class Broken(HashEncoder):
        def encode(self, items):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):  # no fault of an item: nothing is rejected
        build(tmp_path, sound(2), Broken(), on_error="skip")
    assert build(tmp_path, sound(2), HashEncoder()).added == 2


def broken_at(path, place, mask=0x40):
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def test_a_corrupt_shard_is_named_and_can_be_made_anew(tmp_path):
    items = sound(10)
    build(tmp_path, items, HashEncoder(), shard_items=4)
    before = contents(tmp_path)
    broken_at(tmp_path / "shard_00001.bin", 77)
    bank = Bank.open(tmp_path)
    (fault,) = bank.faults()
    assert fault == f"{tmp_path / 'shard_00001.bin'} has other bytes than were written"
    with pytest.raises(DataError, match="shard_00001.bin has other bytes.*; delete the shard's files and run the same"):
        bank.verify()
    for path in tmp_path.glob("shard_00001.*"):
        path.unlink()
    with pytest.raises(DataError, match="shard_00001.json is missing though later shards exist; run the same build"):
        Bank.open(tmp_path)
    assert build(tmp_path, items, HashEncoder(), shard_items=4).added == 4
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_truncated_and_missing_shards_are_named(tmp_path, dtype):
    build(tmp_path, sound(10), HashEncoder(), shard_items=4, dtype=dtype)
    for path in (tmp_path / "shard_00001.bin", tmp_path / "shard_00002.scale.bin"):
        if not path.exists():
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-3])
        message = f"{path.name} has {len(data) - 3} bytes where {len(data)} belong; delete the shard's files"
        for use in (lambda: Bank.open(tmp_path), lambda: add(tmp_path, sound(12), HashEncoder())):
            with pytest.raises(DataError, match=message):
                use()
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is missing; delete"):
            Bank.open(tmp_path)
        path.write_bytes(data)
    index = tmp_path / "shard_00000.json"
    index.write_text(index.read_text().replace('"i1"', '"iX"'))
    with pytest.raises(DataError, match="shard_00000.json is damaged .its checksum differs.; delete"):
        Bank.open(tmp_path)


@pytest.mark.parametrize("at", range(0, 12))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_a_readable_bank(tmp_path, monkeypatch, at, code):
    """The disk fills up, half-way, at every write of a build in turn."""
    items, plain, count = numbered(12), files.write, [0]
    build(tmp_path / "whole", items, HashEncoder(), shard_items=4, dtype="int8", on_error="skip")

    def write(file, chunk):
        count[0] += 1
        if count[0] > at:
            plain(file, bytes(chunk)[: len(chunk) // 2])
            raise OSError(code, os.strerror(code))
        plain(file, chunk)

    fill = lambda: build(tmp_path / "b", items, HashEncoder(), shard_items=4, dtype="int8", on_error="skip")  # noqa: E731
    monkeypatch.setattr(files, "write", write)
    says = "no space left on the disk; .* free space and run" if code == errno.ENOSPC else "Input/output error"
    with pytest.raises(DataError, match=f"cannot write .*{says}"):
        fill()
    names = set(contents(tmp_path / "b"))
    assert not any(name.endswith(files.PARTIAL) for name in names)
    whole = {name.partition(".")[0] for name in names if name.startswith("shard") and name.endswith(".json")}
    assert {name.partition(".")[0] for name in names if name.startswith("shard")} == whole
    if at:
        bank = Bank.open(tmp_path / "b")
        assert bank.faults() == () and bank.ids == Bank.open(tmp_path / "whole").ids[: len(bank)]
    monkeypatch.setattr(files, "write", plain)
    fill()
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_one_process_builds_at_a_time(tmp_path):
    with files.locked(tmp_path), pytest.raises(DataError, match="another process is writing to it; wait"):
        build(tmp_path, sound(2), HashEncoder())
    assert build(tmp_path, sound(2), HashEncoder()).added == 2  # what a dead process locked is free


def kill(folder, count, dtype, after, delay):
    """Starts a process that builds, and kills it so many seconds after it has written `after` shards."""
    command = [sys.executable, "-m", "tests.retrieval.builder", str(folder), str(count), dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(1 + after)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return lines


def test_check_27_killed_at_any_moment_a_build_resumes_to_the_same_bytes(tmp_path):
    """Ten kills at random moments; after each the bank is readable and holds complete shards alone."""
    count, draw, seen, left = 240, random.Random(5), [], 0
    options = {"shard_items": 8, "batch": 3, "dtype": "int8", "on_error": "skip"}
    build(tmp_path / "whole", numbered(count), SizedEncoder(), **options)
    whole = Bank.open(tmp_path / "whole")
    for _ in range(10):
        lines = kill(tmp_path / "killed", count, "int8", draw.randrange(3), draw.uniform(0, 0.04))
        assert lines[0] == "started\n" and "done\n" not in lines
        seen.append(0)
        if (tmp_path / "killed" / "bank.json").exists():
            bank = Bank.open(tmp_path / "killed")
            assert bank.ids == whole.ids[: len(bank)] and bank.faults() == ()
            assert np.array_equal(bits(bank.get(bank.ids)), bits(whole.get(bank.ids)))
            seen[-1] = len(bank)
        left += len(list((tmp_path / "killed").glob("*.bin"))) > 2 * len(
            list((tmp_path / "killed").glob("shard_*.json"))
        )
        left += any((tmp_path / "killed").glob(f"*{files.PARTIAL}"))
    print(f"items after each kill {seen}, half-written shards after {left} of them")
    assert seen == sorted(seen) and 0 < seen[-1] < len(whole)
    build(tmp_path / "killed", numbered(count), SizedEncoder(), **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_bank_says_what_it_holds_the_same_everywhere(tmp_path):
    for name in "ab":
        build(tmp_path / name, numbered(9), HashEncoder(), shard_items=4, on_error="skip")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shard = json.loads((tmp_path / "a" / "shard_00000.json").read_text())
    assert shard["ids"] == ["i0", "i1", "i2"] and shard["digests"] == [digest(item) for item in numbered(3)]


def test_what_a_killed_build_left_goes_and_what_is_not_its_own_stays(tmp_path):
    build(tmp_path, sound(5), HashEncoder(), shard_items=4)
    before = contents(tmp_path)
    left = ["shard_00007.bin", "shard_00007.bin.partial", "shard_00002.json.partial", "bank.json.partial"]
    for name in [*left, "thesis.partial", "shard_notes.bin"]:
        (tmp_path / name).write_bytes(b"half")
    assert Bank.open(tmp_path).ids == tuple(f"i{n}" for n in range(5))
    build(tmp_path, sound(5), HashEncoder(), shard_items=4)
    assert contents(tmp_path) == before | {"thesis.partial": b"half", "shard_notes.bin": b"half"}
