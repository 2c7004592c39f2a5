"""The report: one file, complete, and harmless whatever a model writes."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxmem.analysis import report
from jaxmem.analysis.report import Charts, Report, Sample, Table
from jaxmem.analysis.svg import Line, line_chart
from jaxmem.data.boards import BoardDataset

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def page(board):
    chart = line_chart([Line("a", [0, 1], [0, 1])], title="Chart of something")
    return Report(
        title="Title",
        subtitle="Subtitle",
        summary=(EVIL,),
        table=Table(("column", EVIL), (("1", EVIL), ("2", "3")), strong=(1,), rules=(1,), notes=(EVIL,)),
        charts=(Charts("One", (chart, chart), EVIL), Charts("Two", (chart,))),
        boards_text=EVIL,
        samples=(Sample(board, (("memory off", EVIL), ("memory on", board.answer), (EVIL, ""))),),
        facts=((EVIL, EVIL),),
        details=((EVIL, ((EVIL, EVIL),)),),
    )


@pytest.fixture(scope="module")
def board():
    return BoardDataset("test", 0, (100,), (4,))[3]


def test_model_text_is_shown_and_never_run(board):
    html = report.render(page(board))
    found = Page(html)
    assert "script" not in found.tags and "img" not in found.tags
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert "".join(found.texts).count("<script>alert('x')</script>") == 13
    assert "default-src 'none'" in html


def test_report_is_complete_and_needs_no_network(board):
    found = Page(report.render(page(board)))
    assert found.tags.count("svg") == 4 and found.tags.count("image") == 1
    assert found.tags.count("html") == 1 and found.tags.count("link") == 0
    links = [value for _, name, value in found.attributes if name in ("src", "href", "data", "action")]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    text = "".join(found.texts)
    for part in (
        "Title",
        "Subtitle",
        "One",
        "Two",
        "Read and add",
        board.answer[:2],
        "memory off",
        "(nothing)",
        "100 words",
    ):
        assert part in text


def test_answers_are_compared_character_by_character():
    assert report.compare("C7=1 F3", "C7=7 F3=0") == [
        ("C", ""),
        ("7", "right"),
        ("=", ""),
        ("1", "wrong"),
        (" F", ""),
        ("3", "right"),
    ]
    assert report.compare("A12", "A1") == [("A", ""), ("1", "right"), ("2", "wrong")]
    assert report.compare("", "A1") == []


def test_board_picture_holds_the_board(board):
    uri = report.png(board.image)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), board.image)
    picture = report.board_picture(board)
    assert uri in picture and picture.count("<rect") == 4 and picture.count("<text") == 16


def test_write_replaces_a_report_in_one_step(board, tmp_path):
    path = report.write(page(board), tmp_path / "new" / "report.html")
    path.write_text("old")
    report.write(page(board), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_settings_become_dotted_rows():
    assert report.flat({"a": {"b": (1, 2), "c": {}}, "d": None}) == (("a.b", "(1, 2)"), ("d", "None"))
