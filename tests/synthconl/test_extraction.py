import json
from collections import Counter

import pytest

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl.extraction import FUNCTION_SCHEMA, function_rows
from tests.errors import raises
from tests.tiny import write_files

PYTHON = 'def {0}(value):\n    """Returns the {0} of a value."""\n    result = value.{0}\n    return result\n'
GO = "package main\n\n// {0} returns the name of a value.\nfunc {0}(value Value) string {{\n\treturn value.{0}\n}}\n"
CPP = "class A {{\n public:\n  // Returns the {0} of a value.\n  int {0}(int value) {{\n    return value;\n  }}\n}};\n"


@pytest.fixture
def folder(tmp_path):
    files = {
        "one/a.py": "\n\n".join(map(PYTHON.format, ("size", "name"))),
        "one/b.go": GO.format("name"),
        "two/a.py": "\n\n".join(map(PYTHON.format, ("size", "kind"))),
        "two/a.h": CPP.format("size"),
        "two/tests/test_a.py": PYTHON.format("left_out"),
    }
    write_files(tmp_path, files)
    return tmp_path


def rows_of(*corpora, languages=LANGUAGES, max_characters=1000, **options):
    counts = Counter()
    options = {"processes": 0, "progress": False} | options
    rows = list(function_rows(corpora, languages=languages, max_characters=max_characters, counts=counts, **options))
    return rows, counts


def test_documented_functions_of_files_become_rows_once_each(folder):
    rows, counts = rows_of({"folder": str(folder)})
    assert all(list(row) == FUNCTION_SCHEMA.names for row in rows)
    names = ("repository_name", "func_path_in_repository", "language1_CSN")
    found = [" ".join(row[name] for name in names) for row in rows]
    assert found == ["one a.py python"] * 2 + ["one b.go go", "two a.h cpp", "two a.py python"]
    assert len({row["id"] for row in rows}) == 5
    assert rows[0]["func_documentation_string"] == "Returns the size of a value."
    assert rows[0]["func1_CSN"] == "def size(value):\n    result = value.size\n    return result"
    assert (counts["documented functions"], counts["functions kept"]) == (6, 5)
    assert counts["dropped: same code as an earlier function"] == counts["files left out: test code"] == 1
    assert rows_of({"folder": str(folder)}, processes=2) == (rows, counts)


def test_only_the_requested_languages_are_kept_headers_of_cpp_included(folder):
    assert {row["language1_CSN"] for row in rows_of({"folder": str(folder)}, languages=("python",))[0]} == {"python"}
    rows, _ = rows_of({"folder": str(folder)}, languages=("cpp",))
    assert [row["func_path_in_repository"] for row in rows] == ["a.h"]
    _, counts = rows_of({"folder": str(folder)}, languages=("c", "go"))
    assert counts["dropped: another language"] == 1


def test_long_functions_and_those_of_an_earlier_corpus_are_dropped_and_counted(folder):
    rows, counts = rows_of({"folder": str(folder / "one"), "depth": 0}, {"folder": str(folder)})
    assert [row["repository_name"] for row in rows] == ["one", "one", "one", "two", "two"]
    assert counts["dropped: same code as an earlier function"] == 4
    shortest = min(len(row["func1_CSN"]) for row in rows)
    few, counts = rows_of({"folder": str(folder)}, max_characters=shortest)
    assert {len(row["func1_CSN"]) for row in few} == {shortest}
    assert counts[f"dropped: more than {shortest} characters"] + len(few) >= 5


def codesearchnet_row(**changes):
    row = {
        "repository_name": "owner/name",
        "func_path_in_repository": "a.py",
        "func_code_url": "https://example.org/a.py#L3-L9",
        "language": "python",
        "whole_func_string": PYTHON.format("size"),
        "func_code_string": PYTHON.format("size"),
        "func_documentation_string": "Returns the size of a value.\n\nArgs: value.",
    }
    return row | changes


def test_rows_of_codesearchnet_lose_their_docstring_and_keep_their_url_and_must_be_json(tmp_path):
    go = {"language": "go", "func_code_string": "func A() int {\n\treturn 1\n}", "func_code_url": "https://b.org"}
    lines = [
        codesearchnet_row(),
        codesearchnet_row(**go),
        codesearchnet_row(language="rust"),
        codesearchnet_row(language=5),
        codesearchnet_row(func_code_string='def a(:\n"""Returns the size of a value.\n\nArgs: value."""'),
        codesearchnet_row(**go | {"func_code_string": 'func A() string {\n\treturn "\ud800"\n}'}),
        codesearchnet_row(**go | {"func_code_string": "func B() int {\n\treturn 1\n}", "repository_name": "\ud800"}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, counts = rows_of({"codesearchnet": str(tmp_path / "rows.jsonl")})
    assert [row["func_code_url"] for row in rows] == ["https://example.org/a.py#L3-L9", "https://b.org"]
    assert rows[0]["func1_CSN"] == "def size(value):\n    result = value.size\n    return result"
    assert rows[0]["func_documentation_string"] == "Returns the size of a value."
    assert len({row["id"] for row in rows}) == 2
    dropped = {"another language": 2, "its docstring can't be taken out": 1, "characters that no file can hold": 2}
    expected = {"rows of CodeSearchNet": 7, "functions kept": 2}
    assert counts == expected | {f"dropped: {reason}": number for reason, number in dropped.items()}
    (tmp_path / "rows.jsonl").write_text('{"language": "python"')
    with raises("synthconl.codesearchnet", "line 1", "(not JSON)"):
        rows_of({"codesearchnet": str(tmp_path / "rows.jsonl")})
