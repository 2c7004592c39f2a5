"""A result file holds the answers of one setting, once each, whatever happened to the process that wrote it."""

import dataclasses
import json

import pytest

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.results import Results, Settings, digest
from tests.evaluation.knowledge.worlds import open_question

SETTINGS = Settings(
    benchmark="viquae",
    condition="memory",
    model="Qwen2.5-VL-7B-Instruct",
    k=10,
    order="rank",
    template={"style": "short", "given": True, "text_first": False, "digest": "abc"},
    decode={"temperature": 0.1, "top_p": 0.001, "repetition_penalty": 1.05, "max_new_tokens": 1000, "seed": 0},
    split_sizes={"all": 3},
    questions="0123",
    memory="step 800",
    bank_size=2_000_000,
    bank_digest="feed",
    index="flat",
)
OTHERS = {
    "k": 3, "order": "reversed", "template": {"style": "short"}, "decode": {"temperature": 0.0}, "bank_size": 5,
    "bank_digest": "beef", "split_sizes": {"all": 4}, "model": "Qwen2-VL", "memory": None, "condition": "shuffled",
    "questions": "4567", "seed": 1, "scorers": 0, "index": "ivf", "extra": {"pixels": 1}, "benchmark": "okvqa",
}  # fmt: skip


def row(name, score=1.0):
    return {"id": name, "split": "all", "reply": 'é \n"x"', "metrics": {"strict": score}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "memory.jsonl"


def test_check_38_every_setting_is_in_the_file(path):
    results = Results(path, SETTINGS)
    results.add([row("a"), row("b")])
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept == {"format": 1, "settings": dataclasses.asdict(SETTINGS), "summary": None}
    results.finish({"questions": 2})
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["summary"] == {"questions": 2} and kept["settings"]["bank_size"] == 2_000_000
    assert {field.name for field in dataclasses.fields(Settings)} == kept["settings"].keys()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row("a"), row("b")]
    assert sorted(one.name for one in path.parent.iterdir()) == ["memory.json", "memory.jsonl"]


@pytest.mark.parametrize("name", OTHERS)
def test_check_38_two_settings_do_not_mix(path, name):
    Results(path, SETTINGS).add([row("a")])
    other = dataclasses.replace(SETTINGS, **{name: OTHERS[name]})
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        Results(path, other)
    message = f"{name} is {getattr(SETTINGS, name)!r}, not {OTHERS[name]!r}; take another output folder"
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Settings)}


def test_check_38_going_on_has_no_double_entries(path):
    Results(path, SETTINGS).add([row("a")])
    again = Results(path, SETTINGS)
    assert again.ids == {"a"} and again.rows == [row("a")] and again.repaired == ""
    for names in (["a"], ["b", "b"]):
        with pytest.raises(DataError, match=f"memory.jsonl: question {names[0]} is answered already"):
            again.add([row(name) for name in names])
    again.add([row("b")])
    assert Results(path, SETTINGS).ids == {"a", "b"}


def test_check_38_a_line_cut_off_at_any_byte_is_repaired(path):
    Results(path, SETTINGS).add([row("a"), row("b")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        found = Results(path, SETTINGS)
        complete = end >= len(whole) - 1
        assert found.ids == ({"a", "b"} if complete else {"a"}), end
        assert path.read_bytes() == (whole if complete else whole[:first])
        assert ("asked again" in found.repaired) == (first < end < len(whole) - 1)
        assert ("is ended" in found.repaired) == (end == len(whole) - 1)
        if not complete:
            found.add([row("b")])
            assert path.read_bytes() == whole
    path.write_bytes(whole[: first - 5])
    assert Results(path, SETTINGS).ids == set() and path.read_bytes() == b""


def test_broken_files_are_refused(path):
    Results(path, SETTINGS).add([row("a"), row("b")])
    whole = path.read_text()
    for text, message in (
        (whole + "{\n", r"memory.jsonl:3: not an answer of an evaluation; remove the line"),
        ("\n" + whole, r"memory.jsonl:1: not an answer"),
        (whole + '{"id": 3, "metrics": {}}\n', r"memory.jsonl:3: not an answer"),
        (whole + whole, r"memory.jsonl:3: question a is on line 1 already"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Results(path, SETTINGS)
        assert path.read_text() == text
    path.write_text(whole)
    header = path.with_suffix(".json")
    header.write_text('{"format": 2, "settings": {}}')
    with pytest.raises(DataError, match="memory.json: format 2, this version writes 1"):
        Results(path, SETTINGS)
    header.write_text("[]")
    with pytest.raises(DataError, match="memory.json: not the settings of a result file"):
        Results(path, SETTINGS)
    header.unlink()
    with pytest.raises(DataError, match="has answers but no memory.json with their settings"):
        Results(path, SETTINGS)
    with pytest.raises(ConfigError, match="answers go to a .jsonl file"):
        Results(header, SETTINGS)


def test_digests_tell_questions_apart():
    one = open_question()
    changed = [dataclasses.replace(one, **{name: value}) for name, value in (
        ("id", "x"), ("text", "x"), ("answers", ("x",)), ("split", "x"), ("kind", "x"), ("choices", ("x",)),
        ("meta", {"language": "zh"}))]  # fmt: skip
    assert len({digest([other]) for other in (one, *changed)}) == 8
    assert digest([one]) == digest([dataclasses.replace(one, images=())])
    assert digest([one, changed[0]]) != digest([changed[0], one])
