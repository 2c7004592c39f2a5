"""Knowledge items as people write them, and what is wrong with some."""

import base64
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from jaxmem.data.items import Item, ItemFile, digest
from jaxmem.errors import DataError


def write(folder, *lines, name="items.jsonl"):
    """A file of lines: texts as they are, objects as JSON."""
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return ItemFile(path)


def picture(path, shade=99):
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)
    return path


def test_items_of_every_form(tmp_path):
    items = write(
        tmp_path,
        {"id": "a", "text": "A fox."},
        "",
        {"id": "b", "description": "A bridge.", "title": "Old Bridge", "image": "b.png", "year": 1566},
        {"id": "c", "text": None, "images": ["c.png", "/far/c2.png", "data:image/png;base64,QUJD"]},
        {"id": "d", "title": "Only a title", "text": "", "image": "d.png"},
        {"id": "é", "text": "Ein Fuß", "title": None, "image": None, "images": None},
    )
    assert len(items) == 5 and items.ids == ("a", "b", "c", "d", "é")
    assert list(items) == [
        Item("a", "A fox."),
        Item("b", "Old Bridge: A bridge.", (str(tmp_path / "b.png"),)),
        Item("c", "", (str(tmp_path / "c.png"), "/far/c2.png", "data:image/png;base64,QUJD")),
        Item("d", "Only a title", (str(tmp_path / "d.png"),)),
        Item("é", "Ein Fuß"),
    ]
    assert items.name(1) == f"{tmp_path / 'items.jsonl'}:3"
    assert items.find(["d", "a"]) == [items[3], items[0]]
    assert items.fingerprint == hashlib.sha256((tmp_path / "items.jsonl").read_bytes()).hexdigest()
    with pytest.raises(DataError, match="no item with the id 'zz', 'y'"):
        items.find(["a", "zz", "y"])


def test_check_29_a_missing_text_never_becomes_nan(tmp_path):
    items = write(
        tmp_path,
        '{"id": "a", "text": NaN, "image": "a.png"}',
        '{"id": "b", "text": null, "title": NaN, "image": "b.png"}',
        '{"id": "c", "text": NaN}',
        '{"id": "d", "title": "T", "text": null}',
        {"id": "e", "text": " NaN ", "image": "e.png"},
        {"id": "f", "text": "nan bread", "title": "Naan"},
        {"id": "g", "text": "x", "title": "nan"},
    )
    assert items[0] == Item("a", "", (str(tmp_path / "a.png"),)) and items[1].text == ""
    assert items[5].text == "Naan: nan bread"
    for row, message in (
        (2, "neither text nor image"),
        (3, "neither text nor image"),
        (4, "text is the word ' NaN '.*write null"),
        (6, "title is the word 'nan'"),
    ):
        with pytest.raises(DataError, match=f"items.jsonl:{row + 1}: {message}"):
            items[row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "an item is .* got list"),
        ({"text": "x"}, "id is None"),
        ({"id": 7, "text": "x"}, "id is 7; give a text"),
        ({"id": " ", "text": "x"}, "id is ' '"),
        ({"id": "a", "text": ""}, "neither text nor image"),
        ({"id": "a", "text": "  ", "images": []}, "neither text nor image"),
        ({"id": "a", "text": 3}, "text is 3; give a text"),
        ({"id": "a", "text": "x", "title": ["t"]}, "title is "),
        ({"id": "a", "text": "x", "description": "y"}, "both text and description"),
        ({"id": "a", "image": "a", "images": ["b"]}, "both image and images"),
        ({"id": "a", "image": 3}, "image is one path .* got 3"),
        ({"id": "a", "images": "b.png"}, "images a list of paths, got 'b.png'"),
        ({"id": "a", "images": ["b.png", None]}, "images a list of paths"),
        ('{"id": "a", "text": "\\ud83d"}', "half a character"),
    ],
)
def test_faults_name_file_and_line(tmp_path, line, message):
    items = write(tmp_path, {"id": "sound", "text": "x"}, line)
    assert items[0].text == "x"
    with pytest.raises(DataError, match=rf"items\.jsonl:2: .*{message}|items\.jsonl:2: {message}"):
        items[1]


def test_ids_that_occur_twice_are_all_named_up_to_ten(tmp_path):
    lines = [{"id": f"i{n % 12}", "text": "x"} for n in range(24)]
    with pytest.raises(DataError, match=r"'i0' \(lines 1 and 13\), .*'i9' \(lines 10 and 22\) and 2 more$"):
        write(tmp_path, *lines)


def test_files_without_items(tmp_path):
    with pytest.raises(DataError, match=r'items.jsonl is empty; it should have one \{"id"'):
        write(tmp_path, "", " ")
    with pytest.raises(DataError, match="cannot read the dataset .*none.jsonl: No such file"):
        ItemFile(tmp_path / "none.jsonl")


def test_a_digest_is_of_the_content(tmp_path):
    path, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 98)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = hashlib.sha256()
    for part in (b"a", b"text", hashlib.sha256(data).digest()):
        expected.update(len(part).to_bytes(8, "little") + part)
    same = [str(path), path, f"file://{path}", data, bytearray(data), uri, {"bytes": data}, {"path": str(path)}]
    assert {digest(Item("a", "text", (image,))) for image in same} == {expected.hexdigest()}
    picture_, array = Image.open(path), np.asarray(Image.open(path))
    different = [
        Item("a", "text"),
        Item("b", "text", (path,)),
        Item("a", "texts", (path,)),
        Item("at", "ext", (path,)),
        Item("a", "text", (other,)),
        Item("a", "text", (path, path)),
        Item("a", "text", (path, other)),
        Item("a", "text", (other, path)),
        Item("a", "text", (picture_,)),
        Item("a", "text", (array,)),
        Item("a", "text", (array[:4],)),
    ]
    assert len({digest(item) for item in different} | {expected.hexdigest()}) == len(different) + 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/nowhere/a.png", "cannot read '/nowhere/a.png' .No such file"),
        ("data:image/png;base64,!", "not valid base64"),
        (3, "cannot read int"),
    ],
)
def test_a_digest_needs_the_images(image, message):
    with pytest.raises(DataError, match=f"item 'a', image 2: .*{message}|item 'a', image 2: {message}"):
        digest(Item("a", "x", (b"1", image)))
