"""Rows in numbered parquet files of a folder, written and read one file at a time, so that any number of rows fits."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modular_star_encoder.dataset.completions import batches

ROWS_PER_FILE = 1000
ROWS_PER_PUBLISHED_FILE = 100_000


def write_parquet(path: str | os.PathLike[str], tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables as the row groups of one file, which appears when it is whole; return the number of rows."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    rows = 0
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
                rows += len(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows as `rows-00000.parquet`, … of `ROWS_PER_FILE` rows into an empty folder; return their number."""
    total = 0
    for number, batch in enumerate(batches(rows, ROWS_PER_FILE)):
        table = pa.Table.from_pylist(batch, schema)
        total += write_parquet(folder / f"rows-{number:05d}.parquet", [table], schema)
    return total


def write_split(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as `{name}-00000-of-00002.parquet`, …, as datasets on the Hub are named."""
    tables = (pa.Table.from_pylist(batch, schema) for batch in batches(rows, ROWS_PER_FILE))
    written = []
    for some in batches(tables, ROWS_PER_PUBLISHED_FILE // ROWS_PER_FILE):
        written.append(folder / f"{name}-{len(written):05d}.parquet")
        write_parquet(written[-1], some, schema)
    for number, path in enumerate(written):
        path.rename(folder / f"{name}-{number:05d}-of-{len(written):05d}.parquet")


def row_files(folder: Path) -> list[Path]:
    """The files that `write_rows` wrote, in order."""
    return sorted(folder.glob("rows-*.parquet"))


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files of a folder, in order."""
    for file in row_files(folder):
        yield from read_file(file, columns)


def read_file(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one file."""
    return pq.read_table(file, columns=list(columns) if columns else None).to_pylist()


def count_rows(folder: Path) -> int:
    """The number of rows of all files of a folder, as their headers say."""
    return sum(pq.read_metadata(file).num_rows for file in row_files(folder))
