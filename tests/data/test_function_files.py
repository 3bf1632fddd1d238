"""Functions as the texts of a corpus."""

import pytest

from modular_star_encoder.data.functions import open_corpus
from tests.errors import raises

PYTHON = (
    "import os\n\n# Licence: any.\n\n\ndef outer(a):\n    def inner():\n        return a\n\n"
    "    return inner\n\n\nx = 1\n"
)
GO = "package one\n\n// Add adds.\nfunc Add(a int, b int) int {\n\treturn a + b\n}\n"


@pytest.fixture
def corpus(tmp_path):
    for name, content in {"a/one.py": PYTHON, "b/two.go": GO, "b/broken.py": "def (:\n" * 20}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return open_corpus({"folder": str(tmp_path), "snippets": "functions"})


def test_each_outermost_function_is_a_text_without_what_stands_around_it(corpus):
    found = {(file.repository, file.path, file.language): file.text for file in corpus}
    assert found == {
        ("a", "one.py#L6", "python"): PYTHON[PYTHON.index("def outer") : PYTHON.index("\n\n\nx")],
        ("b", "two.go#L4", "go"): GO[GO.index("func") :].rstrip("\n"),
    }
    assert corpus.skipped["does not parse"] == 1


def test_units_are_those_of_the_files(corpus):
    assert corpus.repositories == ("a", "b")
    assert [file.repository for file in corpus.skip(1)] == ["b"]
    assert [file.repository for file in corpus.shard(0, 2)] == ["a"]
    assert list(corpus.skip(1).shard(1, 2)) == []


def test_unknown_snippets_are_refused(tmp_path):
    with raises("data.corpus.snippets", "classes"):
        open_corpus({"folder": str(tmp_path), "snippets": "classes"})
