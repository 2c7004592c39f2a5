"""The choice that a reply names: never its first character, and none where it names none."""

import dataclasses

import pytest

from jaxmem.evaluation.knowledge import scoring
from jaxmem.evaluation.knowledge.choosing import choose
from jaxmem.evaluation.knowledge.summary import summarise
from tests.evaluation.knowledge.worlds import open_question

DOGS = ("Golden retriever", "Poodle", "Wild cat", "Cat")
REPLIES = {
    "B": "B", "b.": "B", "(B)": "B", "**B**": "B", "B: Poodle": "B", "B Poodle": "B", "C\n": "C",
    "The answer is B because of its curls.": "B", "answer is (B).": "B", "**Answer:** B": "B", "Answer: A": "A",
    r"so \boxed{B}": "B", r"\boxed{\text{B}}": "B", r"\boxed{Poodle}": "B", r"\boxed{b}": "B", r"\boxed{(D) Cat}": "D",
    "The answer is a wild cat.": "C", "It is a Wild cat": "C", "Answer: A golden retriever": "A",
    "Answer: A cat": "D", "Option D is right": "D", "The correct choice is (C)": "C", "Curly hair.\n\nB": "B",
    "Not (A).\nSo the answer is C": "C", "Based on the picture, the answer is D": "D", "It must be (B) here": "B",
    "<think>The answer is B</think>C": "C", r"\boxed{A}, no: \boxed{C}": "C",
}  # fmt: skip
NOTHING = [
    "Based on the image, it is unclear.", "Considering the shape, I cannot tell.", "According to it, nothing.",
    "A dog is shown.", "Dogs", "", "Cat or poodle", "I think it is A or B", r"\boxed{A or B}", r"\boxed{unknown}",
    "Options (A) and (B) are wrong", "<think>The answer is B", "Definitely an animal", "D.C. is a city",
]  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_that_name_a_choice(reply):
    assert choose(reply, "ABCD", DOGS) == REPLIES[reply]


@pytest.mark.parametrize("reply", NOTHING)
def test_replies_that_name_none(reply):
    assert choose(reply, "ABCD", DOGS) is None


@pytest.mark.parametrize(
    ("reply", "number"),
    [("答案：2", "2"), (r"最终答案: \boxed{3}", "3"), ("答案是选项2", "2"), ("Ответ: 2", "2"), ("отговорът е 4", "4"),
     ("La respuesta es 1", "1"), ("A resposta é (4)", "4"), (r"\boxed{2. dos}", "2"), (r"\boxed{3 people}", "1"),
     (r"\boxed{dos}", "2"), ("2.5 metres", None), (r"\boxed{1-4}", None), ("12", None)],
)  # fmt: skip
def test_numbers_of_options_in_all_languages(reply, number):
    assert choose(reply, "1234", ("3 people", "dos", "x", "y")) == number


def choice(label, choices=DOGS, name="q"):
    return dataclasses.replace(open_question(name, (label,), "choice"), choices=choices)


def test_mrag_counts_what_is_unanswered_and_what_the_released_rule_misreads():
    replies = [("A", "A"), ("B", "Based on the curls, \\boxed{C}"), ("C", "\\boxed{C}"), ("D", "Hard to say")]
    rows = []
    for at, (label, reply) in enumerate(replies):
        judged = scoring.mrag(choice(label, name=f"q{at}"), reply)
        rows.append({"id": f"q{at}", "split": "Angle", "kind": "choice", **dataclasses.asdict(judged)})
    assert [row["metrics"]["strict"] for row in rows] == [1, 0, 1, 0]
    assert [row["metrics"]["comem_compat"] for row in rows] == [1, 1, 0, 0]  # "Based" says B there
    found = summarise("mrag", rows)
    assert found["unanswered"] == 1 and found["flags"] == {"comem_needs_judge": 2}
    assert found["metrics"]["strict"] == {
        "splits": {"Angle": 50.0},
        "kinds": {"choice": 50.0},
        "all": 50.0,
        "final": 50.0,
    }


def test_cvqa_released_rule_wants_the_bare_number_in_a_box():
    one = choice("3", ("a", "b", "c", "d"))
    assert scoring.cvqa(one, r"\boxed{3}").metrics == {"strict": 1, "comem_compat": 1}
    assert scoring.cvqa(one, r"\boxed{3. c}").metrics == {"strict": 1, "comem_compat": 0}
    assert scoring.cvqa(one, "Answer: 3").metrics == {"strict": 1, "comem_compat": 0}
    assert scoring.cvqa(one, "c, or d").answer is None
