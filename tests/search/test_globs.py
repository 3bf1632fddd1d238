import re

import pytest

from modular_star_encoder.search.globs import glob_expression

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


@pytest.mark.parametrize(("pattern", "message"), [(" ", "must not be blank"), ("src/[ab.py", "without a '\\]'")])
def test_patterns_without_meaning_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        glob_expression(pattern)
