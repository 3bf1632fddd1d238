"""Wrong and partial files are refused with the file, the line, and what was expected there."""

import gzip
import json
import re

import pytest

from modular_star_encoder.evaluation.benchmarks import BENCHMARKS, load_benchmark, rows
from tests.errors import raises
from tests.evaluation.benchmarks import published
from tests.evaluation.benchmarks.published import WRITERS


def read_lines(path):
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode().splitlines()


def change_row(path, number, **changes):
    """Change fields of a row of JSON lines; None removes the field."""
    row = json.loads(read_lines(path)[number - 1]) | changes
    replace_line(path, number, json.dumps({name: value for name, value in row.items() if value is not None}))


def replace_line(path, number, line):
    lines = read_lines(path)
    lines[number - 1] = line
    published.write_lines(path, lines)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-12])


def wrong_index(path):
    path.write_text(path.read_text().replace('"retrieval_idx": 3', '"retrieval_idx": 33'))


def emptied(path):
    path.write_bytes(gzip.compress(b""))


def damage(name, file, function, message):
    return pytest.param(name, lambda folder: function(folder / file), file, message, id=f"{name} {message}")


def row(name, file, number, message, **changes):
    return damage(name, file, lambda path: change_row(path, number, **changes), message)


def line(name, file, number, text, message):
    return damage(name, file, lambda path: replace_line(path, number, text), message)


GO, RUBY = "go_test.jsonl.gz", "ruby/final/jsonl/test/ruby_test_1.jsonl.gz"
MTEB, HUMAN = "ruby-{}/test-00000-of-00001.jsonl", "resources/annotationStore.csv"
MTEB_QUERIES, MTEB_CORPUS, MTEB_JUDGED = (MTEB.format(part) for part in ("queries", "corpus", "qrels"))
JAVA, CS = "test.java-cs.txt.java", "test.java-cs.txt.cs"
COSQA = "cosqa-retrieval-test-500.json"
EXERCISES = "exercises.jsonl.gz"

CSN, FULL, SAMPLE, JUDGED = (f"codesearchnet-{kind}" for kind in ("999", "full", "mteb", "human"))
URL = published.hub_rows("go")[0]["func_code_url"]
OTHER_URL = published.original_rows("ruby")[3]["url"]

WRONG = [
    row(CSN, GO, 2, "line 2: expected valid Unicode text, found halves", func_code_string="a\ud800b"),
    row(CSN, GO, 2, "line 2: expected the field 'func_code_string'", func_code_string=None),
    row(CSN, GO, 3, "line 3: expected a row of go, found php", language="php"),
    row(CSN, GO, 4, "line 4: expected code and documentation", func_documentation_string="\n"),
    row(CSN, GO, 4, "line 4: expected a url that no earlier row has", func_code_url=URL),
    row(CSN, RUBY, 1, "line 1: expected a string as 'docstring', found a list", docstring=["a"]),
    line(CSN, GO, 2, "{broken", "line 2: expected a JSON object with 'language', found '{broken'"),
    line(CSN, GO, 2, "[1]", "line 2: expected an object with 'language', found a list"),
    damage(CSN, GO, cut_off, "expected more lines, found the end of a truncated file"),
    damage(CSN, GO, lambda path: path.write_bytes(b"plain"), "line 1: expected a gzip file"),
    damage(CSN, "python/test-00000-of-00001.parquet", cut_off, "expected a Parquet file"),
    row(FULL, "ruby/test.jsonl", 2, "line 2: expected a url that is in codebase.jsonl", url="elsewhere"),
    row(FULL, "ruby/codebase.jsonl", 1, "line 1: expected a list as 'code_tokens'", code_tokens="a b"),
    row(FULL, "ruby/codebase.jsonl", 1, "line 1: expected a list of strings as 'code_tokens'", code_tokens=[1]),
    row(FULL, "ruby/codebase.jsonl", 4, "line 4: expected another url than in line 1", url=OTHER_URL),
    row(SAMPLE, MTEB_CORPUS, 2, "line 2: expected a string as 'id' or '_id'", _id=None),
    row(SAMPLE, MTEB_JUDGED, 3, "line 3: expected ids of known texts, found 9", **{"query-id": "9"}),
    row(SAMPLE, MTEB_JUDGED, 3, "expected a relevant document for the query 2", score=0),
    row(SAMPLE, MTEB_QUERIES, 1, "line 1: expected the field 'text'", text=None),
    line(JUDGED, HUMAN, 1, "Language,Query,Url,Relevance,Notes", "line 1: expected the columns Language, Query"),
    line(JUDGED, HUMAN, 3, "Go,open file,https://x,4,", "line 3: expected a language, a query, a url and a relevance"),
    row(JUDGED, "go/undocumented.jsonl", 1, "line 1: expected a url and the code", function=" "),
    line("translation", JAVA, 2, " ", "line 2: expected a function, found an empty line"),
    damage("translation", CS, lambda path: path.write_text("one\n"), "expected 4 lines, as in test.java-cs.txt.java"),
    damage("translation", CS, lambda path: path.write_bytes(b"a\nb\xff\nc\nd\n"), "line 2: expected text in utf-8"),
    row("poj104", "test.jsonl", 4, "line 4: expected a label from 81 to 104, found '64'", label="64"),
    row("poj104", "test.jsonl", 4, "expected the same number of programs, at least two", label="81"),
    row("poj104", "test.jsonl", 5, "line 5: expected another index than in line 1", index="40243"),
    row("poj104", "test.jsonl", 5, "line 5: expected a string as 'index', found a whole number", index=3),
    line("bigclonebench", "test.txt", 2, "0\t7", "line 2: expected two ids and a label 0 or 1"),
    line("bigclonebench", "valid.txt", 1, "0\t8\t1", "line 1: expected ids that are in data.jsonl, found 8"),
    damage("bigclonebench", "valid.txt", lambda path: path.write_text("0\t7\t1\n"), "expected pairs with label 0 and"),
    row("advtest", "test.jsonl", 3, "line 3: expected another idx than in line 1", idx=0),
    row("advtest", "test.jsonl", 3, "line 3: expected the field 'function_tokens' or", function_tokens=None),
    line("cosqa", "code_idx_map.txt", 1, "[]", "line 1: expected a JSON object {code: whole number}"),
    line("cosqa", COSQA, 3, "  oops", "line 3: expected one JSON value"),
    damage("cosqa", COSQA, wrong_index, "line 1: expected a retrieval_idx that is in code_idx_map.txt, found 33"),
    damage("cosqa", COSQA, lambda path: path.write_text("[]"), "line 1: expected a list of objects"),
    row("exercism-text", EXERCISES, 2, "line 2: expected a solution in go, found none", code={"go": ""}),
    row("exercism-text", EXERCISES, 2, "line 2: expected another slug than in line 1, found 'open'", slug="open"),
    row("exercism-code", EXERCISES, 1, "line 1: expected an object as 'code', found a list", code=[]),
    damage("exercism-code", EXERCISES, emptied, "line 1: expected a JSON object with 'slug'"),
]


@pytest.mark.parametrize(("name", "spoil", "file", "message"), WRONG)
def test_a_wrong_file_is_an_error_by_name_and_line(tmp_path, name, spoil, file, message):
    WRITERS[name](tmp_path)
    load_benchmark(name, tmp_path, allow_subset=True)
    spoil(tmp_path)
    with raises("benchmark.file.unexpected", message, file.split("/")[-1]) as error:
        load_benchmark(name, tmp_path, allow_subset=True)
    assert str(error.value).count(". ") == 0
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.sized])
def test_a_part_of_a_benchmark_is_an_error_unless_it_is_allowed_and_then_noted(tmp_path, name):
    WRITERS[name](tmp_path)
    with raises("benchmark.file.unexpected", "found"):
        load_benchmark(name, tmp_path)
    if name != "codesearchnet-human":  # whole, but for the annotations of another language
        assert any(" of " in note for task in load_benchmark(name, tmp_path, allow_subset=True) for note in task.notes)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "folder"])
def test_a_folder_without_the_files_says_what_was_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))} .*\.(jsonl|csv|txt)"):
        load_benchmark(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_benchmark(name, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"pools": [["a"]]}', "two or more urls, all different, in pool 1"),
        ('{"pools": [["a", "b"]]}', "only urls of loaded functions in pool 1, found a"),
        ('{"pools": []}', "at least one pool"),
        ('{"pools": ', "line 1: expected one JSON value"),
        ("{}", "the field 'pools'"),
    ],
)
def test_lists_of_candidates_that_do_not_fit_are_an_error(tmp_path, content, message):
    published.write_rows(tmp_path / GO, published.hub_rows("go"))
    lists = tmp_path / "lists"
    with pytest.raises(FileNotFoundError, match=r"go\.json"):
        load_benchmark("codesearchnet-999", tmp_path, candidates=lists)
    lists.mkdir()
    (lists / "go.json").write_text(content)
    with raises("benchmark.file.unexpected", message, "go.json"):
        load_benchmark("codesearchnet-999", tmp_path, candidates=lists)


@pytest.mark.parametrize("content", [b"x" * 3000, b"{}\n" * 2000, b"[" * 900])
def test_lines_without_end_and_files_that_unpack_to_more_than_their_share_are_not_read(tmp_path, monkeypatch, content):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with raises("benchmark.file.unexpected", path):
        rows.read_jsonl(path, {})
