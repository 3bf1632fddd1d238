import gzip
import json
from collections import Counter

import datasets
import pytest

from modular_star_encoder.data.codesearchnet import (
    LeakingDocstringError,
    codesearchnet_function,
    documentation_summary,
    read_codesearchnet,
)
from modular_star_encoder.data.functions import function_id
from tests.errors import raises

HUB = {
    "repository_name": "owner/name",
    "func_path_in_repository": "a.go",
    "func_name": "A",
    "whole_func_string": "func A() {}",
    "language": "go",
    "func_code_string": "func A() {}",
    "func_documentation_string": "Does it\nwell.\n\nSlowly.",
    "split_name": "test",
    "func_code_url": "https://github.com/owner/name/blob/0ab/a.go#L37-L60",
}
NAMES = {
    "repository_name": "repo",
    "func_path_in_repository": "path",
    "whole_func_string": "original_string",
    "func_code_string": "code",
    "func_documentation_string": "docstring",
    "split_name": "partition",
    "func_code_url": "url",
}
LINES = {NAMES.get(name, name): value for name, value in HUB.items()} | {
    "code_tokens": ["func"],
    "docstring_tokens": [],
}
PYTHON = {
    "language": "python",
    "func_code_string": 'def a(self):\n        """Does it."""\n        return 1',
    "func_documentation_string": "Does it.",
}


@pytest.mark.parametrize(
    "documentation",
    ["Reads a\nfile.", "Reads a\nfile.\n \nMore.", "Reads a\nfile. @param path", "\n\nReads a\nfile.\n@see\n\nMore."],
)
def test_the_query_ends_at_the_first_blank_line_or_tag(documentation):
    assert documentation_summary(documentation) == "Reads a\nfile."


def test_both_published_formats_give_the_same_function():
    function = codesearchnet_function(HUB)
    assert (function.repository, function.path, function.language, function.name) == ("owner/name", "a.go", "go", "A")
    assert (function.line, function.start_byte, function.license) == (37, None, None)
    assert (function.description, function.code, function.source) == ("Does it well.", "func A() {}", "func A() {}")
    assert codesearchnet_function(LINES) == function


@pytest.mark.parametrize(
    ("code", "stripped"),
    [
        (PYTHON["func_code_string"], "def a(self):\n        return 1"),
        ('    def a(self):\n        """Does it."""\n        return 1\n', "def a(self):\n    return 1"),
        ("@b\ndef a():\n    'Does it.'\n    print 1", "@b\ndef a():\n    print 1"),
        ("def a():\n    return 1", "def a():\n    return 1"),
    ],
)
def test_python_code_loses_its_docstring_and_the_source_keeps_it(code, stripped):
    function = codesearchnet_function({**PYTHON, "func_code_string": code})
    assert function.code == stripped
    assert function.source == code


@pytest.mark.parametrize("code", ['def a(:\n    """Does it."""\n    return 1', 'def a():\n    """Does it."""', "a = 1"])
def test_python_code_that_may_keep_its_query_is_refused(code):
    with pytest.raises(LeakingDocstringError, match="does not parse"):
        codesearchnet_function({**PYTHON, "func_code_string": code})


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"func_code_string": None}, "data.codesearchnet.column", "func_code_string or code"),
        ({"language": None}, "data.codesearchnet.column", "language"),
        ({"language": "cobol"}, "data.language.unknown", "cobol"),
    ],
)
def test_other_rows_are_refused(change, key, value):
    with raises(key, value):
        codesearchnet_function({**HUB, **change})


def test_folders_of_json_lines_are_read_in_order(tmp_path):
    folder = tmp_path / "go" / "final" / "jsonl"
    folder.mkdir(parents=True)
    rows = [LINES | {"url": f"https://a.b/c.go#L{number}"} for number in range(4)]
    with gzip.open(folder / "go_train_0.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row | {"partition": "train"}) + "\n" for row in rows[:2])
    (folder / "go_train_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    found = list(read_codesearchnet(tmp_path))
    assert [one.line for one in found] == [0, 1, 2, 3]
    assert len({function_id(one) for one in found}) == 4
    assert [one.line for one in read_codesearchnet(tmp_path, split="train")] == [0, 1]
    assert list(read_codesearchnet(folder / "go_train_1.jsonl", languages=["java"])) == []


def test_parquet_files_with_the_columns_of_the_hub_are_read(tmp_path):
    datasets.Dataset.from_list([HUB, HUB]).to_parquet(tmp_path / "rows.parquet")
    assert list(read_codesearchnet(tmp_path)) == [codesearchnet_function(HUB)] * 2


def test_rows_that_cannot_be_stripped_are_left_out_and_counted(tmp_path):
    broken = PYTHON | {"func_code_string": 'def a(:\n    """Does it."""\n    return 1'}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (broken, PYTHON)))
    counts = Counter()
    assert [one.code for one in read_codesearchnet(tmp_path, counts=counts)] == ["def a(self):\n        return 1"]
    assert counts == {"rows": 2, "docstring cannot be removed": 1}


def test_a_damaged_file_is_named_and_a_byte_order_mark_is_none_of_its_damage(tmp_path):
    whole = gzip.compress(b"\xef\xbb\xbf" + (json.dumps(LINES) + "\n").encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert len(list(read_codesearchnet(tmp_path))) == 50
    for content in (whole[:-20], whole[:30] + bytes(20) + whole[50:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with raises("data.source.damaged", "a.jsonl.gz"):
            list(read_codesearchnet(tmp_path))


@pytest.mark.parametrize("line", ["{", "[]"])
def test_broken_lines_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(json.dumps(HUB) + f"\n{line}\n")
    with raises("data.row", "line 2"):
        list(read_codesearchnet(tmp_path))
