import time

import pyarrow
import pyarrow.parquet
import pytest

from modular_star_encoder.data.sources import FileFilters
from modular_star_encoder.data.sources.dataset_files import RowColumns, row_repositories
from tests.errors import raises

COLUMNS = RowColumns(repository="repo", path="file", text="code", language="lang", license="terms")


def row(number, **changes):
    values = {"repo": f"r{number // 3}", "file": f"{number}.py", "code": f"x = {number}", "lang": "Python"}
    return {**values, "terms": ["mit"], "unused": number, **changes}


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def test_the_columns_named_become_source_files(tmp_path):
    rows = [row(0), row(1, file="/src/a.cc", lang="C++", terms=["mit", "bsd"]), row(2, terms=[])]
    reader = row_repositories(write_parquet(tmp_path / "a.parquet", rows), COLUMNS)
    seen = [(file.repository, file.path, file.language, file.text, file.license) for file in reader]
    assert seen == [
        ("r0", "0.py", "python", "x = 0", "mit"),
        ("r0", "src/a.cc", "cpp", "x = 1", "mit, bsd"),
        ("r0", "2.py", "python", "x = 2", None),
    ]
    assert reader.repositories is None
    reader = row_repositories(tmp_path / "a.parquet", RowColumns(repository="repo", path="file", text="code"))
    assert [(file.language, file.license) for file in reader] == [("python", None), ("cpp", None), ("python", None)]
    # The columns of The Stack are known.
    published = {"repo_name": "a/b", "repo_path": "x.js", "repo_licenses": ["MIT"]}
    published = {f"max_stars_{name}": value for name, value in published.items()}
    published |= {"content": "x = 1", "lang": "JavaScript", "hexsha": "0"}
    (file,) = row_repositories(write_parquet(tmp_path / "a.parquet", [published]))
    assert (file.repository, file.path, file.language, file.license) == ("a/b", "x.js", "javascript", "MIT")


def test_what_is_left_out_is_counted_by_reason_in_every_iteration(tmp_path):
    changes = [{}, {"lang": "Rust"}, {"lang": None}, {"file": "tests/a.py"}, {"file": "vendor/a.py"}]
    changes += [{"file": ".github/a.py"}, {"code": None}, {"code": "x" * 60}, {"code": "é" * 49}]
    write_parquet(tmp_path / "b.parquet", [row(number) for number in range(9, 40)])  # read after the other file
    write_parquet(tmp_path / "a.parquet", [row(number, **change) for number, change in enumerate(changes)])
    reader = row_repositories(tmp_path, COLUMNS, filters=FileFilters(max_line_length=50, max_bytes=90))
    for _ in range(2):
        assert [file.path for file in reader] == ["0.py", *(f"{number}.py" for number in range(9, 40))]
        once = ("test code", "vendored code", "hidden or closed folder", "empty", "very long lines", "too large")
        assert reader.skipped == dict.fromkeys(once, 1) | {"another language": 2}


@pytest.mark.parametrize("change", [{"repo": 5}, {"file": 5}, {"code": b"x"}, {"terms": [4]}, {"lang": ["Python"]}])
def test_a_column_of_another_type_is_named(tmp_path, change):
    with raises("data.source.column", *change):
        list(row_repositories(write_parquet(tmp_path / "a.parquet", [row(1, **change)]), COLUMNS))


@pytest.mark.slow
def test_a_slow_consumer_does_not_fill_the_memory(tmp_path):
    table = pyarrow.Table.from_pylist([row(number, code=f"{number} word " * 50_000) for number in range(100)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    size = table.nbytes
    del table
    before, peak = pyarrow.total_allocated_bytes(), 0
    for _ in row_repositories(tmp_path, COLUMNS, filters=FileFilters(max_line_length=10**6)):
        time.sleep(0.01)
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 0 < peak < size / 2


def test_a_file_of_another_kind_is_not_called_missing(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with raises("data.source.unreadable", "a.jsonl", "not parquet?"):
        row_repositories(tmp_path / "a.jsonl", COLUMNS)


def test_a_name_of_the_hub_is_opened_as_a_stream_with_its_options(monkeypatch, tmp_path):
    import datasets

    file = write_parquet(tmp_path / "a.parquet", [row(0)])
    local = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or local)
    reader = row_repositories("owner/name", COLUMNS, config="Python", split="test", revision="v1", data_dir="data/go")
    assert [file.path for file in reader] == ["0.py"]
    expected = {"split": "test", "revision": "v1", "data_dir": "data/go", "streaming": True}
    assert calls == [(("owner/name", "Python"), expected)]
