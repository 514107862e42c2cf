import json

import pytest

from squamata.errors import SquamataError
from squamata.text import read_documents, read_rows


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt_is_one_document_byte_for_byte(tmp_path):
    text = " \n = Title = \r\n\u2028é\n\n"
    assert read_documents(write(tmp_path, "a.txt", text)) == [text]


def test_jsonl_is_one_document_a_line(tmp_path):
    documents = ["one\ntwo", "line\u2028separator", "é"]
    lines = "\n".join(json.dumps({"text": text, "id": 3}, ensure_ascii=False) for text in documents)
    assert read_documents(write(tmp_path, "a.jsonl", lines + "\n\n")) == documents


def test_blank_documents_are_left_out_and_a_byte_order_mark_is_not_text(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": " "}\r\n{"text": "b"}')
    assert read_documents(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\t", "holds no text"),
        ("a.txt", b"ab\xff", r"not UTF-8 \(byte 2\)"),
        ("a.md", "text", r"must be a .txt file or a .jsonl file"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": ""}', "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n"b"', "line 3: a JSON str, not an object with 'text'"),
        ("a.jsonl", '{"texts": "a"}', "line 1: no field 'text'; it has 'texts'"),
        ("a.jsonl", "{}", "line 1: no field 'text'; it has none"),
        ("a.jsonl", '{"text": 3}', "line 1: field 'text' must be of type str, not int"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: half of a"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(SquamataError, match=message) as caught:
        read_documents(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SquamataError, match="no such file"):
        read_documents(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(SquamataError, match="is a folder"):
        read_documents(tmp_path / "folder.txt")


def test_rows_keep_every_field(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"choices": ["x"], "gold": 0, "more": null}')
    assert read_rows(path, {"choices": list, "gold": int}) == [{"choices": ["x"], "gold": 0, "more": None}]
