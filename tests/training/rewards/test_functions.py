"""Built-in reward functions: values by hand, and the hacks that must not pay."""

import pytest

from jaxmem.data.boards import BoardDataset, score_answer
from jaxmem.training.rewards import mathematics, quantities
from jaxmem.training.rewards.answers import Choice, Exact, read_choice
from jaxmem.training.rewards.boards import BoardReward
from jaxmem.training.rewards.functions import call, outcomes
from jaxmem.training.rewards.quantities import Numeric, Quantity
from jaxmem.training.rewards.tags import PVM, ThinkFormat

LETTERS = "ABCD"
OPTIONS = ("cat", "black cat", "dog", "a house")

PVM_TOTALS = [
    ("<think>2+2</think><answer>4</answer>", 1.0),
    ("<think>2+2</think> \n <answer> 4 </answer>\n\n", 1.0),
    ("<think>a <think> b</think><answer>4</answer>", 1.0),  # only closing tags end a block
    ("<think>2+2</think><answer>\\boxed{4}</answer>", 1.0),
    ("<think>2+2</think><answer>5</answer>", 0.1),
    ("<think></think><answer></answer>", 0.1),
    ("<think>2+2</think><answer>3, 4 or 5</answer>", 0.1),  # listing
    ("<think>is <answer>5</answer> right?</think><answer>4</answer>", 0.1),  # the first block is the answer
    (" <think>2+2</think><answer>4</answer>", 0.9),  # leading white space
    ("Well <think>2+2</think><answer>4</answer>", 0.9),  # leading text
    ("<think>2+2</think><answer>4</answer> Done", 0.9),  # trailing text
    ("<think>2+2</think> so <answer>4</answer>", 0.9),  # text between
    ("<think>2</think>+2</think><answer>4</answer>", 0.9),  # a repeated closing tag
    ("<think>2+2</think></think><answer>4</answer>", 0.9),
    ("<think>2+2</think><answer>4</answer></answer>", 0.9),  # a nested closing tag
    ("<think>2+2</think><answer>4</answer><answer>5</answer>", 0.9),
    ("<answer>4</answer>", 0.9),
    ("<think>2+2<answer>4</answer>", 0.9),  # no closing tag
    ("<think>2+2</think><answer>5</answer></answer>", 0.0),
    ("<think>2+2</think><answer>4", 0.0),
    ("<think>2+2</think>4", 0.0),
    ("4", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("completion", "total"), PVM_TOTALS)
def test_check_36_pvm_reward_totals(completion, total):
    for grader in ("math", "text"):
        if grader == "math" or "boxed" not in completion:
            assert PVM(grader=grader)(completions=[completion], answer=["4"]) == [total]


def test_check_36_format_alone():
    values = ThinkFormat()(completions=[completion for completion, _ in PVM_TOTALS])
    assert values == [float(total in (0.1, 1.0)) for _, total in PVM_TOTALS]


def test_check_36_accuracy_is_judged_as_mathematics_or_as_words():
    right = [("1/2", r"\frac{1}{2}"), (r"2\sqrt{3}", r"$\sqrt{12}$"), ("Paris", "paris."), ("B", "B"), ("12 cm", "12")]
    wrong = [("4", "2+3"), (r"2\sqrt{3}", "2"), ("Paris", "Pairs"), ("B", "A"), ("B", "A B"), ("(1,2)", "(2,1)")]
    for pairs, total in ((right, 0.9), (wrong, 0.0)):
        for reference, answer in pairs:
            assert PVM()(completions=[f"<answer>{answer}</answer>"], answer=[reference]) == [total], (reference, answer)
    assert PVM()(completions=["<answer>4</answer>"], answer=[None]) == [None]
    assert PVM()(completions=["<answer>4</answer>"], answer=[4]) == [0.9]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("B. Paris", "B"),
        (r"I rule out A. \boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        ("<answer>d</answer>", "D"),
        ("A is wrong so the answer is (B), because", "B"),
        ("The answer is A because of C", "A"),
        ("Answer: option C", "C"),
        ("<think>the answer is A</think>\nB", "B"),
        ("A fox\nD", "D"),
        # several or none
        ("A\nB\nC\nD", None),
        ("A, B, C and D", None),
        ("The answer is A or B", None),
        ("The answer is (A)/(B)", None),
        ("<answer>A, B</answer>", None),
        ("<answer>A fox</answer>", None),
        ("It could be any of A B C D", None),
        ("<think>B", None),
        ("", None),
        ("E", None),
    ],
)
def test_choice_letters(text, choice):
    assert read_choice(text, letters=LETTERS) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("I see a dog.", "C"),
        ("A black cat sits there", "B"),  # and not also "cat"
        ("the answer is a house", "D"),
        ("<answer>Black cat</answer>", "B"),
        ("dogs", None),
        ("cat or dog", None),
        ("cat, black cat, dog, a house", None),  # listing
        ("a black cat beside a cat", None),
    ],
)
def test_choice_by_the_text_of_an_option(text, choice):
    assert read_choice(text, OPTIONS, LETTERS) == choice


def test_choice_rewards():
    choose = Choice(options="options")
    row = {"answer": ["black cat"] * 3 + ["zebra"], "options": [OPTIONS] * 4}
    assert choose(completions=["B", "C", "A and B", "B"], **row) == [1.0, 0.0, 0.0, None]
    assert choose(completions=["E"], answer=["E"], options=[OPTIONS]) == [None]  # there is no fifth option
    assert Choice()(completions=["B"], answer=["b"], options=[OPTIONS]) == [1.0]
    with pytest.raises(ValueError, match="letters"):
        Choice(letters="ABA")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12 cm", [Quantity(12, "cm")]),
        ("-3/4", [Quantity(-0.75)]),
        ("1 1/2 hours", [Quantity(1.5, "h")]),
        ("1½", [Quantity(1.5)]),
        (r"\frac{1}{4}", [Quantity(0.25)]),
        (r"-\dfrac12", [Quantity(-0.5)]),
        ("1,234,567.5", [Quantity(1234567.5)]),
        ("1{,}000", [Quantity(1000)]),
        ("$1,200", [Quantity(1200)]),
        (r"50\%", [Quantity(50, "%")]),
        ("50 percent", [Quantity(50, "%")]),
        ("90°", [Quantity(90, "deg")]),
        (r"90^\circ", [Quantity(90, "deg")]),
        (r"2.5\times 10^{3}", [Quantity(2500)]),
        ("2.5 * 10^-3", [Quantity(0.0025)]),
        ("2.5×10³ m²", [Quantity(2500, "m2")]),
        ("6.02e23", [Quantity(6.02e23)]),
        (r"12\text{ cm}^2", [Quantity(12, "cm2")]),
        ("60 km/h", [Quantity(60, "km/h")]),
        ("4 apples and 5 pears", [Quantity(4), Quantity(5)]),
        ("\u22124", [Quantity(-4)]),
        ("10-5", [Quantity(10), Quantity(5)]),
        ("1/0", []),
        ("1e999", []),
        (r"2\pi", []),
        ("2x", []),
        (r"2\sqrt{3}", []),
        ("2^10", []),
        ("B2", []),
        ("", []),
    ],
)
def test_quantities(text, found):
    read = quantities.quantities(text)
    assert [q.value for q in read] == [pytest.approx(q.value) for q in found]
    assert [q.unit for q in read] == [q.unit for q in found]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("It is 4.", "4", 1.0),
        ("2 and 2 make 4", 4, 1.0),
        (r"\boxed{x = 4.0}", "4", 1.0),
        (r"\boxed{0.3333}", "1/3", 1.0),
        (r"\boxed{0.33}", "1/3", 0.0),
        ("0.12 m", "12 cm", 1.0),
        ("12 kg", "12 cm", 0.0),
        ("12", "12 cm", 1.0),
        ("2 hours", "120 min", 1.0),
        ("50%", "0.5", 1.0),
        ("50", "50%", 1.0),
        ("0.5", "50%", 1.0),
        ("0.5%", "50%", 0.0),
        ("180°", r"3.14159 rad", 1.0),
        ("<answer>3, 4, 5</answer>", "4", 0.0),
        ("<think>4</think>", "4", 0.0),
        ("no idea", "4", 0.0),
        ("0", "0", 1.0),
        ("4", "two", None),
        ("4", "3 or 4", None),
        ("4", None, None),
    ],
)
def test_numeric(completion, reference, reward):
    assert Numeric()(completions=[completion], answer=[reference]) == [reward]


def test_numeric_tolerance():
    assert Numeric(relative=0.05)(completions=["104", "106"], answer=["100", "100"]) == [1.0, 0.0]
    assert Numeric(relative=0, absolute=0.5)(completions=["100.5", "100.6"], answer=["100"] * 2) == [1.0, 0.0]
    with pytest.raises(ValueError, match="relative"):
        Numeric(relative=-1)


def test_exact():
    reward = Exact(column="label")
    texts = ["A red fox.", "red fox", "<answer>RED fox</answer>", "red fox, cat, dog", ""]
    assert reward(completions=texts, label=["red fox"] * 5) == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert reward(completions=["fox", "cat"], label=[["Fox", "vixen"], []]) == [1.0, None]
    assert reward(completions=["7", "x"], label=[7, None]) == [1.0, None]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        (r"\boxed{0.333333}", "1/3", 1.0),
        ("The answer is 12 cm.", "12", 1.0),
        (r"<answer>$x=3$</answer>", "3", 1.0),
        (r"$(x+1)^2$", "x^2+2x+1", 1.0),
        ("\\boxed{\u22124}", "-4", 1.0),
        (r"\boxed{2.5e3}", "2500", 1.0),
        (r"<think>\boxed{4}</think> It is $5$", "5", 1.0),
        (r"\boxed{(2,1)}", "(1,2)", 0.0),
        (r"\boxed{3} or \boxed{4}", "3", 0.0),
        (r"\boxed{3, 4, 5}", "4", 0.0),
        ("<answer>The area is 4 square meters.</answer>", "4", 1.0),
        ("<answer>1 1/2</answer>", "3/2", 1.0),
        ("<answer>1</answer>", "1 1/2", 0.0),
        ("<answer>2</answer>", r"2\sqrt{3}", 0.0),
        ("", "4", 0.0),
        (r"\boxed{4}", "Paris", None),
        (r"\boxed{4}", "", None),
    ],
)
def test_math(completion, reference, reward):
    assert mathematics.Math()(completions=[completion], answer=[reference]) == [reward]


def test_math_runs_no_code(tmp_path):
    target = tmp_path / "made"
    attack = f"__import__('pathlib').Path('{target}').touch()"
    for text in (attack, f"\\boxed{{{attack}}}", f"<answer>{attack}</answer>", f"1+{attack}", f"${attack}$"):
        mathematics.Math()(completions=[text], answer=["4"])
        Numeric()(completions=[text], answer=["4"])
        mathematics.equal(attack, "1")
    assert not target.exists()


def test_board_agrees_with_the_score_of_free_text():
    board = BoardDataset(n=(3,), size=5)[4]
    columns = {"cells": [board.cells], "digits": [list(board.digits)], "sums": [board.sums]}
    for text in (board.answer, board.answer[:-1] + "x", board.answer[:5], "#", "", board.answer + " and"):
        wanted = score_answer(text, board)
        assert BoardReward()(completions=[text], **columns) == [wanted.exact]
        assert BoardReward(read=0.4)(completions=[text], **columns) == [
            pytest.approx(0.4 * wanted.read + 0.6 * wanted.exact)
        ]
    with pytest.raises(ValueError, match="share"):
        BoardReward(read=2)


def test_a_failing_call_is_an_outcome_with_its_reason():
    [outcome] = call(BoardReward(), {"completions": ["x"], "cells": [None], "digits": [[1]], "sums": [[1]]}, 1)
    assert outcome.kind == "error" and outcome.text.startswith("TypeError") and outcome.value != outcome.value


def test_results_are_checked():
    assert [(o.value, o.kind) for o in outcomes([1, True, 0.5], 3)] == [(1.0, ""), (1.0, ""), (0.5, "")]
    none, nan, infinite, word = outcomes([None, float("nan"), float("inf"), "1"], 4)
    assert none.kind == "" and none.value != none.value
    assert {nan.kind, infinite.kind, word.kind} == {"error"} and "'1' (str)" in word.text
    for wrong, message in ((1.0, "float"), ("ab", "str"), ([1.0], "1 values for 2"), ({0: 1, 1: 2}, "dict")):
        with pytest.raises(TypeError, match=message):
            outcomes(wrong, 2)
