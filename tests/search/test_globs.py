import fnmatch
import re

import pytest

from modular_star_encoder.search.vector_store import glob_expression
from tests.errors import raises

PATHS = ["a.py", "src/a.py", "src/deep/b.py", "src/it's (1).go", "src/[x].js", "source/a.py", "src/a.pyi", "src/a+b.c"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", {"a.py", "src/a.py", "src/deep/b.py", "source/a.py"}),
        ("a.py", {"a.py", "src/a.py", "source/a.py"}),
        ("./a.py", {"a.py"}),
        ("src/*.py", {"src/a.py"}),
        ("src/**/*.py", {"src/a.py", "src/deep/b.py"}),
        ("src/**", set(PATHS) - {"a.py", "source/a.py"}),
        ("src/deep/", {"src/deep/b.py"}),
        ("?.py", {"a.py", "src/a.py", "src/deep/b.py", "source/a.py"}),
        ("[!a].py", {"src/deep/b.py"}),
        ("[a-c].py", {"a.py", "src/a.py", "src/deep/b.py", "source/a.py"}),
        ("it's (1).go", {"src/it's (1).go"}),
        ("[[]x].js", {"src/[x].js"}),
        ("a+b.c", {"src/a+b.c"}),
        ("a.p", set()),
        ("src", set()),
    ],
)
def test_patterns_choose_paths(pattern, expected):
    assert {path for path in PATHS if re.search(glob_expression(pattern), path)} == expected


@pytest.mark.parametrize("inside", ["+--", "a-", "-a", "--/", "a-c-e", "&&a", "!-~", "!--", "~~a", "^a", "\\a", "[a"])
def test_brackets_mean_what_they_mean_to_the_shell_in_python(inside):
    names = [f"{chr(code)}.py" for code in range(33, 127) if chr(code) != "/"]
    pattern = f"[{inside}].py"
    expected = fnmatch.filter(names, pattern)
    expression = glob_expression(pattern)
    assert [name for name in names if re.search(expression, name)] == expected


@pytest.mark.parametrize(
    ("pattern", "key", "named"),
    [(" ", "blank", "*.py"), ("src/[ab.py", "bracket", "src/[ab.py"), ("[az-b].py", "range", "z-b")],
)
def test_patterns_without_meaning_are_refused(pattern, key, named):
    with raises(f"search.path.{key}", named):
        glob_expression(pattern)
