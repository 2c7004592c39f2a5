"""What a model gets to read under every condition, and what its answers depend on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmem
from jaxmem import api
from jaxmem import cli as command
from jaxmem.data.items import ItemFile
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import answering, cli
from jaxmem.evaluation.knowledge.answering import DECODING, build
from jaxmem.evaluation.knowledge.conditions import assign
from jaxmem.evaluation.knowledge.lookup import bank_digest, queries
from jaxmem.evaluation.knowledge.prompts import Template, prompt
from jaxmem.evaluation.knowledge.running import settings_of
from jaxmem.evaluation.knowledge.shown import RULES, Looks
from jaxmem.retrieval.bank import Bank
from jaxmem.retrieval.encoder import ItemEncoder
from jaxmem.retrieval.index import open_index
from jaxmem.sampling import keys
from tests.evaluation.knowledge import worlds
from tests.evaluation.knowledge.lookup_world import (
    ASKED,
    BUCKETS,
    Shades,
    picture,
    question,
    write_bank,
    write_index,
    write_items,
)
from tests.helpers import write_tokenizer
from tests.memory import comem_world, transfer_world
from tests.retrieval.builder import HashEncoder
from tests.tiny import write_qwen3_vl

TEMPLATE = Template("short", given=True)
NEAREST = {12: ["g10", "g20", "g30"], 58: ["g60", "g50", "g40"], 33: ["g30", "g40", "g20"], 44: ["g40", "g50", "g30"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Items, their bank under the tiny model's CoMEM, and their index."""
    root = tmp_path_factory.mktemp("world")
    items = write_items(root)
    write_index(root, items)
    write_bank(root, items, ItemEncoder(comem_world.model(), 2, BUCKETS))
    return root


@pytest.fixture
def asked(folder):
    return [question(folder, grey) for grey in ASKED]


def settings(folder, questions, **others):
    paths = {name: folder / name for name in ("bank", "index")} | {"items": folder / "items.jsonl"}
    fixed = {"memory": None, "k": 3, "embedder": Shades(), "max_new_tokens": 4, "batch_size": 4, "buckets": BUCKETS}
    given = {"questions": questions, "model": comem_world.model(), "conditions": ("memory", "shuffled", "rag")}
    return given | paths | fixed | others


@pytest.fixture
def reached(monkeypatch):
    """What every call of `Model.generate` was given, and how likely its tokens were: (memories of the model, chats,
    items, logprobs)."""
    calls, real = [], api.Model.generate

    def generate(self, chats, *, items=None, **others):
        found = real(self, chats, items=items, **others)
        calls.append((self.spec.memories, chats, items, [one.logprobs for one in found]))
        return found

    monkeypatch.setattr(api.Model, "generate", generate)
    return calls


def words(chat):
    return [[part.get("text", "image") for part in turn["content"]] for turn in chat]


def test_conditions_differ_in_what_reaches_the_model(folder, asked, reached):
    answers = build(**settings(folder, asked, conditions=("none", "memory", "shuffled", "rag")))
    replies, model = {}, comem_world.model()
    for condition in ("none", "memory", "shuffled", "rag"):
        replies[condition] = answers.answer(assign(asked, condition, 1), condition, TEMPLATE)
    none, memory, shuffled, rag = reached
    plain = [[["image", prompt(one, TEMPLATE)]] for one in asked]
    assert none[0] == () and none[2] is None and list(map(words, none[1])) == plain
    assert [c.name for c in memory[0]] == ["comem"] and list(map(words, memory[1])) == plain
    fresh = {name: model.encode_items([item], batch=2, buckets=BUCKETS)[0] for name, item in _items(folder).items()}
    for row, grey in enumerate(ASKED):
        wanted = np.stack([fresh[name] for name in NEAREST[grey]])
        assert memory[2][row].shape == (3, 3, wanted.shape[-1])
        np.testing.assert_array_equal(memory[2][row], wanted.astype(memory[2][row].dtype))
    others = [one.meta["items_of"] for one in assign(asked, "shuffled", 1)]
    for row, other in enumerate(others):
        np.testing.assert_array_equal(shuffled[2][row], memory[2][[one.id for one in asked].index(other)])
        assert other != asked[row].id and not np.array_equal(shuffled[2][row], memory[2][row])
    assert list(map(words, shuffled[1])) == plain and [c.name for c in shuffled[0]] == ["comem"]
    assert rag[0] == () and rag[2] is None
    assert words(rag[1][0]) == [
        ["the number is 10", "image"],
        ["the dog is 20", "image"],
        ["the animal is 30", "image"],
        plain[0][0],
    ]
    assert [turn["content"][1]["image"].getpixel((0, 0))[0] for turn in rag[1][0][:3]] == [10, 20, 30]
    assert all(len({call[3][row] for call in reached}) == 4 for row in range(4)), "no two of them are told alike"
    assert replies["none"] != replies["memory"] != replies["rag"] != replies["none"]
    assert answers.lookup.embedder.calls == 1, "items are looked up once"


def _items(folder):
    items = ItemFile(folder / "items.jsonl")
    return dict(zip(items.ids, map(items.__getitem__, range(len(items))), strict=True))


def test_check_27_items_of_the_bank_answer_like_items_that_are_encoded_anew(folder, asked):
    answers, model, known = build(**settings(folder, asked)), comem_world.model(), _items(folder)
    own = assign(asked, "memory")
    chats = [[{"role": "user", "content": [{"type": "image", "image": one.images[0]},
              {"type": "text", "text": prompt(one, TEMPLATE)}]}] for one in asked]  # fmt: skip
    vectors = [model.encode_items([known[name] for name in NEAREST[grey]], buckets=BUCKETS) for grey in ASKED]
    rounded = [jax.numpy.asarray(one, jax.numpy.bfloat16) for one in vectors]
    direct = model.generate(chats, items=rounded, max_new_tokens=4, buckets=BUCKETS)
    assert answers.answer(own, "memory", TEMPLATE) == [one.text for one in direct]


def test_replies_depend_on_the_question_and_not_on_its_batch(folder, asked):
    answers = build(**settings(folder, asked, conditions=("memory",), seed=3))
    drawn = dataclasses.replace(answers, decode=dict(answers.decode) | {"temperature": 1.0})
    own = assign(asked, "memory")
    together = drawn.answer(own, "memory", TEMPLATE)
    assert drawn.answer(own[:0], "memory", TEMPLATE) == []
    swapped = drawn.answer([own[2], own[0], own[3]], "memory", TEMPLATE)
    assert swapped == [together[2], together[0], together[3]]
    other = dataclasses.replace(drawn, seed=4).answer(own, "memory", TEMPLATE)
    assert other != together
    assert answers._rows(1) == 1 and answers._rows(3) == 4 == answers._rows(4) and answers._rows(7) == 7


def test_keys_follow_from_names():
    data = lambda seed, *names: np.asarray(jax.random.key_data(keys.named(seed, names))).tolist()  # noqa: E731
    a, b = data(0, "a", "b")
    assert data(0, "b", "a", "a") == [b, a, a] and a != b and data(1, "a") != [a]


def test_check_38_facts_hold_everything_that_answers_depend_on(folder, asked):
    answers = build(**settings(folder, asked, decode="comem", max_new_tokens=0, seed=5))
    bank = Bank.open(folder / "bank")
    none, memory, rag = (answers.facts(name) for name in ("none", "memory", "rag"))
    assert none["decode"] == {"name": "comem", **DECODING["comem"], "seed": 5}
    assert (none["decode"]["temperature"], none["decode"]["top_p"]) == (0.1, 0.001)
    assert (none["decode"]["repetition_penalty"], none["decode"]["max_new_tokens"]) == (1.05, 1000)
    assert none["extra"] == {"query_images": "squash", "side": 512, "dtype": "float32"}
    assert not {"memory", "bank_size", "index"} & none.keys()
    assert memory["memory"] == ItemEncoder(comem_world.model()).digest[:16] and memory["order"] == "rank"
    assert (memory["bank_size"], memory["bank_digest"]) == (6, bank_digest(bank))
    assert memory["index"] == f"exact, 6 items, embedder {'s' * 16}"
    assert rag["extra"] | {"text_limit": 5000} == rag["extra"] and len(rag["extra"]["items"]) == 16
    assert "memory" not in rag and rag["bank_digest"] == memory["bank_digest"]
    kept = settings_of(worlds.set_of(*asked), "memory", TEMPLATE, 3, memory)
    assert kept.bank_size == 6 and kept.k == 3
    spec = answers.model.spec
    turned = dataclasses.replace(spec, memories=(dataclasses.replace(spec.comem, order="reverse"),))
    other = dataclasses.replace(answers, model=dataclasses.replace(answers.model, spec=turned)).facts("memory")
    assert other["order"] == "reverse" and other["memory"] != memory["memory"]


def test_banks_with_other_contents_have_other_digests(folder, tmp_path):
    items = write_items(tmp_path)
    one = Bank.open(write_bank(tmp_path, items, HashEncoder(), "one"))
    again = Bank.open(write_bank(tmp_path, items, HashEncoder(), "again"))
    other = Bank.open(write_bank(tmp_path, items, HashEncoder(scale=2.0), "other"))
    assert bank_digest(one) == bank_digest(again) != bank_digest(other) != bank_digest(Bank.open(folder / "bank"))


def test_what_conditions_need(folder, asked):
    cases = (
        ({"index": None}, "condition memory needs --index"),
        ({"embedder": None, "bank": None}, "condition memory needs --bank, --embedder"),
        ({"items": None}, "condition rag needs --items"),
        ({"decode": "gredy"}, "unknown way to decode 'gredy'; did you mean 'greedy'"),
        ({"query_images": "square_"}, "unknown rule for the images of questions 'square_'; did you mean 'square'"),
        ({"model": comem_world.pair("qwen3_vl")[0]}, "the model has no CoMEM"),
    )
    for change, message in cases:
        with pytest.raises(ConfigError, match=message):
            build(**settings(folder, asked, **change))
    bare = build(**settings(folder, asked, conditions=("none",), bank=None, index=None, embedder=None, items=None))
    assert bare.lookup is None and bare.items is None
    with pytest.raises(ConfigError, match="no index to find items in"):
        bare.facts("memory")


def test_bank_index_and_embedder_must_belong_together(folder, asked, tmp_path):
    model = comem_world.model()
    other = dataclasses.replace(model, memory=jax.tree.map(lambda leaf: 2 * leaf, model.memory))
    with pytest.raises(DataError, match="was made by encoder .*, this one is"):
        build(**settings(folder, asked, model=other))
    with pytest.raises(DataError, match="was made by embedder ssss.*, this one is tttt"):
        build(**settings(folder, asked, embedder=Shades(digest="t" * 64)))
    shutil.copytree(folder / "index", tmp_path / "index")
    open_index(tmp_path / "index").add(["newer"], Shades().one(12.0)[None])
    lacking = build(**settings(folder, asked, index=tmp_path / "index"))
    with pytest.raises(DataError, match="the index has items that bank .* lacks: 'newer'; add them"):
        lacking.answer(assign(asked, "memory"), "memory", TEMPLATE)
    answers = build(**settings(folder, asked))
    odd = [dataclasses.replace(asked[0], meta={"items_of": "elsewhere"})]
    with pytest.raises(DataError, match="question q12: no items were looked up for 'elsewhere'"):
        answers.answer(odd, "memory", TEMPLATE)


def test_missing_images_and_texts_of_items_are_named(folder, asked, tmp_path):
    items = write_items(tmp_path)
    rows = [json.loads(line) for line in items.path.read_text().splitlines()]
    rows[3] |= {"text": None}  # g10
    rows[1] |= {"image": None}  # g20
    items.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = build(**settings(folder, asked, items=items.path))
    extra = answers.facts("rag")["extra"]
    assert (extra["without_text"], extra["without_image"]) == ("1: 'g10'", "1: 'g20'")
    (tmp_path / "known" / "60.png").unlink()
    with pytest.raises(DataError, match=r"no file for 1 image\(s\) of items: 'g60' \(.*60.png\); restore them"):
        build(**settings(folder, asked, items=items.path)).facts("rag")
    (tmp_path / "known" / "60.png").write_bytes(b"cut")
    with pytest.raises(DataError, match="image 0 of item 'g60'.*not an image"):
        build(**settings(folder, asked, items=items.path)).answer(assign(asked, "rag")[1:2], "rag", TEMPLATE)
    items.path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(DataError, match="no item with the id 'g50'"):
        build(**settings(folder, asked, items=items.path)).facts("rag")


def test_questions_without_an_image_are_looked_up_by_their_words(folder, asked):
    spoken = dataclasses.replace(asked[0], id="spoken", text="41", images=())
    found = queries([asked[0], spoken, asked[1]], Shades(reads=True))
    np.testing.assert_allclose(found, [Shades().one(grey) for grey in (12, 41, 58)], rtol=1e-6)
    with pytest.raises(DataError, match="no image to look items up by.*questions 'spoken'"):
        queries([asked[0], spoken], Shades())
    answers = build(**settings(folder, [*asked, spoken], embedder=Shades(reads=True)))
    assert answers.lookup.ids["spoken"] == ("g40", "g50", "g30")


def test_images_of_questions_by_rule(tmp_path):
    shapes = {(900, 300): {}, (512, 200): {}, (64, 48): {}}
    for size in shapes:
        shapes[size] = {name: rule(Image.new("RGB", size), 512).size for name, rule in RULES.items()}
    assert shapes[900, 300] == {"squash": (512, 512), "square": (512, 512), "stored": (900, 300), "pooled": (57, 19)}
    assert shapes[512, 200] == {"squash": (512, 200), "square": (512, 512), "stored": (512, 200), "pooled": (64, 25)}
    assert shapes[64, 48] == {"squash": (64, 48), "square": (512, 512), "stored": (64, 48), "pooled": (64, 48)}
    wide = dataclasses.replace(question(tmp_path, 7), images=(picture(tmp_path, 7, (600, 20)),))
    assert Looks().question(wide).images[0].size == (512, 512)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, 0)).convert("RGB")
    pooled = np.asarray(RULES["pooled"](ramp, 512))[:, :, 0]
    np.testing.assert_allclose(pooled[0], np.arange(256).reshape(64, 4).mean(1), atol=1.0)
    with pytest.raises(DataError, match="image 0 of question q8.*there is no file"):
        Looks().question(dataclasses.replace(wide, id="q8", images=("nowhere.png",)))


def test_the_command_line_from_folders_to_result_files(folder, tmp_path, monkeypatch, capsys):
    write_tokenizer(tmp_path / "model")
    write_qwen3_vl(tmp_path / "model", seed=5)
    comem_world.model().save(tmp_path / "memory")
    loaded = jaxmem.load(tmp_path / "model", memory=tmp_path / "memory")
    write_bank(tmp_path, ItemFile(folder / "items.jsonl"), ItemEncoder(loaded, 2, BUCKETS))
    made = []
    monkeypatch.setattr(answering, "_embedder", lambda path: made.append(path) or Shades())
    rows = [
        {"id": f"v{grey}", "input": "what number?", "image": f"{grey}.png", "output": {"answer": [str(grey)]}}
        for grey in ASKED
    ]
    for grey in ASKED:
        picture(tmp_path / "images", grey)
    flags = {
        "benchmark": "viquae", "questions": [str(worlds.write_lines(tmp_path / "q.jsonl", rows))], "annotations": [],
        "images": str(tmp_path / "images"), "subset": None, "model": str(tmp_path / "model"),
        "memory": str(tmp_path / "memory"), "bank": str(tmp_path / "bank"), "index": str(folder / "index"), "k": 2,
        "condition": ["none", "memory"], "out": str(tmp_path / "out"), "limit": 0, "json": True,
        "items": str(folder / "items.jsonl"), "embedder": "clip", "max_new_tokens": 2, "batch_size": 2,
    }  # fmt: skip
    assert cli.main(**flags) == 0 and made == ["clip"]
    found = json.loads(capsys.readouterr().out)
    assert {name: one["asked"] for name, one in found["conditions"].items()} == dict.fromkeys(flags["condition"], 4)
    kept = json.loads((tmp_path / "out" / "memory.json").read_text())["settings"]
    assert kept["model"].startswith("model ") and (kept["k"], kept["bank_size"]) == (2, 6)
    assert kept["decode"] == {"name": "greedy", **DECODING["greedy"], "max_new_tokens": 2}
    assert kept["template"]["given"] and kept["memory"] == ItemEncoder(loaded).digest[:16]
    cli.main(**flags)
    again = json.loads(capsys.readouterr().out)
    assert {one["asked"] for one in again["conditions"].values()} == {0}
    with pytest.raises(ConfigError, match="decode is .*not .*take another output folder"):
        cli.main(**flags | {"max_new_tokens": 3})


def test_the_command_line_with_an_encoder_beside_a_decoder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answering, "_embedder", lambda path: Shades())
    transfer_world.write_target(tmp_path / "decoder")
    transfer_world.write_encoder(tmp_path / "encoder")
    transfer_world.model().save(tmp_path / "memory")
    about = {"memory": tmp_path / "memory", "encoder": tmp_path / "encoder"}
    model = jaxmem.load(tmp_path / "decoder", **about)
    write_bank(tmp_path, ItemFile(folder / "items.jsonl"), ItemEncoder(model, 2, BUCKETS))
    rows = [{"id": f"v{grey}", "input": "what number?", "image": f"{grey}.png"} for grey in ASKED]
    rows = [row | {"output": {"answer": [str(grey)]}} for row, grey in zip(rows, ASKED, strict=True)]
    for grey in ASKED:
        picture(tmp_path / "images", grey)
    words = ["eval", "--benchmark=viquae", "--k=2", "--condition=memory", "--max_new_tokens=3", "--json"]
    words += ["--embedder=clip"]
    paths = {name: tmp_path / name for name in ("bank", "images", "memory", "out")} | {"index": folder / "index"}
    words += [f"--{name}={path}" for name, path in paths.items()]
    words += [f"--questions={worlds.write_lines(tmp_path / 'q.jsonl', rows)}", f"--model={tmp_path / 'decoder'}"]
    assert command.main(words) == 2
    assert "another model reads items for this CoMEM" in capsys.readouterr().err
    assert command.main([*words, f"--encoder={tmp_path / 'encoder'}"]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"]["memory"]["asked"] == len(ASKED)
    kept = json.loads((tmp_path / "out" / "memory.json").read_text())["settings"]
    assert kept["memory"] == ItemEncoder(model).digest[:16]
