"""CoMEM's table 3: its averages from its rows, and its columns from our summaries."""

import pytest

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.averages import COLUMNS, average, columns

TABLE = {
    "CoMEM, Qwen2-VL": ([32.6, 33.1, 30.5, 23.6, 35.1, 57.7, 60.6, 36.3], 38.7),
    "CoMEM, Qwen2.5-VL": ([32.8, 28.5, 26.0, 20.8, 38.1, 47.6, 55.0, 34.7], 35.4),
    "Qwen2-VL": ([17.9, 17.8, 25.5, 9.3, 39.3, 36.3, 41.8, 34.5], 27.8),
    "Qwen2.5-VL": ([22.5, 22.4, 29.3, 16.3, 42.0, 35.0, 39.8, 39.0], 30.8),
    "Qwen2-VL with RAG": ([22.7, 19.0, 24.7, 21.5, 40.4, 41.9, 45.3, 33.6], 31.1),
    "Qwen2.5-VL with RAG": ([17.7, 18.8, 23.0, 19.7, 42.1, 31.3, 34.9, 33.5], 27.6),
}


@pytest.mark.parametrize("model", TABLE)
def test_check_36_averages_from_their_rows(model):
    row, printed = TABLE[model]
    found = average(dict(zip(COLUMNS, row, strict=True)))
    assert round(found + 1e-9, 1) == printed and found == pytest.approx(sum(row) / 8)


def test_columns_from_summaries():
    seek = {"splits": {"unseen_question": 30.0, "unseen_entity": 25.3}, "all": 26.1, "final": 27.45}
    assert columns("infoseek", seek) == {"infoseek_query": 30.0, "infoseek_entity": 25.3}
    oven = {"splits": {"query_seen": 24.63, "query_unseen": 17.68, "entity_seen": 8.55, "entity_unseen": 3.4}, "all": 9}
    assert columns("oven", oven) == {
        "oven_query": pytest.approx(20.58, abs=0.01),
        "oven_entity": pytest.approx(4.87, abs=0.01),
    }
    assert columns("mrag", {"splits": {"Angle": 1.0}, "all": 40.0}) == {"mrag": 40.0}
    with pytest.raises(DataError, match="infoseek: the summary has no split unseen_entity, which table 3 needs"):
        columns("infoseek", {"splits": {"unseen_question": 30.0}, "all": 30.0})
    with pytest.raises(DataError, match="table 3 has no benchmark 'cvqa'"):
        columns("cvqa", {"splits": {}, "all": 1.0})
    with pytest.raises(DataError, match="there is no score of viquae"):
        average(dict.fromkeys(COLUMNS[:-1], 1.0))
