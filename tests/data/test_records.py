"""JSON lines as people write them: chats, questions with an image and an answer, and what is wrong with some."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmem.data.pipeline import Pipeline, Rejections
from jaxmem.data.records import JsonlRecords
from jaxmem.errors import DataError
from jaxmem.training.prompts import encoder


def write(folder, *lines):
    """A file of lines: texts as they are, objects as JSON."""
    path = folder / "data.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return JsonlRecords(path)


def picture(folder, name="a.png", size=(64, 64)):
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(folder / name)


def test_check_48_a_question_becomes_a_chat_with_columns(tmp_path):
    question = {"prompt": "How many?", "image": "a.png", "answer": "4", "id": 17, "source": "x", "choices": ["4", "5"]}
    (record,) = write(tmp_path, question)
    assert record == {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "How many?"}],
            },
            {"role": "assistant", "content": "4"},
        ],
        "answer": "4",
        "id": 17,
        "source": "x",
        "choices": ["4", "5"],
    }


def test_check_48_blank_lines_and_missing_fields(tmp_path):
    records = write(tmp_path, "", {"prompt": "a"}, "  ", "\t", {"prompt": "b", "image": None, "id": "k"}, "\r", "")
    assert len(records) == 2 and [records.name(i).rpartition(":")[2] for i in range(2)] == ["2", "5"]
    assert [record["id"] for record in records] == ["0", "k"]
    assert [record["answer"] for record in records] == [None, None]
    for record, text in zip(records, "ab", strict=True):
        assert record["messages"] == [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    ("answer", "says"),
    [(7, "7"), (0, "0"), (2.5, "2.5"), ("", ""), (["four", 4], "four"), ([], None), (None, None)],
)
def test_check_48_answers_of_every_kind(tmp_path, answer, says):
    (record,) = write(tmp_path, {"prompt": "p", "answer": answer})
    assert record["answer"] == answer
    assert [m["content"] for m in record["messages"][1:]] == ([] if says is None else [says])


def test_several_images_in_order(tmp_path):
    (record,) = write(tmp_path, {"prompt": "p", "images": ["a.png", "/b.png"]})
    parts = record["messages"][0]["content"]
    assert [part.get("image") for part in parts] == [str(tmp_path / "a.png"), "/b.png", None]
    assert "images" not in record


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png", "answer": "4"}, 'a record is .*"prompt"'),
        ([1], "a record is"),
        ("{'prompt': 1}", "not JSON"),
        ({"messages": []}, r"messages is \[\]; a chat is a list of messages"),
        ({"messages": None}, "messages is None"),
        ({"prompt": None}, "prompt is None; give a text"),
        ({"prompt": ["a"]}, "prompt is"),
        ({"prompt": "p", "image": ["a.png"]}, r"image is one path and images a list of paths, got \['a.png'\]"),
        ({"prompt": "p", "images": "a.png"}, "images a list of paths, got 'a.png'"),
        ({"prompt": "p", "images": ["a.png", 3]}, "images a list"),
        ({"prompt": "p", "image": ""}, "image is one path"),
        ({"prompt": "p", "image": "a.png", "images": ["b.png"]}, "both image and images"),
        ({"prompt": "p", "answer": {"a": 1}}, "answer is {'a': 1}; give a text, a number"),
        ({"prompt": "p", "answer": True}, "answer is True"),
        ({"prompt": "p", "answer": ["a", None]}, r"answer is \['a', None\]"),
        ({"messages": [{"role": "user", "content": "hi"}], "images": ["a.png"]}, "1 images beside a chat with 0 parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}] * 2}], "images": ["a.png"]},
            "1 images beside a chat with 2 parts",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": "a.png"}, "images 'a.png' beside"),
    ],
)
def test_check_48_what_is_wrong_is_said_with_file_and_line(tmp_path, line, message):
    records = write(tmp_path, {"prompt": "fine"}, "", line)
    assert records[0]["id"] == "0"
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        records[1]


def test_images_beside_a_chat_fill_its_bare_parts(tmp_path):
    bare, full = {"type": "image"}, {"type": "image", "image": "/own.png"}
    chat = [{"role": "user", "content": [bare, full, bare]}, {"role": "assistant", "content": "4"}]
    record, untouched, empty = write(
        tmp_path,
        {"messages": chat, "images": ["a.png", "b.png"], "level": 2},
        {"messages": [{"role": "user", "content": [full]}], "images": ["c.png"], "prompt": "a column"},
        {"messages": chat[1:], "images": []},
    )
    sources = [part["image"] for part in record["messages"][0]["content"]]
    assert sources == [str(tmp_path / "a.png"), "/own.png", str(tmp_path / "b.png")]
    assert record["level"] == 2 and "images" not in record
    assert untouched["images"] == ["c.png"] and untouched["prompt"] == "a column" and empty["messages"] == chat[1:]


def test_questions_train_and_are_sampled_from(tmp_path, processor):
    """Prompts without the answer for sampling, with it for supervision; what cannot be used is named."""
    picture(tmp_path)
    lines = [
        {"prompt": "digit", "image": "a.png", "answer": 7, "level": 3},
        {"prompt": "digit", "image": "a.png"},
        {"prompt": "digit", "image": "absent.png", "answer": 7},
    ]
    records = write(tmp_path, *lines)
    prompt = encoder(processor)(records[0])
    assert prompt.columns == {"answer": 7, "id": "0", "level": 3, "solution": "7"}
    assert prompt.text == "digit" and prompt.example.visual_count > 0
    assert encoder(processor)(records[1]).columns == {"answer": None, "id": "1"}
    encode = lambda record: processor.encode(record["messages"], add_generation_prompt=False)  # noqa: E731
    assert encode(records[0]).loss_mask.sum() > 0 and encode(records[1]).loss_mask.sum() == 0
    rejections = Rejections(3, 0.4, tmp_path / "rejected.jsonl")
    pipeline = Pipeline(records, encode, list, batch_size=3, shuffle=False, threads=0, rejections=rejections)
    usable = pipeline._encoded([0, 1, 2])
    assert list(usable) == [0, 1]
    (name,) = rejections.errors
    assert name.endswith("data.jsonl:3") and "there is no file" in rejections.errors[name]
