import itertools

import pyarrow
import pyarrow.parquet
import pytest

from modular_star_encoder.data.sources import dataset_rows, parquet_pages
from modular_star_encoder.data.sources.parquet_pages import unpacked_bytes
from tests.errors import raises


def chunks(path):
    data = pyarrow.parquet.ParquetFile(path).metadata
    for group, column in itertools.product(range(data.num_row_groups), range(data.num_columns)):
        yield data.row_group(group).column(column)


def varint(number, length=0):
    """A number of a footer as Thrift writes it, padded to `length` bytes."""
    digits = [number >> shift & 127 for shift in range(0, 63, 7)]
    used = length or max(1, max(place + 1 for place, digit in enumerate(digits) if digit))
    return bytes([*(digit | 128 for digit in digits[: used - 1]), digits[used - 1]])


@pytest.mark.parametrize("options", itertools.product(["none", "zstd"], ["1.0", "2.0"], [True, False]))
def test_the_pages_of_honest_files_unpack_to_no_more_than_their_metadata_says(tmp_path, options):
    compression, version, dictionary = options
    table = pyarrow.table(
        {
            "text": [f"{number * 7919 % 9973}" * 3 for number in range(5000)],
            "list": [["a", None] * (number % 3) for number in range(5000)],
            "nothing": pyarrow.nulls(5000, pyarrow.string()),
            "number": [number / 7 for number in range(5000)],
        }
    )
    settings = {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2000, data_page_size=1000, **settings)
    with path.open("rb") as file:
        for chunk in chunks(path):
            assert chunk.total_uncompressed_size / 2 - 1000 < unpacked_bytes(file, chunk)
            assert unpacked_bytes(file, chunk) <= chunk.total_uncompressed_size
    assert sum(1 for _ in dataset_rows.parquet_rows(path)) == 5000


def test_a_file_whose_metadata_names_fewer_bytes_than_its_pages_unpack_to_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"a": ["x" * 5_000_000]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    (chunk,) = chunks(path)
    said = varint(2 * chunk.total_uncompressed_size)
    content = path.read_bytes()
    path.write_bytes(content.replace(said, varint(100, len(said))))
    assert next(chunks(path)).total_uncompressed_size == 50
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", None)
    with raises("data.source.damaged", path, "column a has more or larger pages"):
        list(dataset_rows.open_dataset_rows(path, []))


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"\x1c" * 9000, b"\xff" * 40, b"\x15\x00\x15\x00\x15\x01\x00"])
def test_headers_that_cannot_be_read_are_a_sentence(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 99] * 9000}), path, use_dictionary=False, compression=None)
    content = path.read_bytes()
    path.write_bytes(content[:4] + damage + content[4 + len(damage) :])
    with raises("data.source.damaged", path, "column a has more or larger pages"):
        list(dataset_rows.open_dataset_rows(path, []))


def test_a_column_of_many_empty_pages_is_left_early(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [f"{n}" for n in range(3000)]}), path, data_page_size=10)
    monkeypatch.setattr(parquet_pages, "_FREE_PAGES", 1)
    monkeypatch.setattr(parquet_pages, "_MIN_VALUES", 10**6)
    with raises("data.source.damaged", "column a has more or larger pages"):
        list(dataset_rows.open_dataset_rows(path, []))
