"""Small files in each benchmark's published format."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from jaxmem.evaluation.knowledge.questions import Question, QuestionSet, Source


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def write_json(path, content):
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return Path(path)


def draw(folder, *names, colour=(9, 60, 200)):
    for name in names:
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(Path(folder) / name)
    return Path(folder)


def source(questions, annotations=(), **others):
    many = lambda paths: tuple(paths) if isinstance(paths, list | tuple) else (paths,)  # noqa: E731
    return Source(many(questions), many(annotations), **others)


def open_question(name="q", answers=("Paris",), kind="string", split="all", **meta):
    return Question(
        name, f"What is {name}?", (f"{name}.jpg",), tuple(answers), split, kind, (), {"language": "en", **meta}
    )


def set_of(*questions, name="viquae"):
    return QuestionSet(name, questions)


INFOSEEK = [
    {
        "data_id": "infoseek_val_00000070",
        "image_id": "oven_05001186",
        "question": "What is the country of origin of this food?",
        "answer": ["United States of America"],
        "answer_eval": ["United States of America", "U.S.", "USA"],
        "data_split": "val_unseen_question",
    },
    {
        "data_id": "infoseek_val_00001309",
        "image_id": "oven_04954660",
        "question": "What is the length of this bridge in metre?",
        "answer": ["237"],
        "answer_eval": [{"wikidata": 237.0, "range": [213.3, 260.7]}],
        "data_split": "val_unseen_question",
    },
    {
        "data_id": "infoseek_val_00050000",
        "image_id": "oven_04950546",
        "question": "When did this aircraft enter service?",
        "answer": ["1990-12-20"],
        "answer_eval": ["20 December 1990", "1990", "1989", "1991"],
        "data_split": "val_unseen_entity",
    },
]
INFOSEEK_TYPES = [
    {"data_id": "infoseek_val_00000070", "question_type": "String"},
    {"data_id": "infoseek_val_00001309", "question_type": "Numerical"},
    {"data_id": "infoseek_val_00050000", "question_type": "Time"},
    {"data_id": "infoseek_val_00099999", "question_type": "Time"},
]
OVEN_QUERY = [
    {
        "data_id": f"oven_query_val_0000000{at}",
        "image_id": f"oven_0492573{at}",
        "question": "what type of bird are these?",
        "entity_id": entity,
        "entity_text": text,
        "data_split": split,
    }
    for at, (entity, text, split) in enumerate(
        [("Q755737", "Killdeer", "query_val_seen"), ("Q37153", "Avocado", "query_val_unseen")]
    )
]
OVEN_ENTITY = [
    {
        "data_id": f"oven_entity_val_0000000{at}",
        "image_id": f"oven_0000000{at}",
        "question": "which aircraft is this?",
        "entity_id": entity,
        "entity_text": text,
        "data_split": split,
    }
    for at, (entity, text, split) in enumerate(
        [("Q13317", "Yogurt", "entity_val_seen"), ("Q8355", "Violin", "entity_val_unseen")]
    )
]
OVEN_TITLES = [
    {"wikidata_id": row["entity_id"], "wikipedia_title": row["entity_text"]} for row in (*OVEN_QUERY, *OVEN_ENTITY)
]
OKVQA = {
    "info": {"version": "1.1"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 297147, "question": "What sport can you use this for?", "question_id": 2971475},
        {"image_id": 339761, "question": "Name the type of plant this is?", "question_id": 3397615},
    ],
}
OKVQA_ANSWERS = {
    "annotations": [
        {
            "image_id": image,
            "question_id": name,
            "answer_type": "other",
            "question_type": "four",
            "confidence": 3,
            "answers": [
                {"answer_id": at, "answer": word, "raw_answer": word, "answer_confidence": "yes"}
                for at, word in enumerate(words.split(), 1)
            ],
        }
        for image, name, words in [
            (297147, 2971475, "race race race race race race motocross motocross ride ride"),
            (339761, 3397615, "vine vine climb climb look look vine vine vine vine"),
        ]
    ]
}
AOKVQA = [
    {
        "split": "val",
        "image_id": 461751,
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette"] * 8 + ["tongue", "smoke"],
        "difficult_direct_answer": False,
        "rationales": ["He's smoking while riding."],
    }
]
VIQUAE = [
    {
        "image": "512px-Jackie_Wilson.png",
        "input": "this singer's re-issued song helped to advertise what brand?",
        "kilt_id": "sfq_15675",
        "id": "6d2a4da9",
        "meta": {"mentions": []},
        "original_question": "",
        "output": {"answer": ["Levi's", "Levis", "Levi Strauss"], "original_answer": "Levi's", "provenance": []},
        "url": "http://upload.wikimedia.org/x.png",
        "wikidata_id": "Q313453",
    }
]
MRAG = [
    {
        "id": "0",
        "aspect": "Perspective",
        "scenario": "Angle",
        "image": "0_query.jpg",
        "gt_images": ["0_a.jpg", "0_b.jpg"],
        "question": "Can you identify this animal?",
        "A": "silky terrier",
        "B": "Yorkshire Terrier",
        "C": "Australian Terrier",
        "D": "Cairn Terrier",
        "answer_choice": "B",
        "answer": "Yorkshire Terrier",
        "image_type": "real",
        "source": "imagenet",
    }
]
CVQA = [
    {
        "image": "5919991134257.jpg",
        "ID": "5919991134257_0",
        "Subset": "('Chinese', 'China')",
        "Question": "图中的建筑是什么?",
        "Translated Question": "What is the building?",
        "Options": ["故宫", "长城", "天坛", "颐和园"],
        "Translated Options": ["Palace", "Wall", "Temple", "Summer Palace"],
        "Label": 2,
        "Category": "Geography",
        "Image Type": "Self",
        "Image Source": "Self-open",
        "License": "CC-BY",
    },
    {
        "image": "77.jpg",
        "ID": "77_0",
        "Subset": "('Igbo', 'Nigeria')",
        "Question": "Gịnị?",
        "Options": "['a', 'b', 'c', 'd']",
        "Label": 0,
        "Category": "Food",
    },
]
