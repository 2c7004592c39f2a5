"""A benchmark under several conditions, with a model that is a table of replies."""

import dataclasses
import json
import sys
import types

import pytest

from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import cli, scoring
from jaxmem.evaluation.knowledge.conditions import assign, partners
from jaxmem.evaluation.knowledge.prompts import Template
from jaxmem.evaluation.knowledge.running import evaluate, settings_of
from jaxmem.evaluation.knowledge.summary import pair, percent
from tests.evaluation.knowledge import worlds
from tests.evaluation.knowledge.worlds import draw, open_question, set_of, write_lines

FACTS = {"model": "table", "order": "rank", "decode": {"temperature": 0.0}}
QUESTIONS = set_of(*(open_question(f"q{at}", (f"answer {at}",), "open") for at in range(7)))


def settings(condition="none", questions=QUESTIONS, k=10):
    return settings_of(questions, condition, Template("short"), k, FACTS)


class Model:
    """Knows the answer of every question whose number is below `knows`; notes what it was asked."""

    def __init__(self, knows, fails_at=None):
        self.knows, self.fails_at, self.asked = knows, fails_at, []

    def __call__(self, batch):
        self.asked.append([question.id for question in batch])
        if self.fails_at is not None and len(self.asked) > self.fails_at:
            raise KeyboardInterrupt
        return [f"\\boxed{{answer {q.id[1:] if int(q.id[1:]) < self.knows else 'unknown'}}}" for q in batch]


def run(tmp_path, model, condition="none", **others):
    return evaluate(QUESTIONS, model, settings(condition), tmp_path, scoring.viquae, batch_size=3, **others)


def test_an_evaluation_from_questions_to_files(tmp_path):
    seen, model = [], Model(5)
    found = run(tmp_path, model, report=lambda *counts: seen.append(counts))
    assert model.asked == [["q0", "q1", "q2"], ["q3", "q4", "q5"], ["q6"]]
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)] and found.asked == 7
    assert found.summary["metrics"]["strict"]["final"] == 71.43 == percent([1] * 5 + [0] * 2)
    assert found.summary["split_sizes"] == {"all": 7} and found.summary["found"] == {"boxed": 7}
    kept = json.loads((tmp_path / "none.json").read_text())
    assert kept["summary"] == found.summary and kept["settings"]["k"] == 0
    row = json.loads((tmp_path / "none.jsonl").read_text().splitlines()[6])
    assert row == {
        "id": "q6", "split": "all", "kind": "open", "question": "What is q6?", "answers": ["answer 6"],
        "items_of": None, "reply": r"\boxed{answer unknown}", "answer": "answer unknown", "how": "boxed", "flags": [],
        "metrics": {"strict": 0.0, "strict_f1": 0.5, "comem_compat": 0.0},
    }  # fmt: skip


def test_check_38_a_run_that_died_asks_only_what_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Model(5, fails_at=2))
    path = tmp_path / "none.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the last of six lines
    model = Model(5)
    found = run(tmp_path, model)
    assert model.asked == [["q5", "q6"]] and found.asked == 2
    assert "the last line was cut off" in found.summary["notes"][0]
    assert [row["id"] for row in found.rows] == [f"q{at}" for at in range(7)]
    assert found.summary["metrics"] == run(tmp_path / "other", Model(5)).summary["metrics"]
    done = Model(5)
    assert run(tmp_path, done).asked == 0 and done.asked == []


def test_paired_differences_by_hand(tmp_path):
    none, memory = run(tmp_path, Model(3)), run(tmp_path, Model(5), "memory")
    found = pair(memory.rows, none.rows, "strict")["all"]
    assert (found.questions, found.first, found.second, found.difference) == (7, 71.43, 42.86, 28.57)
    assert (found.better, found.worse) == (2, 0)
    gaps = [0, 0, 0, 100, 100, 0, 0]
    mean = sum(gaps) / 7
    assert found.error == pytest.approx((sum((gap - mean) ** 2 for gap in gaps) / 6 / 7) ** 0.5, abs=0.005)
    assert pair(memory.rows[:1], none.rows[:1], "strict")["all"].error is None
    with pytest.raises(DataError, match="only one of them has q6"):
        pair(memory.rows[:6], none.rows, "strict")


def test_conditions_say_whose_items_stand_before_a_question():
    of = lambda condition: [one.meta["items_of"] for one in assign(QUESTIONS.questions, condition, 1)]  # noqa: E731
    ids = [question.id for question in QUESTIONS.questions]
    assert of("none") == [None] * 7 and of("memory") == ids == of("rag")
    shuffled = of("shuffled")
    assert sorted(shuffled) == ids and all(a != b for a, b in zip(shuffled, ids, strict=True))
    with pytest.raises(ConfigError, match="unknown condition 'shufled'.*shuffled"):
        of("shufled")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (4, 1, 1, 1, 1), (5, 4, 3, 2, 1), (1,) * 9])
def test_shuffled_items_are_of_another_image_and_all_are_used_once(seed, sizes):
    images = [f"i{group}" for group, size in enumerate(sizes) for _ in range(size)]
    asked = [dataclasses.replace(open_question(f"q{at}"), images=(image,)) for at, image in enumerate(images)]
    asked = asked[::2] + asked[1::2]
    found = partners(asked, seed)
    image = {question.id: question.images for question in asked}
    assert sorted(found) == sorted(image)
    assert all(image[other] != question.images for question, other in zip(asked, found, strict=True))
    assert found == partners(asked, seed)


def test_shuffling_needs_enough_other_images():
    asked = [dataclasses.replace(open_question(f"q{at}"), images=("same",)) for at in range(3)]
    with pytest.raises(DataError, match="3 of 4 questions are about one image"):
        partners([*asked, open_question("other")], 0)
    assert len({tuple(partners(QUESTIONS.questions, seed)) for seed in range(8)}) > 4
    stored = [
        dataclasses.replace(open_question(f"b{at}"), images=({"bytes": bytes([at // 2]), "path": None},))
        for at in range(4)
    ]
    assert set(partners(stored, 0)[:2]) == {"b2", "b3"}


def test_faults_of_evaluations(tmp_path):
    with pytest.raises(DataError, match="the model gave 2 replies to 3 questions, from q0 on"):
        run(tmp_path, lambda batch: ["x"] * 2)
    with pytest.raises(ConfigError, match="settings are about other questions"):
        evaluate(set_of(open_question()), Model(1), settings(), tmp_path, scoring.viquae)
    with pytest.raises(ConfigError, match="batch_size 0 must be at least 1"):
        evaluate(QUESTIONS, Model(1), settings(), tmp_path, scoring.viquae, batch_size=0)
    with pytest.raises(ConfigError, match="decode, temperature is missing or unknown"):
        settings_of(QUESTIONS, "none", Template("short"), 1, {"model": "m", "order": "rank", "temperature": 1})
    run(tmp_path / "a", Model(5))
    path = tmp_path / "a" / "none.jsonl"
    path.write_text(path.read_text().replace('"id": "q3"', '"id": "zz"'))
    with pytest.raises(DataError, match="has an answer to zz, which is no question of this evaluation"):
        run(tmp_path / "a", Model(5))


class Answering:
    """What the command line builds: knows InfoSeek's food with a memory, and the bridge always."""

    def __init__(self, **given):
        self.given = given

    def answer(self, questions, condition, template):
        assert template == Template("open", given=condition != "none")
        replies = {"What is the length of this bridge in metre?": "240"}
        if condition == "memory":
            replies["What is the country of origin of this food?"] = "the USA"
        return [f"Final answer: \\boxed{{{replies.get(question.text, '')}}}" for question in questions]

    def facts(self, condition):
        return FACTS if condition == "none" else FACTS | {"memory": "m", "bank_size": 3, "bank_digest": "d"}


@pytest.fixture
def flags(tmp_path, monkeypatch):
    module = types.ModuleType("jaxmem.evaluation.knowledge.answering")
    module.built = []
    module.build = lambda **given: module.built.append(given) or Answering(**given)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    draw(tmp_path / "images", *(f"{row['image_id']}.jpg" for row in worlds.INFOSEEK))
    return {
        "benchmark": "infoseek",
        "questions": [str(write_lines(tmp_path / "val.jsonl", worlds.INFOSEEK))],
        "annotations": [str(write_lines(tmp_path / "qtype.jsonl", worlds.INFOSEEK_TYPES))],
        "images": str(tmp_path / "images"),
        "subset": None,
        "model": "folder",
        "memory": "memory",
        "bank": "bank",
        "index": None,
        "k": 10,
        "condition": [],
        "out": str(tmp_path / "out"),
        "limit": 0,
        "json": True,
    }


def test_the_command_line_in_json(flags, capsys, tmp_path):
    assert cli.main(**flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["conditions"]) == ["none", "memory", "shuffled"]
    scores = {name: one["summary"]["metrics"]["strict"] for name, one in found["conditions"].items()}
    assert scores["none"]["splits"] == {"unseen_question": 50.0, "unseen_entity": 0.0}
    assert scores["memory"]["splits"] == {"unseen_question": 100.0, "unseen_entity": 0.0}
    assert scores["memory"]["all"] == 66.67 and scores["memory"]["final"] == 0.0
    assert scores["shuffled"] == scores["none"]
    gap = found["pairs"]["memory - none"]["strict"]["unseen_question"]
    assert (gap["difference"], gap["better"], gap["worse"], gap["questions"]) == (50.0, 1, 0, 2)
    assert list(found["pairs"]) == ["memory - none", "shuffled - none", "shuffled - memory"]
    kept = json.loads((tmp_path / "out" / "shuffled.json").read_text())["settings"]
    assert (kept["k"], kept["bank_size"], kept["condition"]) == (10, 3, "shuffled")
    assert kept["split_sizes"] == {"unseen_question": 2, "unseen_entity": 1}
    module = sys.modules["jaxmem.evaluation.knowledge.answering"]
    assert len(module.built) == 1 and module.built[0]["conditions"] == ("none", "memory", "shuffled")


def test_the_command_line_in_words(flags, capsys, tmp_path):
    cli.main(**flags | {"json": False, "condition": ["none", "memory"], "annotations": []})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "infoseek: 3 questions"
    assert lines[2].split() == ["strict", "questions", "none", "memory", "memory", "-", "none"]
    assert lines[3].split()[:4] == ["unseen_question", "2", "50.00", "100.00"] and "+50.00 ± 50.00 (+1 -0)" in lines[3]
    assert [line.split()[0] for line in lines if line.startswith(("strict", "comem"))] == [
        "strict", "comem_compat", "comem_compat_contains"]  # fmt: skip
    assert any(line.startswith("none: 2 without an answer; ") for line in lines)
    assert lines[-1].startswith("note: no file of question types")
    with pytest.raises(ConfigError, match="template is .*not .*take another output folder"):
        cli.main(**flags | {"condition": ["none"], "annotations": [], "text_first": True, "memory": None})


def test_what_the_command_line_needs(flags):
    for change, message in (
        ({"benchmark": None}, "eval needs --benchmark of infoseek, oven"),
        ({"out": None}, "eval needs --out"),
        ({"questions": []}, "eval needs --questions=FILE"),
        ({"condition": ["memry"]}, "unknown condition 'memry'; there are none, memory, shuffled, rag"),
        ({"condition": ["memory"], "memory": None}, "condition memory needs --memory"),
        ({"limit": 1}, "1 of 1 questions are about one image"),
        ({"bank": None}, "condition memory needs --bank"),
        ({"condition": ["rag"], "k": 0}, "condition rag needs --k of at least 1, got 0"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            cli.main(**flags | change)
    assert sys.modules["jaxmem.evaluation.knowledge.answering"].built == []
