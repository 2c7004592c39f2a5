"""Judges of letters, of yes and no, and of another model: values by hand and brute force."""

import functools

import numpy as np
import pytest

from jaxmem import config as configs
from jaxmem.errors import ConfigError
from jaxmem.training.rewards.functions import call
from jaxmem.training.rewards.judge import Judge, question_of
from jaxmem.training.rewards.matching import ANLS, ExactText, Substring, distance
from jaxmem.training.rewards.runner import RewardRunner
from jaxmem.training.rewards.settings import RewardConfig
from jaxmem.training.rewards.yesno import YesNo, read_yes

HERE = "tests.training.rewards.users"

SCORES = [  # completion, reference, exact, substr: by the definitions of VisMem's metrics
    ("B", "B", 1, 1),
    (" b\n", "B", 1, 1),
    ("Red  fox", "red fox", 1, 0),  # white space is collapsed for `exact` alone
    ("red\tfox", "RED FOX", 1, 0),
    ("The red fox.", "red fox", 0, 1),
    ("red fox", "red fox.", 0, 0),
    ("answer: C", "A", 0, 1),  # a letter is in nearly every text
    ("anything", "", 0, 1),
    ("  ", "", 1, 1),
    ("", "", 1, 1),
    ("", "x", 0, 0),
    ("42", 42, 1, 1),
    ("42.0", 42, 0, 1),
    ("0.5", 0.5, 1, 1),
    ("x", None, 0, 0),
    ("none", None, 0, 0),
    ("ÉTÉ", "été", 1, 1),
    ("<answer>B</answer>", "B", 0, 1),
    ("vixen", ["fox", "vixen"], 1, 1),
    ("vixen", [], 0, 0),
]


@pytest.mark.parametrize(("completion", "reference", "exact", "substr"), SCORES)
def test_check_49_exact_and_substr(completion, reference, exact, substr):
    assert ExactText()(completions=[completion], answer=[reference]) == [exact]
    assert Substring(column="gold")(completions=[completion], gold=[reference]) == [substr]


def brute_distance(one, other):
    @functools.cache
    def rest(i, j):
        if i == len(one) or j == len(other):
            return len(one) - i + len(other) - j
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (one[i] != other[j]))

    return rest(0, 0)


def test_distance_equals_the_recursion():
    draw = np.random.default_rng(0)
    for _ in range(100):
        one, other = ("".join(draw.choice(list("abc"), draw.integers(0, 9))) for _ in range(2))
        assert distance(one, other) == brute_distance(one, other)
    assert distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("hello", "Hello", 1.0),
        ("<think>x</think> The answer is  hello  world.", "hello world", 1.0),
        ("helo", "hello", 1 - 1 / 5),
        ("abcd", "abxy", 0.0),  # half of it is wrong
        ("abcd", "abcx", 0.75),
        ("completely different and much longer than that", "hello", 0.0),
        ("hell", ["paradise", "hello", "help"], 0.8),
        ("12", 12, 1.0),
        ("", "a", 0.0),
        ("a", None, None),
        ("a", [], None),
        ("a", "", None),
    ],
)
def test_anls(completion, reference, value):
    assert ANLS()(completions=[completion], answer=[reference]) == [value if value is None else pytest.approx(value)]


def test_anls_threshold():
    assert ANLS(threshold=0.51)(completions=["abcd"], answer=["abxy"]) == [0.5]
    assert ANLS(threshold=1)(completions=["a"], answer=["abcd"]) == [0.25]
    with pytest.raises(ValueError, match="threshold"):
        ANLS(threshold=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", True),
        ("no.", False),
        ("**Yes**, there is no cat on the mat", True),
        ("No, it is true that he sits", False),
        ("There is no cat.", False),
        ("I think yes", True),
        ("The answer is: True", True),
        ("<answer>false</answer>", False),
        (r"\boxed{\text{Yes}}", True),
        ("<think>no, no</think>\nyes", True),
        ("No cat is there, so yes", None),
        ("Yes or no", None),
        ("yes and no", None),
        ("The answer is yes or no.", None),
        ("nothing, nobody, yesterday", None),
        ("<think>yes", None),
        ("", None),
    ],
)
def test_yes_and_no(text, said):
    assert read_yes(text) is said


def test_yesno_rewards():
    references = ["yes", "No", True, "false", 1, "0", None, "maybe", 2]
    wanted = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, None, None, None]
    assert YesNo()(completions=["yes"] * 9, answer=references) == wanted
    assert YesNo()(completions=["I do not know"] * 2, answer=["yes", "no"]) == [0.0, 0.0]


CHAT = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How {many}?"}]},
    {"role": "assistant", "content": "?"},
]


def test_judge_asks_about_every_answer_that_has_a_reference():
    judge = Judge(f"{HERE}:judge")
    rows = {"prompts": [CHAT] * 5, "answer": ["4", "4", None, "4", ["5", "4"]]}
    texts = ["<think>x</think>4", "The answer is {reference}.", "4", "<think>4", "4"]
    assert judge(completions=texts, **rows) == [1.0, 0.0, None, 0.0, 0.0]
    request = judge.request(question_of(CHAT), "4", "{reference} {4}")
    assert "How {many}?" in request and "{reference} {4}" in request and "from 0 (wrong) to 1 (1:" in request
    assert judge(completions=["4"], answer=["4"]) == [1.0]  # without prompts the question is empty


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("7.5", 0.75),
        ("Reason 3: good. Score: 5/10.", 0.5),
        ("score .5", 0.05),
        ("10", 1.0),
        (4, 0.4),
        ("11", None),
        ("-1", None),
        ("5/20", None),
        ("50%", None),
        ("0.55%", None),
        ("good", None),
        (float("nan"), None),
    ],
)
def test_replies_are_read_or_refused(reply, value):
    judge = Judge(f"{HERE}:judge", top=10)
    if value is not None:
        assert judge._judgement(reply) == pytest.approx(value)
        return
    with pytest.raises(ValueError, match="no number from 0 to 10"):
        judge._judgement(reply)


def test_judge_in_its_own_process_with_a_coroutine_and_with_failures():
    sections = [
        {"name": "llm_judge", "ask": f"{HERE}:slow_judge", "template": "{answer}", "top": 4, "chunk": 0},
        {"name": "llm_judge", "label": "lazy", "ask": f"{HERE}:lazy_judge"},
    ]
    config = configs.build(RewardConfig, {"functions": sections, "workers": 1}, "rewards")
    with RewardRunner(config, {"answer": "4"}) as runner:
        scored = runner([CHAT] * 3, ["1", "", "4"], [[0]] * 3, {"answer": ["4"] * 3})
    assert scored.values[:, 0].tolist() == [0.25, 0.0, 1.0]
    assert scored.errors == {"llm_judge": 0, "lazy": 2} and "one reply each" in scored.messages[0]


def test_wrong_judges_are_found_at_the_start():
    for settings, message in (
        ({"ask": "judge"}, "import path"),
        ({"ask": "a:b", "template": "{question}"}, "lacks {answer}"),
        ({"ask": "a:b", "top": 0}, "top is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Judge(**settings)
    with pytest.raises(ConfigError, match="no function 'absent'"):
        Judge(f"{HERE}:absent").prepare()


def test_self_tests_hold_under_any_settings():
    for function in (
        ExactText("gold"),
        Substring("gold"),
        ANLS("gold", threshold=0.1),
        YesNo("gold"),
        Judge(f"{HERE}:lazy_judge", "gold"),
    ):
        for case in function.cases():
            given = {"completions": [case.completion], **{name: [value] for name, value in case.columns.items()}}
            [outcome] = call(function, given, 1)
            assert outcome.kind == "" and (outcome.value != outcome.value) == (case.expected is None)
            assert case.expected is None or outcome.value == case.expected
