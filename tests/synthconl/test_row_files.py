import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modular_star_encoder.synthconl import row_files
from modular_star_encoder.synthconl.row_files import count_rows, read_rows, write_parquet, write_rows, write_split

SCHEMA = pa.schema([("id", pa.string())])


def rows(count):
    return [{"id": str(i)} for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_rows_are_read_as_they_were_written(tmp_path, monkeypatch, count):
    monkeypatch.setattr(row_files, "ROWS_PER_FILE", 3)
    assert write_rows(tmp_path, iter(rows(count)), SCHEMA) == count_rows(tmp_path) == count
    assert list(read_rows(tmp_path)) == rows(count)
    assert len(list(tmp_path.iterdir())) == -(-count // 3)


def test_a_split_is_numbered_out_of_its_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "ROWS_PER_FILE", 3)
    monkeypatch.setattr(row_files, "ROWS_PER_PUBLISHED_FILE", 6)
    write_split(tmp_path, "train", rows(14), SCHEMA)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert [row for file in files for row in pq.read_table(file).to_pylist()] == rows(14)


def test_a_file_that_cannot_be_written_to_its_end_does_not_appear(tmp_path):
    def tables():
        yield pa.Table.from_pylist(rows(2), SCHEMA)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_parquet(tmp_path / "rows.parquet", tables(), SCHEMA)
    assert list(tmp_path.iterdir()) == []
