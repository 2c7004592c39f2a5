"""Self-synthesis: what is asked, kept, translated and written, through kills at every write, and what is refused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import jaxmem
from jaxmem import config as configs
from jaxmem.data import knowledge
from jaxmem.data.records import JsonlRecords, items_of, messages_of
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge.extraction import final_answer
from jaxmem.memory import comem
from jaxmem.retrieval import files
from jaxmem.training.synthesis import choosing, cli
from jaxmem.training.synthesis import run as running
from jaxmem.training.synthesis.journal import Journal
from jaxmem.training.synthesis.settings import SynthesisConfig
from tests.evaluation.knowledge.lookup_world import BUCKETS, GREYS, Shades
from tests.memory import comem_world
from tests.training import synthesis_world as world
from tests.training.synthesis_world import Knowing, content, lines, run, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(sections, folder of a finished synthesis, its manifest, what the model was asked)."""
    root = tmp_path_factory.mktemp("synthesis")
    sections, model = write_world(root), Knowing()
    return sections, root / "out", run(sections, root / "out", model), model.calls


def nearest(grey):
    return sorted((f"g{one}" for one in GREYS), key=lambda name: abs(int(name[1:]) - grey - 1e-3))[:3]


def grey_of(key):
    return int(key.rpartition("/")[2][1:])


def test_questions_are_asked_behind_their_items_in_vanilla_rag_format(made):
    _, folder, _, calls = made
    rows = {row["key"]: row for row in lines(folder / "questions.jsonl")}
    assert len(rows) == 12 and [row["source"] for row in rows.values()] == ["seek"] * 6 + ["viquae"] * 6
    for key, row in rows.items():
        assert [item["id"] for item in row["items"]] == nearest(grey_of(key)) and row["lost"] == []
    chats, _, decode = calls[0]
    assert decode == {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    first = next(iter(rows))
    chat, grey = chats[0], grey_of(first)
    shades = [turn["content"][1]["image"].getpixel((0, 0))[0] for turn in chat[:3]]
    assert [f"g{shade}" for shade in shades] == nearest(grey) and len(chat) == 4
    assert chat[0]["content"][0]["text"].startswith("the ") and chat[0]["content"][0]["text"].endswith(
        f"is {shades[0]}"
    )
    image, words = chat[3]["content"]
    assert image["image"].size == ((512, 512) if grey % 2 else (64, 64)) and f"what is {grey}?" in words["text"]
    assert all(len(chats) == 3 for chats, *_ in calls) and len(calls) == 8, "24 replies, 3 at once"


def test_replies_are_judged_and_the_first_right_one_is_kept(made):
    _, folder, manifest, _ = made
    replies = lines(folder / "rollouts.jsonl")
    assert [(row["key"], row["sample"]) for row in replies] == [
        (row["key"], sample) for row in lines(folder / "questions.jsonl") for sample in (0, 1)
    ]
    right = {}
    for row in replies:
        assert row["score"] == float(row["answer"] == str(grey_of(row["key"])))
        if row["score"] == 1 and row["stopped"]:
            right.setdefault(row["key"], row["reply"])
    train = [row for row in lines(folder / "train.jsonl") if row["language"] == "en"]
    assert {row["id"]: row["messages"][1]["content"] for row in train} == right and 6 < len(right) < 12
    for name in ("viquae", "seek"):
        own = [row for row in replies if row["key"].startswith(name)]
        counts = manifest["counts"][name]
        assert counts["questions"] == 6 and counts["replies"] == len(own) == 12
        assert counts["right"] == sum(row["score"] == 1 for row in own)
        assert counts["cut_off"] == sum(not row["stopped"] for row in own)
        assert counts["right_but_cut_off"] == sum(row["score"] == 1 and not row["stopped"] for row in own)
        assert counts["kept"] == sum(key.startswith(name) for key in right)
    total = {key: sum(counts[key] for counts in manifest["counts"].values()) for key in manifest["counts"]["seek"]}
    assert total["cut_off"] > 0 and total["right_but_cut_off"] > 0 and total["items_lost"] == 0


def test_samples_are_training_data(made):
    _, folder, _, _ = made
    records = JsonlRecords(folder / "train.jsonl")
    model = comem_world.pair("qwen3_vl")[0]
    for record in records:
        assert record.keys() == {"id", "messages", "items", "source", "language"}
        image = messages_of(record)[0]["content"][0]["image"]
        grey = grey_of(record["id"].partition("@")[0])
        assert Path(image).parts[-2] == ("images" if grey % 2 else "asked") and Path(image).is_absolute()
        assert Image.open(image).size == ((512, 512) if grey % 2 else (64, 64))
        assert Image.open(image).getpixel((0, 0)) == (grey,) * 3
        assert [Path(item["image"]).stem for item in items_of(record)] == [name[1:] for name in nearest(grey)]
    stored = lines(folder / "train.jsonl")
    odd = next(row for row in stored if grey_of(row["id"].partition("@")[0]) % 2)
    assert odd["messages"][0]["content"][0]["image"].startswith("images/"), "relative to the folder"
    small = next(record for record in records if "asked" in messages_of(record)[0]["content"][0]["image"])
    row = model.processor.encode(messages_of(small))
    assert "boxed" in model.processor.decode(row.tokens[row.loss_mask > 0])
    memory = comem.create(model.spec.backbone, **comem_world.SMALL)
    read = [knowledge.encode_item(model.processor, memory, item) for item in items_of(small)]
    assert [one.visual_count for one in read] == [4, 4, 4] and all(len(one) > 20 for one in read)


def test_some_samples_are_translated_once(made, tmp_path, monkeypatch):
    sections, folder, manifest, _ = made
    rows = lines(folder / "train.jsonl")
    others = [row for row in rows if row["language"] != "en"]
    assert [row["id"].partition("@")[2] for row in others] == ["fr"] * 4, "the boxes are lost in the others"
    originals = {row["id"]: row for row in rows}
    for row in others:
        base = originals[row["id"].partition("@")[0]]
        assert row["messages"][1]["content"] == "[fr] " + base["messages"][1]["content"]
        assert row["messages"][0]["content"][1]["text"] == "[fr] " + base["messages"][0]["content"][1]["text"]
        assert (row["items"], row["messages"][0]["content"][0]) == (base["items"], base["messages"][0]["content"][0])
    counts = manifest["counts"].values()
    assert sum(one["translations"] for one in counts) == 8
    assert sum(one["translations_without_box"] for one in counts) == 4 == sum(one["translated"] for one in counts)
    _interrupted(sections, tmp_path / "out", monkeypatch, lambda path: path.name == "train.jsonl.partial")
    world.TRANSLATED.clear()
    run(sections, tmp_path / "out")
    assert world.TRANSLATED == [], "stored results are not asked for again"
    with pytest.raises(DataError, match="broken made 5 texts of 6 in fr"):
        run(sections, tmp_path / "b", translation__function="tests.training.synthesis_world:broken")
    with pytest.raises(ConfigError, match="'nowhere:f'.*write package.module:function"):
        run(sections, tmp_path / "c", translation__function="nowhere:f")
    plain = run(sections, tmp_path / "d", translation__function="")
    assert "translations.jsonl" not in plain["outputs"] and not (tmp_path / "d" / "translations.jsonl").exists()


def _interrupted(sections, output, monkeypatch, when):
    """Runs until `when(path)` of a write holds: half of that write reaches the disk, then the process is gone."""
    real = files.write

    def write(file, chunk):
        if when(Path(file.name)):
            real(file, chunk[: len(chunk) // 2])
            raise KeyboardInterrupt
        real(file, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        try:
            run(sections, output)
        except KeyboardInterrupt:
            return True
    return False


def test_a_kill_at_any_write_changes_nothing(made, tmp_path, monkeypatch):
    sections, folder, _, _ = made
    wanted, at = content(folder), 0
    while True:
        left = iter(range(at + 1))
        output = tmp_path / f"killed_{at}"
        died = _interrupted(sections, output, monkeypatch, lambda path, left=left, last=at: next(left) == last)
        if not died:
            break
        model = Knowing()
        run(sections, output, model)
        found = content(output)
        assert found.keys() == wanted.keys(), at
        assert all(found[name] == wanted[name] for name in wanted), at
        shutil.rmtree(output)
        at += 1
    assert at > 17, "header, questions, eight batches, translations, images, samples, manifest"
    assert content(output) == wanted


def test_a_kill_loses_one_batch_at_most(made, tmp_path):
    sections, folder, _, _ = made
    model = Knowing()
    real, done = model.generate, []

    def dying(chats, **others):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return real(chats, **others)

    model.generate = dying
    with pytest.raises(KeyboardInterrupt):
        run(sections, tmp_path / "out", model)
    path = tmp_path / "out" / "rollouts.jsonl"
    assert len(lines(path)) == 15
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:13]) + b'{"key": "vi')
    model = Knowing()
    run(sections, tmp_path / "out", model)
    assert len(model.calls) == 4, "the torn batch and the three that were missing"
    assert content(tmp_path / "out") == content(folder)
    again = Knowing()
    assert run(sections, tmp_path / "out", again)["finished"] and again.calls == []


def test_replies_do_not_depend_on_batches_or_on_other_questions(made, tmp_path):
    sections, folder, _, _ = made
    replies = lambda path: {(row["key"], row["sample"]): row["reply"] for row in lines(path / "rollouts.jsonl")}  # noqa: E731
    wanted = replies(folder)
    run(sections, tmp_path / "a", rollout__batch_size=5)
    assert replies(tmp_path / "a") == wanted
    alone = {"seek": sections["sources"]["seek"] | {"count": 3}}
    run(sections, tmp_path / "b", sources=alone)
    found = replies(tmp_path / "b")
    assert len(found) == 6 and all(wanted[name] == reply for name, reply in found.items())
    run(sections, tmp_path / "c", seed=8)
    other = replies(tmp_path / "c")
    shared = wanted.keys() & other.keys()
    assert shared and any(wanted[name] != other[name] for name in shared)


def test_the_manifest_holds_everything(made):
    sections, folder, manifest, _ = made
    assert json.loads((folder / "manifest.json").read_text()) == manifest and manifest["finished"]
    sha = lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest()  # noqa: E731
    named = [sections["retrieval"]["items"], *(one["questions"][0] for one in sections["sources"].values())]
    assert manifest["inputs"]["files"] == {path: sha(path) for path in named}
    index = Path(sections["retrieval"]["index"])
    assert manifest["inputs"]["index"] == {
        name: sha(index / name) for name in ("ids.json", "index.json", "vectors.bin")
    }
    assert manifest["inputs"]["embedder"] == "s" * 64 and len(manifest["inputs"]["model"]["fingerprint"]) == 64
    assert manifest["settings"]["seed"] == 7 and manifest["settings"]["rollout"]["temperature"] == 1.0
    assert manifest["jaxmem"] == jaxmem.__version__ and "output" not in manifest["settings"]
    assert manifest["mixture"] == {
        "viquae": {"benchmark": "viquae", "weight": 1.0, "asked": 6, "available": 11, "reached": 6},
        "seek": {"benchmark": "infoseek", "weight": 1.0, "asked": 6, "available": 6, "reached": 6},
    }
    outputs = ("questions.jsonl", "rollouts.jsonl", "translations.jsonl", "train.jsonl")
    assert manifest["outputs"] == {name: sha(folder / name) for name in outputs}


def test_changed_inputs_are_refused_by_name(made, tmp_path):
    sections = write_world(tmp_path)
    run(sections, tmp_path / "out")
    items = Path(sections["retrieval"]["items"])
    cases = (
        ({"seed": 8}, "settings.seed: stored 7, this run has 8"),
        ({"rollout__temperature": 0.5}, "settings.rollout.temperature: stored 1.0, this run has 0.5"),
        ({"retrieval__k": 2}, "settings.retrieval.k: stored 3, this run has 2"),
    )
    for change, message in cases:
        with pytest.raises(ConfigError, match=f"{message}.*take another output folder"):
            run(sections, tmp_path / "out", **change)
    kept = items.read_bytes()
    items.write_bytes(kept + b"\n")
    with pytest.raises(ConfigError, match=r"inputs.files..*items.jsonl: stored \w+, this run has \w+"):
        run(sections, tmp_path / "out")
    items.write_bytes(kept)
    run(sections, tmp_path / "out")
    vectors = tmp_path / "index" / "vectors.bin"
    data = vectors.read_bytes()
    vectors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"inputs.index.vectors.bin: stored"):
        run(sections, tmp_path / "out")
    vectors.write_bytes(data)
    (tmp_path / "out" / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="train.jsonl changed since the synthesis was finished"):
        run(sections, tmp_path / "out")


def test_changed_images_are_refused_where_they_are_used(made, tmp_path, monkeypatch):
    sections = write_world(tmp_path)
    assert _interrupted(sections, tmp_path / "out", monkeypatch, lambda path: path.name == "rollouts.jsonl")
    key = lines(tmp_path / "out" / "questions.jsonl")[0]["key"]
    picture = tmp_path / "asked" / f"{grey_of(key)}.png"
    kept = picture.read_bytes()
    Image.new("RGB", (64, 64)).save(picture)
    with pytest.raises(DataError, match=f"question {key} or its image changed since its items were found"):
        run(sections, tmp_path / "out")
    picture.write_bytes(kept)
    item = tmp_path / "known" / f"{nearest(grey_of(key))[0][1:]}.png"
    Image.new("RGB", (64, 64)).save(item)
    with pytest.raises(DataError, match=f"item 'g{item.stem}' or its image changed since it was found"):
        run(sections, tmp_path / "out")


def test_check_30_questions_stay_when_items_lack_images(made, tmp_path):
    sections = write_world(tmp_path)
    path = Path(sections["retrieval"]["items"])
    rows = [row | ({"image": None} if row["id"] == "g60" else {}) for row in lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("50", "40"):
        (tmp_path / "known" / f"{name}.png").write_bytes(b"cut")
    manifest = run(sections, tmp_path / "out")
    found = {row["key"]: row for row in lines(tmp_path / "out" / "questions.jsonl")}
    assert len(found) == 12
    for key, row in found.items():
        wanted = nearest(grey_of(key))
        assert [one["id"] for one in row["items"]] == [one for one in wanted if one not in ("g40", "g50", "g60")]
        assert [one["id"] for one in row["lost"]] == [one for one in wanted if one in ("g40", "g50", "g60")]
    empty = [row for row in found.values() if not row["items"]]
    reasons = {one["id"]: one["reason"] for row in empty for one in row["lost"]}
    assert reasons.keys() == {"g40", "g50", "g60"} and reasons["g60"] == "it has no image"
    assert "not an image" in reasons["g40"] and "40.png" in reasons["g40"]
    counts = manifest["counts"].values()
    assert sum(one["items_lost"] for one in counts) == sum(len(row["lost"]) for row in found.values()) > 0
    assert sum(one["items"] for one in counts) + sum(one["items_lost"] for one in counts) == 36
    assert sum(one["questions_with_fewer_items"] for one in counts) == sum(bool(row["lost"]) for row in found.values())
    kept = [row for row in lines(tmp_path / "out" / "train.jsonl") if row["items"] == []]
    assert all(row["id"].partition("@")[0] in {one["key"] for one in empty} for row in kept) and kept


def test_mixtures_by_hand(made):
    sections = made[0]
    source = world.settings(sections, "x").sources["viquae"]
    of = lambda *pairs: {f"s{at}": dataclasses.replace(source, weight=w, count=c) for at, (w, c) in enumerate(pairs)}  # noqa: E731
    assert choosing.shares(of((1, 0), (1, 4)), {"s0": 9, "s1": 9}, 0) == {"s0": 9, "s1": 4}
    assert choosing.shares(of((1, 0), (1, 0), (1, 0)), {}, 10) == {"s0": 4, "s1": 3, "s2": 3}
    assert choosing.shares(of((2, 0), (1, 0), (0.5, 0)), {}, 100) == {"s0": 57, "s1": 29, "s2": 14}
    assert choosing.shares(of((2, 20), (1, 0)), {}, 90) == {"s0": 20, "s1": 30}
    assert choosing.draw(range(50), 5, 3, "a") == choosing.draw(range(50), 9, 3, "a")[:5]
    assert choosing.draw(range(50), 9, 3, "a") != choosing.draw(range(50), 9, 3, "b")
    assert sorted(choosing.draw(range(50), 99, 3, "a")) == list(range(50))
    counts = np.bincount([one for seed in range(400) for one in choosing.draw(range(8), 2, seed, "a")], minlength=8)
    assert counts.min() > 60 and counts.max() < 140, "100 of each are expected"


def test_a_mixture_by_weight(made, tmp_path):
    sections = made[0]
    sources = {name: one | {"count": 0} for name, one in sections["sources"].items()}
    sources["seek"]["weight"] = 3.0
    found = run(sections, tmp_path / "out", sources=sources, total=12)
    numbers = {name: (one["asked"], one["reached"]) for name, one in found["mixture"].items()}
    assert numbers == {"viquae": (3, 3), "seek": (9, 6)}, "seek has only six; nobody makes up for it"
    assert {name: one["questions"] for name, one in found["counts"].items()} == {"viquae": 3, "seek": 6}


def test_faults_of_settings(made, tmp_path):
    sections = made[0]
    cases = (
        ({"rollout__temperature": 0.0}, "2 samples at temperature 0 are all the same"),
        ({"rollout__batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"retrieval__k": 0}, "retrieval.k 0 must be at least 1"),
        ({"sources": {}}, "needs an output folder, and sources"),
        ({"sources": {"inforseek": sections["sources"]["seek"] | {"benchmark": ""}}}, "unknown benchmark 'inforseek'"),
        ({"sources": {"seek": {"question": ["x"]}}}, "unknown key 'config.sources.seek.question'"),
        ({"translation__languages": ["fr", "fr"]}, "names one twice"),
        ({"judge": {"metric": "strikt"}}, "judge.metric 'strikt' is none of the scores of seek: strict, comem_compat"),
    )
    for change, message in cases:
        with pytest.raises(ConfigError, match=message):
            run(sections, tmp_path / "out", **change)


def test_a_journal_takes_up_where_it_was_torn(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, ("key",)).add([{"key": "a"}, {"key": "é"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b"}')
    journal = Journal(path, ("key",))
    assert list(journal.rows) == [("a",), ("é",)] and path.read_bytes() == whole
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"j.jsonl:3: \('a',\) stands on an earlier line"):
        Journal(path, ("key",))
    path.write_bytes(whole + b"[]\n")
    with pytest.raises(DataError, match="j.jsonl:3: not a line of this file"):
        Journal(path, ("key",))


class Ending:
    """The tiny model, as if it always came to an end."""

    def __init__(self):
        self.model = comem_world.pair("qwen3_vl")[0]

    def generate(self, chats, **others):
        return [dataclasses.replace(one, stopped=True) for one in self.model.generate(chats, **others)]


def test_the_tiny_model_learns_from_what_it_says_itself(tmp_path):
    sections = write_world(tmp_path)
    source = sections["sources"]["viquae"] | {"count": 3}
    shape = {"tokens": BUCKETS.tokens, "patches": (64, 1024, 2048, 4096)}
    rollout = {"batch_size": 2, "samples": 1, "temperature": 0.0, "max_new_tokens": 3, "buckets": shape}
    changes = {"sources": {"viquae": source}, "rollout": rollout, "translation": {}, "looks": {"side": 64}}
    with pytest.raises(DataError, match="none of 3 replies can be kept: 3 were cut off, the others are wrong"):
        run(sections, tmp_path / "cut", comem_world.pair("qwen3_vl")[0], **changes)
    said = {row["key"]: row["reply"] for row in lines(tmp_path / "cut" / "rollouts.jsonl")}
    path = tmp_path / "viquae.jsonl"
    rows = lines(path)
    known = list(said)[:2]
    for row in rows:
        if (key := f"viquae/{row['id']}") in known:
            row["output"] = {"answer": [final_answer(said[key]).text]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = run(sections, tmp_path / "out", Ending(), **changes)
    train = lines(tmp_path / "out" / "train.jsonl")
    assert {row["id"]: row["messages"][1]["content"] for row in train} == {key: said[key] for key in known}
    assert (manifest["counts"]["viquae"]["right"], manifest["counts"]["viquae"]["kept"]) == (2, 2)


def test_the_command_line(made, tmp_path, monkeypatch, capsys):
    sections = made[0]
    monkeypatch.setattr(running, "_model", lambda config: Knowing())
    monkeypatch.setattr(running, "_embedder", lambda config: Shades())
    config = ConfigDict({**sections, "output": str(tmp_path / "out")})
    assert cli.main(config=config) == 0
    shown = capsys.readouterr()
    table = [line.split() for line in shown.out.splitlines()]
    assert table[0] == ["seek", "viquae"] and ["available", "6", "11"] in table and ["replies", "12", "12"] in table
    assert "24 of 24 replies" in shown.err and table[-1] == [f"{tmp_path}/out/train.jsonl"]
    cli.main(config=config, json=True)
    assert json.loads(capsys.readouterr().out)["counts"] == made[2]["counts"]


def test_the_shipped_configuration_has_the_papers_values():
    path = Path(__file__).parents[2] / "configs" / "comem_synthesis.py"
    config = configs.build(SynthesisConfig, configs.load(str(path), ["--config.sources.okvqa.count=10"]), "config")
    assert (config.retrieval.k, config.translation.count, len(config.translation.languages)) == (3, 200, 9)
    assert config.sources["okvqa"].count == 10 and set(config.sources) == {"infoseek", "okvqa"}
