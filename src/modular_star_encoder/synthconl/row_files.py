"""Read and write parquet files: the numbered files of a dataset build, and shards (files in a user's folder)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modular_star_encoder.data.sources.dataset_rows import open_parquet, parquet_batches, parquet_rows
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import files_below, staged_file

ROWS_PER_FILE = 250  # `open_parquet` can read a file with this number of the longest answers of a model
ROWS_PER_PUBLISHED_FILE, _ROWS_PER_PUBLISHED_GROUP = 100_000, 1000
_ROWS_PER_GROUP, _GROUP_BYTES = 8192, 2**26  # a row group ends at this number of rows or of bytes

Item = TypeVar("Item")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last list may be shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables to one file, each as a row group; return the number of rows. Only a complete file appears."""
    rows = 0
    with (
        staged_file(path, resumable=True) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in tables:
            if len(table):  # some readers fail on a row group without rows
                writer.write_table(table)
            rows += len(table)
    return rows


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows to an empty folder, in files `rows-00000.parquet`, … of `ROWS_PER_FILE` rows; return their number."""
    tables = enumerate(pa.Table.from_pylist(batch, schema) for batch in batches(rows, ROWS_PER_FILE))
    return sum(write_parquet(folder / f"rows-{number:05d}.parquet", [table], schema) for number, table in tables)


def write_split(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write the rows of split `name` to `{name}-00000-of-00002.parquet`, …, as the Hub names the files of a split."""
    tables = (pa.Table.from_pylist(batch, schema) for batch in batches(rows, _ROWS_PER_PUBLISHED_GROUP))
    written: list[Path] = []
    for some in batches(tables, ROWS_PER_PUBLISHED_FILE // _ROWS_PER_PUBLISHED_GROUP):
        written.append(folder / f"{name}-{len(written):05d}.parquet")
        write_parquet(written[-1], some, schema)
    for number, path in enumerate(written):
        path.rename(folder / f"{name}-{number:05d}-of-{len(written):05d}.parquet")


def row_files(folder: Path) -> list[Path]:
    """Return the paths of the files that `write_rows` wrote to a folder, in the order of their rows."""
    return sorted(folder.glob("rows-*.parquet"))


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows that `write_rows` wrote to a folder, in order, with all columns if `columns` is None."""
    for file in row_files(folder):
        yield from read_file(file, columns)


def read_file(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a parquet file, with all columns if `columns` is None. UserError if the file can't be read."""
    with _unreadable(file):
        return list(parquet_rows(file, columns or None))


def count_rows(folder: Path) -> int:
    """Return how many rows `write_rows` wrote to a folder; only metadata is read."""
    return sum(open_shard(file).metadata.num_rows for file in row_files(folder))


class Shard(NamedTuple):
    """One parquet file in a folder that the user names."""

    path: Path
    name: str  # path in the folder of all shards
    rows: int

    def identity(self) -> dict[str, object]:
        """Return name, number of rows, size and time of change of the file, so that a later call sees changes."""
        status = self.path.stat()
        return {"name": self.name, "rows": self.rows, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def find_shards(folder: Path) -> tuple[Shard, ...]:
    """Return the parquet files below a folder, sorted, except in hidden folders; UserError if there is no such file."""
    found = [(path, path.relative_to(folder)) for path in files_below(folder, "*.parquet")]
    paths = [path for path, name in found if not any(part.startswith(".") for part in name.parts[:-1])]
    if not paths:
        fault = "is a file" if folder.is_file() else "contains no *.parquet file"
        raise UserError("synthconl.shards.missing", f"{folder} {fault}: name another folder.")
    return tuple(Shard(path, path.relative_to(folder).as_posix(), open_shard(path).metadata.num_rows) for path in paths)


def check_columns(shards: Sequence[Shard], columns: Sequence[str], id_column: str | None) -> None:
    """Raise UserError if a file lacks a column, one of `columns` isn't text, or `id_column` isn't text or integers."""
    for shard in shards:
        schema = open_shard(shard.path).schema_arrow
        for name in (*columns, *([] if id_column is None else [id_column])):
            column = f"Column {name!r} of {shard.name}"
            if name not in schema.names:
                message = f"{column} is missing. The columns are: {', '.join(schema.names)}."
                raise UserError("synthconl.shards.column_missing", message)
            if not _is_text(kind := schema.field(name).type) and (name in columns or not pa.types.is_integer(kind)):
                wanted = "text" if name in columns else "text or integers"
                raise UserError("synthconl.shards.column_type", f"{column} contains {kind}; it must contain {wanted}.")


def read_texts(shard: Shard, columns: Sequence[str]) -> Iterator[list[list[str | None]]]:
    """Yield the texts of up to 1,024 rows at a time, as one list of texts for each of `columns`."""
    with _unreadable(shard.path):
        for batch in parquet_batches(shard.path, columns):
            yield [batch.column(name).to_pylist() for name in columns]


def read_ids(shards: Sequence[Shard], id_column: str | None) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return the ids of all rows, and the numbers of the rows sorted by id, int64 (rows,).

    If `id_column` is None, an id is "FILE:NUMBER". UserError if an id is missing or repeated.
    """
    if id_column is None:
        parts = [pa.array([f"{one.name}:{row}" for row in range(one.rows)], pa.large_string()) for one in shards]
        return pa.chunked_array(parts, pa.large_string()), np.arange(sum(one.rows for one in shards))
    columns = []
    for one in shards:
        with _unreadable(one.path):
            schema = pa.schema([open_shard(one.path).schema_arrow.field(id_column)])
            columns.append(pa.Table.from_batches(parquet_batches(one.path, [id_column]), schema)[id_column])
    kind = pa.large_string()
    if all(pa.types.is_integer(one.type) for one in columns):
        kind = pa.uint64() if any(pa.types.is_uint64(one.type) for one in columns) else pa.int64()
    ids = pa.chunked_array([chunk for one in columns for chunk in one.cast(kind).chunks], kind)
    order = pc.sort_indices(ids)
    in_order = ids.take(order)
    repeated = in_order.slice(1).filter(pc.equal(in_order.slice(1), in_order.slice(0, max(len(ids) - 1, 0))))
    if ids.null_count or len(repeated):
        fault = f"missing ids: {ids.null_count}" if ids.null_count else f"a repeated id: {repeated[0]}"
        raise UserError("synthconl.shards.ids", f"Column {id_column!r} must have a different id in each row; {fault}.")
    return ids, order.to_numpy().astype(np.int64)


def write_kept(shard: Shard, target: Path, kept: np.ndarray) -> None:
    """Copy a shard to `target` with all columns, but only the rows for which `kept`, bool (rows,), is true."""
    schema = open_shard(shard.path).schema_arrow

    def tables() -> Iterator[pa.Table]:
        start, size = 0, 0
        group: list[pa.Table] = []
        with _unreadable(shard.path):
            for batch in parquet_batches(shard.path, most_rows=_ROWS_PER_GROUP):
                edges = np.flatnonzero(np.diff(kept[start : start + len(batch)], prepend=False, append=False))
                runs = [batch.slice(first, end - first) for first, end in edges.reshape(-1, 2)]
                chosen = pa.Table.from_batches(runs, batch.schema).combine_chunks()  # `filter` can't copy string views
                start += len(batch)
                group += [chosen] if len(chosen) else []
                held = batch.nbytes if len(runs) == 1 else chosen.nbytes  # one run is not copied: it keeps the batch
                size += len(chosen) + held * _ROWS_PER_GROUP // _GROUP_BYTES
                if size >= _ROWS_PER_GROUP:
                    yield pa.concat_tables(group)
                    group, size = [], 0
        yield pa.concat_tables([pa.Table.from_batches([], schema), *group])

    target.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(target, tables(), schema)


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a parquet file; UserError if it can't be read or exceeds the limits of `open_parquet`."""
    with _unreadable(path):
        return open_parquet(path)


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError("synthconl.shards.unreadable", f"{path} can't be read as a parquet file ({error}).") from error


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())
