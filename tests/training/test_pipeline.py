"""Records to batches: order, position, padding rows, and what happens to rows that cannot be used."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmem.data.batching import Buckets, collate, widen
from jaxmem.data.pipeline import Pipeline, Rejections, blind_rows
from jaxmem.data.records import JsonlRecords, fingerprint, messages_of
from jaxmem.errors import DataError
from tests.training.tiny_run import assemble, encode, example

RECORDS = [{"seed": i, "answer": 1 + i % 3} for i in range(10)]


def pipeline(records=RECORDS, **settings):
    return Pipeline(records, encode, assemble, **{"batch_size": 4, "seed": 3, "threads": 0, **settings})


def names(rows):
    return [int(name.removeprefix("row ")) for name in rows.names]


def test_every_epoch_holds_every_record_once_in_a_new_order():
    steps = list(pipeline().steps(0, 9))
    epochs = [sum((names(rows) for rows in steps[i : i + 3]), []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    unshuffled = pipeline(shuffle=False).epoch()
    assert sum((names(rows) for rows in unshuffled), []) == list(range(10))


@pytest.mark.parametrize("threads", [0, 3])
def test_any_step_can_be_the_first(threads):
    whole = list(pipeline().steps(0, 7))
    later = list(pipeline(threads=threads).steps(5, 7))
    for one, other in zip(whole[5:], later, strict=True):
        assert one.names == other.names
        np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
    assert list(pipeline().steps(7, 7)) == []


def test_the_last_batch_is_filled_up_with_rows_without_loss():
    *_, last = pipeline(shuffle=False).epoch()
    assert names(last) == [8, 9] and last.batch.tokens.shape[0] == 4
    assert (last.batch.loss_mask.sum(1) > 0).tolist() == [True, True, False, False]


def test_a_bad_row_stops_the_run_and_is_named(tmp_path):
    records = [*RECORDS[:5], {"fault": "image 3: not an image"}]
    rejected = Rejections(6, 0.0, tmp_path / "rejected.jsonl")
    with pytest.raises(DataError, match=r"1 of 6 records .* row 5: image 3: not an image"):
        list(pipeline(records, rejections=rejected).steps(0, 2))
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["record"] == "row 5"


def test_rows_within_the_allowed_share_are_counted_and_written_once(tmp_path):
    records = [*RECORDS[:6], {"fault": "broken"}, {"seed": 1, "answer": 0}, {"seed": 2, "answer": 100}]
    path = tmp_path / "rejected.jsonl"
    steps = list(pipeline(records, shuffle=False, batch_size=5, rejections=Rejections(9, 0.34, path)).steps(0, 6))
    assert sum((names(rows) for rows in steps[:2]), []) == [0, 1, 2, 3, 4, 5, 7]
    errors = {line["record"]: line["error"] for line in map(json.loads, path.read_text().splitlines())}
    assert len(path.read_text().splitlines()) == 3 and errors["row 6"] == "broken"
    assert "no token of it is supervised" in errors["row 7"] and "longest bucket is 32" in errors["row 8"]
    again = Rejections(9, 0.34, path)
    assert sorted(again.errors) == ["row 6", "row 7", "row 8"]
    with pytest.raises(DataError, match="4 of 9 records"):
        again.add("row 0", "one more")


def test_an_empty_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="dataset is empty"):
        pipeline([])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl is empty"):
        JsonlRecords(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"cannot read the dataset .*absent.jsonl: No such file"):
        JsonlRecords(tmp_path / "absent.jsonl")


def test_jsonl_reads_by_line_and_names_file_and_line(tmp_path):
    chat = [{"role": "user", "content": [{"type": "image", "image": "a/b.png"}, {"type": "text", "text": "é"}]}]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False), "", "{broken", json.dumps({"message": []})]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    records = JsonlRecords(path)
    assert len(records) == 3
    assert messages_of(records[0])[0]["content"][0]["image"] == str(tmp_path / "a/b.png")
    assert messages_of(records[0])[0]["content"][1]["text"] == "é"
    with pytest.raises(DataError, match=r"data.jsonl:3: not JSON"):
        records[1]
    with pytest.raises(DataError, match=r"data.jsonl:4: a record is"):
        records[2]
    for untouched in ("data:image/png;base64,xyz", "https://example.org/a.png", "/absolute/a.png"):
        path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"image": untouched}]}]}))
        assert JsonlRecords(path)[0]["messages"][0]["content"][0]["image"] == untouched
    assert fingerprint(JsonlRecords(path)) != fingerprint(records)


def test_fingerprints_tell_datasets_apart():
    assert fingerprint(RECORDS) == fingerprint([dict(record) for record in RECORDS])
    assert fingerprint(RECORDS) != fingerprint(RECORDS[:-1])


def test_blind_rows_are_a_function_of_seed_and_step_with_the_exact_share():
    masks = np.array([blind_rows(1, step, 5, 0.5) for step in range(400)])
    np.testing.assert_array_equal(masks[7], blind_rows(1, 7, 5, 0.5))
    assert set(masks.sum(1)) == {2, 3} and abs(masks.mean() - 0.5) < 0.02
    assert np.ptp(masks.mean(0)) < 0.15  # no row is favoured
    assert not blind_rows(1, 0, 8, 0.0).any() and blind_rows(1, 0, 8, 1.0).all()


@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2), (3,))])
def test_the_shares_of_the_hosts_are_the_whole_batch(shares):
    whole = list(pipeline().steps(0, 3))
    parts = [list(pipeline(share=share).steps(0, 3)) for share in shares]
    for step, want in enumerate(whole):
        for share, part in zip(shares, parts, strict=True):
            assert part[step].names == want.names and len(part[step].batch.tokens) == len(share)
            real = [row for row in share if row < len(want.names)]
            width = min(part[step].batch.tokens.shape[1], want.batch.tokens.shape[1])
            ours, known = part[step].batch.tokens[: len(real), :width], want.batch.tokens[real, :width]
            np.testing.assert_array_equal(ours, known)
            assert not part[step].batch.loss_mask[len(real) :].any()  # (3,) has no record of the last batch


def test_widening_a_batch_is_collating_into_the_larger_bucket():
    rows = [example(0), example(1, answer=6)]
    small, large = (collate(rows, Buckets((tokens,), (patches,))) for tokens, patches in ((20, 16), (32, 24)))
    for field in dataclasses.fields(large):
        widened = getattr(widen(small, 32, 24), field.name)
        np.testing.assert_array_equal(widened, getattr(large, field.name), field.name)
