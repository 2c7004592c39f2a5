"""Answers map to Wikipedia's entities by Okapi BM25 over titles: against the formula word by word, and on toys."""

import collections
import itertools
import math

import numpy as np
import pytest

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge import compat, strict
from jaxmem.evaluation.knowledge.entities import Entities, split_words

TOY = (
    "Boeing 747", "Boeing 737", "Boeing", "Airbus A320", "Killdeer", "Golden Retriever", "Golden eagle", "Eagle",
    "Tower of London", "London", "London Bridge", "Tower Bridge", "University of Oxford", "Oxford", "São Paulo",
    "Château d'If", "The Hague", "Flush toilet", "Toilet paper", "Granny Smith", "Adam Smith", "Mercury (planet)",
)  # fmt: skip
PAIRS = [(f"Q{at}", title) for at, title in enumerate(TOY)]


def oracle(titles, query):
    """The score of every title, from the published formula with k1 = 1.5, b = 0.75 a quarter of the mean as floor."""
    documents = [split_words(title) for title in titles]
    mean = sum(map(len, documents)) / len(documents)
    frequency = collections.Counter(word for document in documents for word in set(document))
    raw = {word: math.log((len(documents) - count + 0.5) / (count + 0.5)) for word, count in frequency.items()}
    floor = 0.25 * sum(raw.values()) / len(raw)
    scores = []
    for document in documents:
        score = 0.0
        for word in split_words(query):
            count = document.count(word)
            weight = max(raw[word], floor) if raw.get(word, 0) < 0 else raw.get(word, 0.0)
            score += weight * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


def test_check_37_every_title_finds_its_own_entity():
    index = Entities(PAIRS)
    for entity, title in PAIRS:
        assert index.search(title)[0][0] == entity, title
        assert index.entity(title, strict.normalise) == entity, title


def test_check_37_scores_are_those_of_the_formula():
    draw = np.random.default_rng(0)
    titles = sorted({" ".join(f"w{word}" for word in draw.integers(0, 12, draw.integers(1, 6))) for _ in range(80)})
    titles = [f"w0 {title}" for title in titles]  # in more than half of the titles, so that the floor matters
    index = Entities([(title, title) for title in titles])
    for _ in range(40):
        query = " ".join(f"w{word}" for word in draw.integers(0, 14, 4))
        found, wanted = index.search(query, len(titles)), dict(zip(titles, oracle(titles, query), strict=True))
        assert [score for _, _, score in found] == pytest.approx([wanted[title] for title, _, _ in found])
        assert found[0][2] == pytest.approx(max(wanted[title] for title, _, _ in found))
        assert {title for title, _, _ in found} == {t for t in titles if set(split_words(t)) & set(split_words(query))}


def test_check_37_ties_have_one_order_whatever_the_files():
    pairs = [
        ("Q9", "Springfield"),
        ("Q2", "Springfield"),
        ("Q3", "Paris"),
        ("Q1", "Amsterdam Paris"),
        ("Q4", "Zoo Paris"),
    ]
    orders = {
        tuple(one[0] for one in Entities(order).search("Paris Springfield")) for order in itertools.permutations(pairs)
    }
    assert orders == {("Q2", "Q9", "Q3", "Q1", "Q4")}
    assert Entities(pairs).entity("springfield", strict.normalise) == "Q2"


def test_check_37_predictions_are_normalised_and_cut_to_50_characters():
    index = Entities(PAIRS)
    assert index.entity("The Golden, Retriever!", strict.normalise) == "Q5"
    words = "x" * 45
    assert index.entity(f"{words} eagle golden", strict.normalise) is None  # "eagl" is what is left of it
    assert index.entity(f"{words} eagl", strict.normalise) is None
    assert index.entity(f"{words[5:]} eagle london", strict.normalise) == "Q7"
    assert index.entity("Sao paulo", strict.normalise) == "Q14"
    assert index.entity("University of Oxford", compat.normalise) == "Q13"  # the released normaliser leaves Oxford
    assert index.entity("", strict.normalise) is None and index.search("nothing known") == []


def test_other_words_can_be_given():
    index = Entities(PAIRS, words=lambda text: [text[:1].lower()])
    assert [title for _, title, _ in index.search("Bo")] == ["Boeing", "Boeing 737", "Boeing 747"]
    assert len(index) == len(TOY)


def test_faults_are_named():
    with pytest.raises(DataError, match="no titles of entities"):
        Entities([])
    with pytest.raises(DataError, match="none of 1 titles of entities has a word"):
        Entities([("Q1", " ")])
