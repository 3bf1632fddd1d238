import pytest

from modular_star_encoder.data.functions import (
    LeakingDocstringError,
    codesearchnet_function,
    documentation_summary,
)
from tests.errors import raises

HUB = {
    "repository_name": "owner/name",
    "func_path_in_repository": "a.go",
    "func_name": "A",
    "whole_func_string": "func A() {}",
    "language": "go",
    "func_code_string": "func A() {}",
    "func_documentation_string": "Does it\nwell.\n\nSlowly.",
    "func_code_url": "https://github.com/owner/name/blob/0ab/a.go#L37-L60",
}
NAMES = {
    "repository_name": "repo",
    "func_path_in_repository": "path",
    "whole_func_string": "original_string",
    "func_code_string": "code",
    "func_documentation_string": "docstring",
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
