import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from modular_star_encoder.data.pairs import RetrievalExample, Snippet, TripletColumns, open_triplets
from modular_star_encoder.utils.files import write_text
from tests.errors import raises


def row(number=0, **changes):
    """A row as SynthCoNL publishes it."""
    values = {
        "repository_name": f"owner/name{number}",
        "func_path_in_repository": "a.py",
        "func_documentation_string": f"Adds {number}.",
        "func_code_url": "https://example.org",
        "language1_CSN": "python",
        "func1_CSN": f"def add(x):\n    return x + {number}",
        "language2": "c++",
        "func2": f"int add(int x) {{ return x + {number}; }}",
    }
    return values | changes


SNIPPETS = Snippet("python", row()["func1_CSN"]), Snippet("cpp", row()["func2"])
TRIPLET = RetrievalExample("Adds 0.", SNIPPETS, "owner/name0")


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_lines(path, rows):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    data = "\n".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def repositories(reader):
    return [triplet.repository.removeprefix("owner/name") for triplet in reader]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_the_published_columns_become_triplets_again_and_again(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_lines
    reader = open_triplets(write(tmp_path / name, [row(), row(1)]))
    for _ in range(2):
        first, second = reader
        assert first == TRIPLET
        assert second.description == "Adds 1."
    assert reader.skipped == {}


def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    import datasets

    file = write_parquet(tmp_path / "a.parquet", [row()])
    local = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or local)
    assert list(open_triplets("modularStarEncoder/SynthCoNL", revision="v1")) == [TRIPLET]
    ((names, options),) = calls
    assert names[0] == "modularStarEncoder/SynthCoNL"
    assert (options["split"], options["revision"], options["streaming"]) == ("train", "v1", True)


def test_other_names_of_columns_are_read(tmp_path):
    columns = TripletColumns(
        description="nl", code="a", language="la", other_code="b", other_language="lb", repository="r"
    )
    other = {"nl": "Adds.", "a": "x", "la": "C++", "b": "y", "lb": "JavaScript", "r": None}
    (triplet,) = open_triplets(write_parquet(tmp_path / "a.parquet", [other]), columns=columns)
    assert triplet == RetrievalExample("Adds.", (Snippet("cpp", "x"), Snippet("javascript", "y")))


def test_a_column_of_hard_negatives_is_read_with_its_language_or_that_of_the_code(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [row(bad="def sub(x): ...", lb="Go"), row(1, bad=" ", lb="Go")])
    (triplet,) = reader = open_triplets(file, columns=TripletColumns(negative="bad"))
    assert triplet.negative == Snippet("python", "def sub(x): ...")
    with raises("data.row"):
        list(open_triplets(file, columns=TripletColumns(negative="bad"), strict=True))
    (triplet,) = reader = open_triplets(file, columns=TripletColumns(negative="bad", negative_language="lb"))
    assert triplet.negative.language == "go"
    assert list(reader) == [triplet]
    assert reader.skipped == {"empty bad": 1}
    # One column may say the languages of two codes.
    (triplet,) = open_triplets(file, columns=TripletColumns(negative="bad", negative_language="language2"))
    assert triplet.negative.language == triplet.snippets[1].language != triplet.snippets[0].language
    with raises("data.source.column", "worse"):
        open_triplets(file, columns=TripletColumns(negative="worse"))
    with raises("data.triplets.negative_language"):
        TripletColumns(negative_language="lb")


def test_a_folder_gives_the_files_of_a_split(tmp_path):
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [row(number)])
    assert repositories(open_triplets(tmp_path)) == ["0", "1"]
    assert repositories(open_triplets(tmp_path, split="validation")) == ["2"]
    with raises("data.source.split", "test"):
        open_triplets(tmp_path, split="test")


def test_a_folder_without_splits_is_read_whole(tmp_path):
    write_lines(tmp_path / "b.jsonl", [row(1)])
    write_lines(tmp_path / "a.jsonl.gz", [row(0)])
    assert repositories(open_triplets(tmp_path)) == ["0", "1"]


def test_row_groups_without_rows_are_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", [row(0)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]).slice(0, 0), tmp_path / "b.parquet")
    write_parquet(tmp_path / "c.parquet", [row(1)])
    assert repositories(open_triplets(tmp_path)) == ["0", "1"]


def test_what_near_deduplication_says_of_rows_is_none(tmp_path):
    write_parquet(tmp_path / "rows-00000.parquet", [row(0)])
    write_lines(tmp_path / "dropped.jsonl", [{"id": 1, "reason": "near another row"}])
    assert repositories(open_triplets(tmp_path)) == ["0"]
    write_lines(tmp_path / "alone" / "dropped.jsonl", [row(1)])
    assert repositories(open_triplets(tmp_path / "alone")) == ["1"]


def test_a_list_of_files_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.jsonl", [row(0)])
    write_parquet(tmp_path / "b.parquet", [row(1)])
    assert repositories(open_triplets(["~/a.jsonl"])) == ["0"]
    assert repositories(open_triplets(["~/b.parquet"])) == ["1"]


BAD = {
    "empty func2": row(func2="  \n"),
    "empty func1_CSN": row(func1_CSN=None),
    "empty func_documentation_string": row(func_documentation_string=""),
    "unknown language2": row(language2="cobol"),
    "unknown language1_CSN": row(language1_CSN=None),
}

# What parquet can't hold: a column of several kinds, halves of characters.
BAD_IN_JSON = {
    "repository_name is not a text": row(repository_name=5),
    "halves of characters (lone surrogates)": row(repository_name="\ud800"),
}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_rows_that_are_no_triplets_are_skipped_with_count_and_example(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_lines
    reader = open_triplets(write(tmp_path / name, [row(), *BAD.values(), row(func2=""), row(1)]))
    for _ in range(2):
        assert repositories(reader) == ["0", "1"]
        assert reader.skipped == dict.fromkeys(BAD, 1) | {"empty func2": 2}
        assert name in reader.examples["unknown language2"]
        assert reader.examples["unknown language2"].partition(": ")[0].endswith(" 5")


def test_lines_that_are_no_rows_are_skipped_with_count_and_example(tmp_path):
    without = row()
    del without["func2"]
    reader = open_triplets(write_lines(tmp_path / "a.jsonl", ['{"half', "[1]", without, "", row(1), "[" * 100_000]))
    assert repositories(reader) == ["1"]
    assert reader.skipped == {"no JSON": 2, "no JSON object": 1, "no column func2": 1}
    assert reader.examples["no JSON"].endswith('line 1: {"half')
    assert reader.examples["no JSON object"].endswith("line 2: [1]")


def test_a_byte_order_mark_costs_no_row(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [row(), row(1)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert repositories(open_triplets(file)) == ["0", "1"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_option_that_there_is_not_is_refused(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_lines
    with raises("data.source.options", name):
        open_triplets(write(tmp_path / name, [row()]), strcit=True)


def test_damaged_parquet_is_one_sentence_with_its_name(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [row(number) for number in range(2000)])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with raises("data.source.unreadable", "a.parquet"):
        open_triplets(file)
    table = pyarrow.Table.from_pylist([row(number, func2=f"code {number**9}") for number in range(2000)])
    pyarrow.parquet.write_table(table, file, row_group_size=500)
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 200):
        content[place] ^= 255
    file.write_bytes(content)
    with raises("data.source.damaged", "a.parquet"):
        list(open_triplets(file))


def test_repositories_that_are_no_texts_are_skipped_with_examples_that_can_be_written(tmp_path):
    reader = open_triplets(write_lines(tmp_path / "a.jsonl", [row(), *BAD_IN_JSON.values(), row(repository_name=None)]))
    assert [triplet.repository for triplet in reader] == ["owner/name0", ""]
    assert reader.skipped == dict.fromkeys(BAD_IN_JSON, 1)
    assert r'"repository_name": "\ud800"' in reader.examples["halves of characters (lone surrogates)"]
    write_text(tmp_path / "report.json", str(reader.examples))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_in_strict_reading_the_first_bad_row_is_one_sentence(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_lines
    reader = open_triplets(write(tmp_path / name, [row(), *BAD.values()]), strict=True)
    with raises("data.row", 2):
        list(reader)


def test_wrong_sources_are_refused_in_one_sentence(tmp_path):
    short = row()
    del short["func2"]
    with raises("data.source.column", "func2", "repository_name"):
        open_triplets(write_parquet(tmp_path / "a.parquet", [short]))
    with raises("data.source.no_files"):
        open_triplets(tmp_path / "none.jsonl")
    whole = write_lines(tmp_path / "whole.jsonl.gz", [row()] * 50).read_bytes()
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with raises("data.source.damaged", "half.jsonl.gz"):
        list(open_triplets(tmp_path / "half.jsonl.gz"))
    (tmp_path / "folder").mkdir()
    with raises("data.source.no_files"):
        open_triplets(tmp_path / "folder")
    write_parquet(tmp_path / "folder" / "a.parquet", [row()])
    write_lines(tmp_path / "folder" / "a.jsonl", [row()])
    with raises("data.source.no_files"):
        open_triplets(tmp_path / "folder")
