"""Each benchmark's published format is read back; what is wrong with a file is said with file and row."""

import pytest

from jaxmem.data.images import load_image
from jaxmem.errors import ConfigError, DataError
from jaxmem.evaluation.knowledge import benchmarks, cvqa, infoseek, mrag, okvqa, oven, viquae
from jaxmem.evaluation.knowledge.questions import Source, read_ids
from tests.evaluation.knowledge import worlds
from tests.evaluation.knowledge.worlds import draw, source, write_json, write_lines


@pytest.fixture
def seek(tmp_path):
    draw(tmp_path / "images", *(f"{row['image_id']}.jpg" for row in worlds.INFOSEEK))
    return {
        "questions": write_lines(tmp_path / "val.jsonl", worlds.INFOSEEK),
        "annotations": write_lines(tmp_path / "qtype.jsonl", worlds.INFOSEEK_TYPES),
        "images": tmp_path / "images",
    }


def test_infoseek_with_types_and_entities(seek, tmp_path):
    entities = write_lines(tmp_path / "withkb.jsonl", [{"data_id": "infoseek_val_00000070", "entity_id": "Q1"}])
    found = infoseek.read(source(seek["questions"], [seek["annotations"], entities], images=seek["images"]))
    assert [one.kind for one in found.questions] == ["string", "numerical", "time"]
    assert found.split_sizes == {"unseen_question": 2, "unseen_entity": 1} and found.notes == ()
    food, bridge, aircraft = found.questions
    assert food.answers == ("United States of America", "U.S.", "USA") and food.meta["entity_id"] == "Q1"
    assert bridge.meta["range"] == (213.3, 260.7) and bridge.meta["wikidata"] == 237.0
    assert aircraft.id == "infoseek_val_00050000" and aircraft.answers[0] == "20 December 1990"
    assert load_image(food.images[0]).size == (40, 30) and food.meta["image_id"] == "oven_05001186"


def test_infoseek_without_types_says_so(seek):
    found = infoseek.read(source(seek["questions"], images=seek["images"], language="zh"))
    assert [one.kind for one in found.questions] == ["string", "numerical", "string"]
    assert "no file of question types" in found.notes[0] and found.questions[0].language == "zh"


def test_infoseek_range_may_stand_alone(seek, tmp_path):
    row = worlds.INFOSEEK[1] | {"answer_eval": {"wikidata": 2.0, "range": [1.8, 2.2]}}
    found = infoseek.read(source(write_lines(tmp_path / "one.jsonl", [row]), images=seek["images"]))
    assert found.questions[0].meta["range"] == (1.8, 2.2) and found.questions[0].answers == ("1.8", "2.2")


def test_oven_sets_and_titles(tmp_path):
    rows = [*worlds.OVEN_QUERY, *worlds.OVEN_ENTITY]
    draw(tmp_path, *(f"shard/{row['image_id'][-2:]}/{row['image_id']}.JPEG" for row in rows))
    old = {key: value for key, value in worlds.OVEN_ENTITY[1].items() if key != "data_id"}
    old |= {"id": "x1", "data_split": "val_unseen"}
    query = write_lines(tmp_path / "oven_query_val.jsonl", worlds.OVEN_QUERY)
    entity = write_lines(tmp_path / "oven_entity_val.jsonl", [worlds.OVEN_ENTITY[0], old])
    titles = write_lines(tmp_path / "titles.jsonl", [*worlds.OVEN_TITLES[:3], {"id": "Q4933113", "content": "Bob"}])
    found, score = benchmarks.prepare("oven", source([query, entity], titles))
    assert found.split_sizes == dict.fromkeys(["query_seen", "query_unseen", "entity_seen", "entity_unseen"], 1)
    assert found.questions[3].id == "x1" and found.questions[0].answers == ("Q755737",)
    assert found.notes == ("1 questions ask for an entity that has no title, and cannot be answered",)
    assert score(found.questions[0], r"\boxed{a killdeer}").metrics == {"strict": 1.0, "comem_compat": 1.0}
    assert score(found.questions[1], r"\boxed{zzz}").answer is None


def test_okvqa_keeps_every_annotator(tmp_path):
    draw(tmp_path, "val2014/COCO_val2014_000000297147.jpg", "000000339761.jpg")
    found = okvqa.read(
        source(write_json(tmp_path / "q.json", worlds.OKVQA), write_json(tmp_path / "a.json", worlds.OKVQA_ANSWERS))
    )
    assert found.split_sizes == {"val2014": 2} and found.questions[0].id == "2971475"
    assert found.questions[0].answers == ("race",) * 6 + ("motocross",) * 2 + ("ride",) * 2
    assert found.questions[0].images[0].endswith("val2014/COCO_val2014_000000297147.jpg")


def test_aokvqa_has_direct_answers(tmp_path):
    draw(tmp_path / "coco", "val2017/000000461751.jpg")
    found = okvqa.read_a(source(write_json(tmp_path / "val.json", worlds.AOKVQA), images=tmp_path / "coco"))
    (one,) = found.questions
    assert len(one.answers) == 10 and one.split == "val" and one.choices == ()
    assert one.meta["correct_choice_idx"] == 3 and one.meta["difficult_direct_answer"] is False
    test = [{key: value for key, value in worlds.AOKVQA[0].items() if key != "direct_answers"}]
    with pytest.raises(DataError, match=r"test.json, entry 1: lacks direct_answers; the row has split, image_id"):
        okvqa.read_a(source(write_json(tmp_path / "test.json", test), images=tmp_path / "coco"))


def test_viquae_aliases(tmp_path):
    draw(tmp_path, "512px-Jackie_Wilson.png")
    (one,) = viquae.read(source(write_lines(tmp_path / "test.jsonl", worlds.VIQUAE))).questions
    assert one.answers == ("Levi's", "Levis", "Levi Strauss") and one.meta["wikidata_id"] == "Q313453"
    empty = [worlds.VIQUAE[0] | {"output": {"answer": []}}]
    with pytest.raises(DataError, match=r"test.jsonl:1: output is empty"):
        viquae.read(source(write_lines(tmp_path / "test.jsonl", empty)))


def test_mrag_lines_and_gold_images(tmp_path):
    draw(tmp_path, "0_query.jpg", "0_a.jpg", "0_b.jpg")
    files = source(write_lines(tmp_path / "mrag.jsonl", worlds.MRAG))
    (one,) = mrag.read(files).questions
    assert one.answers == ("B",) and one.choices[1] == "Yorkshire Terrier" and one.split == "Angle"
    assert "gold_images" not in one.meta
    gold = mrag.read(files, gold_images=True).questions[0].meta["gold_images"]
    assert [path.rpartition("/")[2] for path in gold] == ["0_a.jpg", "0_b.jpg"]
    wrong = [worlds.MRAG[0] | {"answer": "Cairn Terrier"}]
    with pytest.raises(DataError, match="answer 'Cairn Terrier' is not the text of choice B, 'Yorkshire Terrier'"):
        mrag.read(source(write_lines(tmp_path / "mrag.jsonl", wrong)))


def parquet(path, rows):
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def test_parquet_with_images_inside(tmp_path):
    draw(tmp_path, "x.png")
    stored = {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}
    rows = [worlds.MRAG[0] | {"image": stored, "gt_images": [stored], "retrieved_images": [stored], "id": str(at)}
            for at in range(3)]  # fmt: skip
    folder = tmp_path / "data"
    folder.mkdir()
    parquet(folder / "test-00000-of-00002.parquet", rows[:2])
    parquet(folder / "test-00001-of-00002.parquet", rows[2:])
    found = mrag.read(source(folder))
    assert [one.id for one in found.questions] == ["0", "1", "2"]
    assert load_image(found.questions[2].images[0]).getpixel((0, 0)) == (9, 60, 200)
    rows[1]["answer_choice"] = "E"
    with pytest.raises(DataError, match=r"bad.parquet, row 2: answer_choice is 'E'"):
        mrag.read(source(parquet(tmp_path / "bad.parquet", rows)))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot read .*torn.parquet"):
        mrag.read(source(tmp_path / "torn.parquet"))


def test_cvqa_options_numbers_and_languages(tmp_path):
    draw(tmp_path, "5919991134257.jpg", "77.jpg")
    files = source(write_lines(tmp_path / "cvqa.jsonl", worlds.CVQA))
    found = cvqa.read(files)
    china, nigeria = found.questions
    assert china.answers == ("3",) and china.choices[2] == "天坛" and china.language == "zh"
    assert nigeria.choices == ("a", "b", "c", "d") and nigeria.language == "en" and nigeria.answers == ("1",)
    assert found.split_sizes == {"Chinese/China": 1, "Igbo/Nigeria": 1}
    assert found.notes == ("prompts are in English for questions in Igbo",)
    assert cvqa.read(files, subsets=("Chinese/China",)).split_sizes == {"Chinese/China": 1}
    with pytest.raises(DataError, match="no question of Spanish/Spain, Russian/Russia, Bulgarian/Bulgaria, Portu"):
        benchmarks.prepare("cvqa_comem", files)


def test_unknown_keys_do_not_matter_and_needed_ones_are_named(seek, tmp_path):
    fuller = write_lines(tmp_path / "fuller.jsonl", [row | {"new_key": 1} for row in worlds.INFOSEEK])
    assert len(infoseek.read(source(fuller, images=seek["images"]))) == 3
    short = [worlds.INFOSEEK[0], {"data_id": "b", "question": "?", "image_id": None}]
    with pytest.raises(
        DataError, match=r"short.jsonl:2: lacks image_id, answer_eval, data_split; the row has data_id, question, image"
    ):
        infoseek.read(source(write_lines(tmp_path / "short.jsonl", short), images=seek["images"]))


def test_missing_and_ambiguous_images_are_named(seek, tmp_path):
    (seek["images"] / "oven_04954660.jpg").unlink()
    with pytest.raises(
        DataError, match=r"no file for 1 image\(s\) of 3 questions below .*oven_04954660 \(.*val.jsonl:2\)"
    ):
        infoseek.read(source(seek["questions"], images=seek["images"]))
    draw(seek["images"], "a/oven_04954660.jpg", "b/oven_04954660.png")
    with pytest.raises(DataError, match=r"val.jsonl:2: image 'oven_04954660' could be .*a/oven.*b/oven"):
        infoseek.read(source(seek["questions"], images=seek["images"]))


def test_copies_of_a_question_are_named(seek, tmp_path):
    copies = write_lines(tmp_path / "copies.jsonl", [*worlds.INFOSEEK, worlds.INFOSEEK[0]])
    with pytest.raises(DataError, match=r"same id: infoseek_val_00000070 \(.*copies.jsonl:1 and .*copies.jsonl:4\)"):
        infoseek.read(source(copies, images=seek["images"]))


@pytest.mark.parametrize(
    "text",
    ["infoseek_val_00050000\ninfoseek_val_00000070\n", '["infoseek_val_00050000", "infoseek_val_00000070"]',
     '{"data_id": "infoseek_val_00050000", "x": 1}\n{"data_id": "infoseek_val_00000070"}\n'],
)  # fmt: skip
def test_a_subset_keeps_the_files_order(seek, tmp_path, text):
    (tmp_path / "subset.txt").write_text(text)
    files = source(seek["questions"], images=seek["images"], subset=tmp_path / "subset.txt")
    (seek["images"] / "oven_04954660.jpg").unlink()  # of a question that is not asked
    assert [one.id[-4:] for one in infoseek.read(files).questions] == ["0070", "0000"]
    one = infoseek.read(Source(files.questions, images=files.images, subset=files.subset, limit=1))
    assert [question.id[-4:] for question in one.questions] == ["0070"]


def test_faults_of_subsets(seek, tmp_path):
    def subset(text):
        (tmp_path / "subset.txt").write_text(text)
        return source(seek["questions"], images=seek["images"], subset=tmp_path / "subset.txt")

    with pytest.raises(DataError, match="subset.txt: infoseek has no question nowhere, never"):
        infoseek.read(subset("infoseek_val_00000070\nnowhere\nnever\n"))
    with pytest.raises(DataError, match="named more than once: a"):
        read_ids(subset("a\nb\na\n").subset)
    with pytest.raises(DataError, match=r"subset.txt:2: not an id"):
        read_ids(subset('a\n{"x": 1}\n').subset)
    with pytest.raises(DataError, match="there is no id in it"):
        read_ids(subset("\n").subset)
    assert read_ids(subset("[1, 2]").subset) == ("1", "2")
    (tmp_path / "subset.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="subset.txt: not UTF-8 text"):
        read_ids(tmp_path / "subset.txt")
    with pytest.raises(ConfigError, match="limit -1 is negative"):
        source("x", limit=-1)


FAULTS = {
    "split": (
        infoseek.read,
        worlds.INFOSEEK[0] | {"data_split": "val_seen"},
        "data_split 'val_seen' ends with none of",
    ),
    "question": (infoseek.read, worlds.INFOSEEK[0] | {"question": " "}, "question is ' '; it should be a text"),
    "nan": (
        viquae.read,
        worlds.VIQUAE[0] | {"output": {"answer": [float("nan")]}},
        "output is nan; it should be a text",
    ),
    "answers": (infoseek.read, worlds.INFOSEEK[0] | {"answer_eval": []}, "answer_eval is empty"),
    "sight": (oven.read, worlds.OVEN_QUERY[0] | {"data_split": "query_val"}, "do not say which split"),
    "which": (oven.read, worlds.OVEN_QUERY[0] | {"data_split": "val_seen", "data_id": "7"}, "do not say which split"),
    "coco": (okvqa.read_a, worlds.AOKVQA[0] | {"image_id": "x"}, "image_id is 'x'; it should be a number of COCO"),
    "annotators": (okvqa.read_a, worlds.AOKVQA[0] | {"direct_answers": ["a"]}, "two annotators at least"),
    "output": (viquae.read, worlds.VIQUAE[0] | {"output": "Levi's"}, 'output is "Levi\'s"; it should be'),
    "letter": (mrag.read, worlds.MRAG[0] | {"answer_choice": "Z"}, "answer_choice is 'Z'"),
    "label": (cvqa.read, worlds.CVQA[0] | {"Label": 4}, "Label is 4; it should be the place of one of 4 options"),
    "options": (cvqa.read, worlds.CVQA[0] | {"Options": "a, b"}, "Options is 'a, b'; it should be a list"),
    "subset": (cvqa.read, worlds.CVQA[0] | {"Subset": "('Chinese',)"}, "it should be a language and a country"),
    "image": (cvqa.read, worlds.CVQA[0] | {"image": 3}, "image is int; it should be a file's name or its bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_rows_are_named_with_file_and_row(tmp_path, fault):
    read, row, message = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        read(source(write_lines(tmp_path / "rows.jsonl", [row])))
    assert f"{tmp_path}/rows.jsonl:1: " in str(caught.value) and message in str(caught.value)


def test_faults_of_files(seek, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"data_id": 1}\n{"data_id":')
    with pytest.raises(DataError, match=r"rows.jsonl:1: lacks image_id"):
        infoseek.read(source(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"types.jsonl:2: not JSON"):
        infoseek.read(_types(seek, tmp_path))
    with pytest.raises(DataError, match="cannot read .*absent.jsonl: No such file"):
        infoseek.read(source(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"there is no question in .*empty.json"):
        okvqa.read_a(source(write_json(tmp_path / "empty.json", [])))
    with pytest.raises(DataError, match="object.json: the file is dict, not a list of objects"):
        okvqa.read_a(source(write_json(tmp_path / "object.json", {})))
    with pytest.raises(DataError, match=r"list.json, entry 1: a row is an object with named values, got int"):
        okvqa.read_a(source(write_json(tmp_path / "list.json", [3])))
    with pytest.raises(DataError, match="the folder has no .parquet file"):
        mrag.read(source(tmp_path))


def _types(seek, tmp_path):
    (tmp_path / "types.jsonl").write_text('{"data_id": "a", "question_type": "Time"}\n{"data_id":')
    return source(seek["questions"], tmp_path / "types.jsonl", images=seek["images"])


def test_files_that_do_not_belong_together(seek, tmp_path):
    some = write_lines(tmp_path / "types.jsonl", worlds.INFOSEEK_TYPES[:2])
    with pytest.raises(DataError, match="no question_type for infoseek_val_00050000"):
        infoseek.read(source(seek["questions"], some, images=seek["images"]))
    swapped = write_lines(tmp_path / "swap.jsonl", [{"data_id": "infoseek_val_00001309", "question_type": "Time"}])
    with pytest.raises(DataError, match=r"val.jsonl:2: a question of type time has answer_eval \[\{"):
        infoseek.read(source(seek["questions"], swapped, images=seek["images"]))
    questions = write_json(tmp_path / "q.json", worlds.OKVQA)
    answers = {"annotations": worlds.OKVQA_ANSWERS["annotations"][:1]}
    with pytest.raises(DataError, match=r"no annotation of question 3397615 \(.*q.json, questions entry 2\)"):
        okvqa.read(source(questions, write_json(tmp_path / "a.json", answers)))
    with pytest.raises(DataError, match="give one question file, and the file of answers"):
        okvqa.read(source(questions))
    with pytest.raises(DataError, match="give the file of titles as --annotations"):
        oven.titles(())
    with pytest.raises(DataError, match=r"t.jsonl:1: no title of an entity here"):
        oven.titles((write_lines(tmp_path / "t.jsonl", [{"id": "Q1"}]),))
    with pytest.raises(ConfigError, match="unknown benchmark 'infoseak'.*infoseek"):
        benchmarks.prepare("infoseak", source(questions))
