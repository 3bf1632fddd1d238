"""Sources of fine-tuning: what is read, what is skipped and counted, what is refused."""

import json

import pytest

from modular_star_encoder.data.pairs import BadRowError, RetrievalExample, Snippet, read_retrieval_examples

PYTHON, GO = "def add(a, b):\n    return a + b", "func add(a, b int) int {\n\treturn a + b\n}"


def triplet(**changes):
    row = {
        "repository_name": "owner/name",
        "func_documentation_string": "Adds two numbers.",
        "func1_CSN": PYTHON,
        "language1_CSN": "python",
        "func2": GO,
        "language2": "Go",
    }
    return row | changes


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def read(settings):
    return read_retrieval_examples(settings, progress=False)


def test_a_triplet_is_prose_and_two_snippets(tmp_path):
    found = read({"triplets": write(tmp_path / "rows.jsonl", [triplet()])})
    snippets = (Snippet("python", PYTHON), Snippet("go", GO))
    assert found["triplets"].texts == [RetrievalExample("Adds two numbers.", snippets, "owner/name")]


BAD_TRIPLETS = {
    "empty func2": triplet(func2="  "),
    "unknown language2": triplet(language2="cobol"),
    "no column func2": {name: value for name, value in triplet().items() if name != "func2"},
    "description in place of code": triplet(func1_CSN="adds two numbers"),
    "prose in place of code": triplet(func2="This function adds two integers in Go."),
    "halves of characters (lone surrogates)": triplet(func2=GO + "// \ud800"),
    "no JSON": "{",
}


@pytest.mark.parametrize("reason", BAD_TRIPLETS)
def test_bad_rows_are_skipped_with_a_count_and_an_example_or_refused(tmp_path, reason):
    file = write(tmp_path / "rows.jsonl", [triplet(), BAD_TRIPLETS[reason], BAD_TRIPLETS[reason]])
    found = read({"triplets": file})["triplets"]
    assert len(found.texts) == 1
    assert found.skipped == {reason: 2}
    assert set(found.examples) == {reason}
    assert ", line 2: " in found.examples[reason]
    assert found.examples[reason].encode()
    with pytest.raises(BadRowError, match=reason.split()[0]):
        read({"triplets": {"source": file, "strict": True}})


def test_columns_of_triplets_may_have_other_names(tmp_path):
    row = {("doc" if name == "func_documentation_string" else name): value for name, value in triplet().items()}
    file = write(tmp_path / "rows.jsonl", [row])
    found = read({"triplets": {"source": file, "columns": {"description": "doc"}}})
    assert found["triplets"].texts[0].description == "Adds two numbers."


def test_hard_negatives_are_code_that_is_not_the_rows_own(tmp_path):
    rows = [triplet(worse=code) for code in ("def sub(a, b): ...", GO + "  ", "It takes the second number away.")]
    source = {"source": write(tmp_path / "rows.jsonl", rows), "columns": {"negative": "worse"}}
    found = read({"triplets": source})["triplets"]
    assert [text.negative for text in found.texts] == [Snippet("python", "def sub(a, b): ...")]
    assert found.skipped == {"its own code as the negative": 1, "prose in place of code": 1}
    with pytest.raises(ValueError, match=r"data\.functions has none: use it alone"):
        read({"functions": {"folder": str(tmp_path)}, "triplets": source})


def test_documented_functions_of_repositories_have_one_snippet(tmp_path):
    folder = tmp_path / "code" / "repository"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text(
        'def add(a, b):\n    """Add two given numbers."""\n    total = a + b\n    return total\n'
    )
    (text,) = read({"functions": {"folder": str(tmp_path / "code")}})["functions"].texts
    assert (text.description, text.repository) == ("Add two given numbers.", "repository")
    assert [snippet.language for snippet in text.snippets] == ["python"]


def test_parallel_solutions_have_no_description_and_only_our_languages(tmp_path):
    rows = [
        {"slug": "add", "description": "Add.", "code": {"python": PYTHON, "go": GO, "rust": "fn add() {}", "c": None}},
        {"slug": "lonely", "code": {"python": PYTHON}},
        {"slug": "wrong", "code": {"python": PYTHON, "go": "Adds two numbers in Go."}},
        {"slug": "none", "code": "def"},
        {"slug": "half \ud800", "code": {"python": PYTHON, "go": GO}},
        "{",
    ]
    found = read({"parallel": write(tmp_path / "exercises.jsonl", rows)})["parallel"]
    assert found.texts == [RetrievalExample("", (Snippet("python", PYTHON), Snippet("go", GO)), "add")]
    assert found.skipped == {
        "language rust, none of ours": 1,
        "fewer than two solutions": 2,
        "prose in place of code": 1,
        "no slug, or no mapping code": 1,
        "halves of characters (lone surrogates)": 1,
        "no JSON": 1,
    }
    assert found.examples["fewer than two solutions"].endswith('line 2: "lonely"')
    assert found.examples["no JSON"].endswith("line 6: {")
    assert found.examples["halves of characters (lone surrogates)"].encode()


def test_a_source_that_is_none_is_as_if_left_out(tmp_path):
    good = write(tmp_path / "rows.jsonl", [triplet()])
    assert list(read({"triplets": good, "functions": None, "parallel": None})) == ["triplets"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"triplets": None}, "none is given"),
        ({}, "one or several of the sources triplets, functions, parallel; none is given"),
        ({"tripletz": "x"}, "not tripletz"),
        ({"triplets": {}}, "data.triplets can't be used: source"),
        ({"triplets": {"source": "FILE", "columns": {"text": "x"}}}, "data.triplets can't be used"),
        ({"functions": "code"}, "settings of a corpus"),
        ({"triplets": "FILE"}, "no row to train on: 1 × empty func2"),
        ({"parallel": "missing.jsonl"}, "no file"),
    ],
)
def test_sources_that_cannot_be_used_are_refused_in_one_sentence(tmp_path, settings, message):
    file = write(tmp_path / "rows.jsonl", [triplet(func2="")])
    settings = json.loads(json.dumps(settings).replace("FILE", file))
    with pytest.raises(ValueError, match=message):
        read(settings)
