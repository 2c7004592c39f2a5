"""Facts: rows are pure functions of their index, and nothing but the right item holds an answer."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmem.data.facts import FactDataset


def test_rows_are_pure_functions_of_their_index():
    one, other = FactDataset(seed=3, size=20), FactDataset(seed=3, size=20)
    for index in (7, 0, 19):
        a, b = one[index], other[index]
        assert a.answer == b.answer and a.question == b.question
        np.testing.assert_array_equal(a.items[0].images[0], b.items[0].images[0])
    assert one[7].answer != FactDataset(seed=4, size=20)[7].answer


def test_answers_are_those_of_the_items_asked_for_in_their_order():
    for index in range(40):
        fact = FactDataset(items=(5, 10), asked=(1, 3))[index]
        names = [item.text for item in fact.items]
        assert len(set(names)) == len(names) and set(names) <= set("ABCDEFGHIJKLMNOP")
        assert len(fact.asked) in (1, 3) and len(set(fact.asked)) == len(fact.asked)
        assert fact.question[0]["content"].split() == ["Read", "and", "add", *(names[i] for i in fact.asked)]
        total, words = 0, []
        for place, digit in zip(fact.asked, fact.digits, strict=True):
            total = (total + digit) % 10
            words.append(f"{names[place]}{digit}={total}")
        assert fact.answer.split() == [*words, f"#{total}"] and fact.messages[-1]["content"] == fact.answer


def test_the_digit_is_in_the_image_alone():
    """A text never says it, and equal digits look alike."""
    shown = {}
    for index in range(300):
        fact = FactDataset("test", items=(1,))[index]
        (item,) = fact.items
        assert not any(char.isdigit() for char in item.text) and item.images[0].shape == (32, 32, 3)
        shown.setdefault(fact.digits[0], []).append(item.images[0].astype(float))
    assert len(shown) == 10
    middle = {digit: np.mean(images, axis=0) for digit, images in shown.items()}
    right = sum(
        digit == min(middle, key=lambda other, image=image: np.square(middle[other] - image).sum())
        for digit, images in shown.items()
        for image in images
    )
    assert right / 300 > 0.8  # the nearest mean tells most of them


def test_rows_of_a_group_have_one_shape():
    facts = FactDataset(items=(1, 3, 10), asked=(1, 4), group=8)
    shapes = [(len(facts[i].items), len(facts[i].asked)) for i in range(80)]
    assert all(len(set(shapes[start : start + 8])) == 1 for start in range(0, 80, 8)) and len(set(shapes)) > 3


def test_splits_share_no_digit():
    images = lambda split: {  # noqa: E731
        FactDataset(split, items=(1,))[i].items[0].images[0].tobytes() for i in range(200)
    }
    assert not images("train") & images("test")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"items": ()}, "items is"),
        ({"items": (40,)}, "1 to 16"),
        ({"asked": 0}, "asked"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        FactDataset(**settings)
    with pytest.raises(IndexError, match="fact 5 of a dataset with 5"):
        FactDataset(size=5)[5]
