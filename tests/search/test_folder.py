from collections import Counter

import numpy as np
import pytest
import torch

from modular_star_encoder.data.languages.registry import LANGUAGE_OF_SUFFIX
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.search.folder import Hit, folder_functions, search_folder
from tests.data.polyglot import NAMES, SOURCES
from tests.tiny import tiny_model, tiny_tokenizer

SOURCE = '''\
def documented(first):
    """Return the first."""
    return first


class Stack:
    def push(self, item):
        self.items.append(item)
'''


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a package of the same name and a module in it."""
    root = tmp_path / "stack"
    (root / "stack").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    (root / "stack" / "core.py").write_text(SOURCE)
    (root / "setup.py").write_text("def setup():\n    pass\n")
    return root


def search(folder, queries, model, tokenizer, **options):
    return search_folder(folder, queries, model, tokenizer, progress=False, **options)


def test_functions_without_a_docstring_are_found_too(checkout):
    assert {function.name for function in folder_functions(checkout, progress=False)} == {
        "documented",
        "Stack.push",
        "setup",
    }


def test_functions_of_every_language_are_found(tmp_path):
    suffixes = {
        LANGUAGE_OF_SUFFIX[suffix]: suffix for suffix in (".py", ".java", ".go", ".php", ".rb", ".js", ".c", ".cc")
    }
    for language, suffix in suffixes.items():
        (tmp_path / f"file{suffix}").write_text(SOURCES[language], encoding="utf-8")
    found = Counter(function.language for function in folder_functions(tmp_path, progress=False))
    assert found == {language: len(NAMES[language]) for language in SOURCES}


def test_hits_are_the_nearest_by_cosine_at_the_exit_with_the_published_prompts(checkout, model, tokenizer):
    functions = folder_functions(checkout, progress=False)
    for exit_layer in (1, 4):
        options = {"exit_layers": (exit_layer,), "progress": False}
        query = encode_exits(model, tokenizer, [text_prompt() + "push an item"], **options)[exit_layer][0]
        texts = [code_prompt("python") + function.code for function in functions]
        scores = encode_exits(model, tokenizer, texts, **options)[exit_layer] @ query
        (hits,) = search(checkout, ["push an item"], model, tokenizer, exit_layer=exit_layer)
        assert [hit.name for hit in hits] == [functions[i].name for i in np.argsort(-scores)]
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        assert {hit.exit_layer for hit in hits} == {exit_layer}


def test_the_docstring_is_not_part_of_what_is_embedded(checkout):
    codes = {function.name: function.code for function in folder_functions(checkout, progress=False)}
    assert codes["documented"] == "def documented(first):\n    return first"


def test_each_query_gets_its_own_hits_at_most_top_k(checkout, model, tokenizer):
    results = search(checkout, ["push", "return the first"], model, tokenizer, top_k=2)
    assert [len(hits) for hits in results] == [2, 2]
    alone = search(checkout, ["return the first"], model, tokenizer, top_k=2)[0]
    assert [hit.score for hit in results[1]] == pytest.approx([hit.score for hit in alone], abs=1e-5)
    assert [hit.score for hit in results[0]] != pytest.approx([hit.score for hit in alone], abs=1e-3)
    assert [len(hits) for hits in search(checkout, ["push"], model, tokenizer, top_k=99)] == [3]


def locations(hits):
    return {hit.name: (hit.path, hit.line) for hit in hits}


def test_paths_lead_from_the_folder_as_given_to_the_line(checkout, model, tokenizer, monkeypatch):
    monkeypatch.chdir(checkout.parent)
    expected = {"documented": ("core.py", 1), "Stack.push": ("core.py", 7)}
    for folder, prefix in (("stack", "stack/stack/"), ("stack/stack", "stack/stack/"), (".", "stack/stack/")):
        (hits,) = search(folder, ["push"], model, tokenizer)
        found = locations(hits)
        assert {name: found[name] for name in expected} == {
            name: (prefix + path, line) for name, (path, line) in expected.items()
        }
    assert found["setup"] == ("stack/setup.py", 1)


def test_a_hit_prints_as_location_score_name_and_exit():
    assert str(Hit("src/a.py", 12, "Stack.push", 0.51249, 9)) == "src/a.py:12  0.512  Stack.push  (exit 9)"


def test_the_deepest_exit_is_the_default(checkout, model, tokenizer):
    assert search(checkout, ["push"], model, tokenizer)[0][0].exit_layer == 4


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        ([], {}, "at least one question"),
        ([" "], {}, "none of them blank"),
        ("push", {}, "list of at least one question"),
        (["push"], {"top_k": 0}, "top_k must be at least 1"),
        (["push"], {"exit_layer": 3}, "its exits are 1, 2, 4"),
    ],
)
def test_bad_input_says_what_is_allowed(checkout, model, tokenizer, queries, options, message):
    with pytest.raises(ValueError, match=message):
        search(checkout, queries, model, tokenizer, **options)


def test_a_folder_without_functions_is_refused(tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match="does not exist"):
        search(tmp_path / "no", ["push"], model, tokenizer)
    (tmp_path / "constants.py").write_text("PI = 3\n")
    with pytest.raises(ValueError, match="holds no function in python, java, go"):
        search(tmp_path, ["push"], model, tokenizer)
