"""Where answers stand: against a brute-force reading of the definitions, and by hand."""

import itertools
import re
import time

import pytest

from jaxmem.training.rewards import text as texts

FORM = re.compile(r"\A<think>(?:(?!</think>).)*</think>\s*<answer>(?:(?!</answer>).)*</answer>\s*\Z", re.DOTALL)
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def test_tags_agree_with_the_definition_on_every_arrangement():
    pieces = ("<think>", "</think>", "<answer>", "</answer>", " \n", "4")
    count = 0
    for length in range(7):
        for arrangement in itertools.product(pieces, repeat=length):
            text = "".join(arrangement)
            right = FORM.match(text) is not None
            count += right
            if texts.well_formed(text) != right:
                raise AssertionError(text)
            block = BLOCK.search(text)
            if texts.first_answer_block(text) != (block and block[1].strip()):
                raise AssertionError(text)
    assert count > 100


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{3} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{4", "3"),  # cut off
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b}}", "b"),
        ("<answer>x</answer> or <answer> y </answer>", "y"),
        (r"<answer>\boxed{7}</answer>", "7"),
        ("<answer>The answer is 7.</answer>", "7"),
        ("The answer is 3.5. It was easy", "3.5"),
        ("**Answer:** blue", "blue"),
        ("The final answer is: **12 cm**\nBye", "12 cm**"),
        ("nothing here", None),
        ("<answer>open", None),
        ("", None),
    ],
)
def test_explicit_answer(text, answer):
    assert texts.explicit_answer(text) == answer


def test_thinking_is_no_answer():
    assert texts.final_answer(r"<think>\boxed{3}</think> 4 ") == "4"
    assert texts.final_answer(r"<think>\boxed{3}") == ""
    assert texts.final_answer(r"<think>a</think>b</think>\boxed{3}") == "3"
    assert texts.explicit_answer("the answer is 4", phrases=False) is None


@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "<answer>", "</answer>", "the answer is ", "answer * * ", "{", "}", "* ", "<think>", "\\text{"],
)
def test_long_texts_take_no_longer_than_their_length(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    texts.final_answer(text), texts.normalise(text), texts.well_formed(text), texts.first_answer_block(text)
    assert time.process_time() - start < 2  # linear: about 0.05 s; quadratic: minutes


def test_normalise():
    assert texts.normalise("  The **Red**\n Fox!. ") == texts.normalise("the red fox") == "the red fox"
    assert texts.normalise("\u2212 4") == "- 4" and texts.normalise(".5") == ".5"
    assert texts.normalise(r"\text{km}") == "km" and texts.normalise("“a”") == "“a”"
