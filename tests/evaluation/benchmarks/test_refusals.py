import gzip
import json
import os
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


GO = "go_test.jsonl.gz"
JAVA, CS = "test.java-cs.txt.java", "test.java-cs.txt.cs"
COSQA = "cosqa-retrieval-test-500.json"
EXERCISES = "exercises.jsonl.gz"

CSN, FULL = "codesearchnet-999", "codesearchnet-full"
URL = published.hub_rows("go")[0]["func_code_url"]
OTHER_URL = published.original_rows("ruby")[3]["url"]

WRONG = [
    row(CSN, GO, 2, "line 2: Invalid JSON", func_code_string="a\ud800b"),
    row(CSN, GO, 2, "line 2: func_code_string: Field required", func_code_string=None),
    row(CSN, GO, 3, "line 3: expected a row of go, found php", language="php"),
    row(CSN, GO, 4, "line 4: func_documentation_string: ", func_documentation_string="\n"),
    row(CSN, GO, 4, "line 4: expected a url that no earlier row has", func_code_url=URL),
    line(CSN, GO, 2, "[1]", "line 2: Input should be an object"),
    damage(CSN, GO, cut_off, "expected more lines, found the end of a truncated file"),
    damage(CSN, GO, lambda path: path.write_bytes(b"plain"), "line 1: expected a gzip file"),
    damage(CSN, "python/test-00000-of-00001.parquet", cut_off, "expected a Parquet file"),
    row(FULL, "ruby/test.jsonl", 2, "line 2: expected a url that is in codebase.jsonl", url="elsewhere"),
    row(FULL, "ruby/codebase.jsonl", 1, "line 1: code_tokens.0: ", code_tokens=[1]),
    row(FULL, "ruby/codebase.jsonl", 4, "line 4: expected another url than in line 1", url=OTHER_URL),
    line("translation", JAVA, 2, " ", "line 2: expected a function, found an empty line"),
    damage("translation", CS, lambda path: path.write_text("one\n"), "expected 4 lines, as in test.java-cs.txt.java"),
    damage("translation", CS, lambda path: path.write_bytes(b"a\nb\xff\nc\nd\n"), "line 2: expected text in utf-8"),
    row("poj104", "test.jsonl", 4, "line 4: label: ", label="64"),
    row("poj104", "test.jsonl", 5, "line 5: expected another index than in line 1", index="40243"),
    line("bigclonebench", "test.txt", 2, "0\t7", "line 2: expected two ids and a label 0 or 1"),
    line("bigclonebench", "valid.txt", 1, "0\t8\t1", "line 1: expected ids that are in data.jsonl, found 8"),
    row("advtest", "test.jsonl", 3, "line 3: expected another idx than in line 1", idx=0),
    line("cosqa", "code_idx_map.txt", 1, "{}", "should have at least 1 item"),
    damage("cosqa", COSQA, wrong_index, "line 1: expected a retrieval_idx that is in code_idx_map.txt, found 33"),
    row("exercism-text", EXERCISES, 2, "line 2: code.go: ", code={"go": ""}),
    row("exercism-text", EXERCISES, 2, "line 2: expected another slug than in line 1, found 'open'", slug="open"),
    damage("exercism-code", EXERCISES, emptied, "line 1: expected a JSON object, found an empty file"),
]


@pytest.mark.parametrize(("name", "spoil", "file", "message"), WRONG)
def test_a_wrong_file_is_an_error_by_name_and_line(tmp_path, name, spoil, file, message):
    WRITERS[name](tmp_path)
    load_benchmark(name, tmp_path, allow_subset=True)
    spoil(tmp_path)
    with raises("benchmark.file.unexpected", message, file.split("/")[-1]) as error:
        load_benchmark(name, tmp_path, allow_subset=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.sized])
def test_a_part_of_a_benchmark_is_an_error_unless_it_is_allowed_and_then_noted(tmp_path, name):
    WRITERS[name](tmp_path)
    with raises("benchmark.file.unexpected", "found"):
        load_benchmark(name, tmp_path)
    assert any(" of " in note for task in load_benchmark(name, tmp_path, allow_subset=True) for note in task.notes)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "folder"])
def test_a_folder_without_the_files_says_what_was_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))} .*\.(jsonl|csv|txt)"):
        load_benchmark(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_benchmark(name, tmp_path / "nowhere")


READERS = (rows.read_json, lambda path: rows.read_jsonl(path, list))
LONG_LIST = "[" + "0," * 2000 + "0]"


@pytest.mark.parametrize(
    ("read", "limit", "lines", "message"),
    [
        *((READERS[1], "MAX_LINE_BYTES", lines, "") for lines in (["x" * 3000], ["[]"] * 2000, ["[" * 900])),
        (READERS[0], "files.MAX_JSON_VALUES", [LONG_LIST], "values"),
        (READERS[1], "MAX_LINE_VALUES", [LONG_LIST], "values"),
        (READERS[1], "files.MAX_JSON_VALUES", ["[0]"] * 2000, "values"),
    ],
)
def test_lines_without_end_and_files_that_unpack_to_more_bytes_or_values_than_allowed_are_not_read(
    tmp_path, monkeypatch, read, limit, lines, message
):
    monkeypatch.setattr(f"{rows.__name__}.{limit}", 1000)
    path = tmp_path / ("rows.json" if read is rows.read_json else "rows.jsonl.gz")
    published.write_lines(path, lines)
    with raises("benchmark.file.unexpected", path, message):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_is_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.json")
    with raises("benchmark.file.unexpected", tmp_path / "pipe.json"):
        read(tmp_path / "pipe.json")
