"""Parquet files in, parquet files out, a bounded number of rows at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modular_star_encoder.dataset.near_duplicates.files import whole

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Shard:
    """A parquet file: where it is, its name below the folder of all, and its number of rows."""

    path: str
    name: str
    rows: int

    def identity(self) -> dict[str, object]:
        """What shows that it is still the same file."""
        status = os.stat(self.path)
        return {"name": self.name, "rows": self.rows, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def find_shards(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[Shard, ...]:
    """The parquet files of a folder, in the order of their names, or those of a list, in its order.

    Raises:
        ValueError: There is none, one can't be read, or two of a list have the same name.
    """
    if isinstance(source, str | os.PathLike):
        root = Path(source)
        named = [(path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*.parquet"))]
        if not named:
            raise ValueError(f"{os.fspath(source)!r} holds no parquet file.")
    else:
        named = [(Path(path), Path(path).name) for path in source]
        if not named:
            raise ValueError("source must name at least one parquet file.")
    if len({name for _, name in named}) < len(named):
        raise ValueError("The parquet files must have different names, for those that are written take the same.")
    return tuple(Shard(str(path.absolute()), name, _opened(path).metadata.num_rows) for path, name in named)


def check_columns(shards: Sequence[Shard], columns: Sequence[str], id_column: str | None) -> None:
    """Check that all files have the columns, of a type that serves.

    Raises:
        ValueError: One hasn't.
    """
    for shard in shards:
        schema = _opened(Path(shard.path)).schema_arrow
        for name in (*columns, *([] if id_column is None else [id_column])):
            if name not in schema.names:
                raise ValueError(f"{shard.name} has no column {name!r}; it has {', '.join(schema.names)}.")
        for name in columns:
            if not _is_text(schema.field(name).type):
                raise ValueError(f"Column {name!r} of {shard.name} holds {schema.field(name).type}; it must be text.")
        if id_column is not None and not (_is_text(kind := schema.field(id_column).type) or pa.types.is_integer(kind)):
            raise ValueError(f"Column {id_column!r} of {shard.name} holds {kind}; ids must be text or integers.")


def read_texts(shard: Shard, columns: Sequence[str]) -> Iterator[list[list[str | None]]]:
    """Yield, for some rows at a time, the texts of each column."""
    for batch in _opened(Path(shard.path)).iter_batches(_ROWS_AT_A_TIME, columns=list(columns)):
        yield [batch.column(name).to_pylist() for name in columns]


def read_ids(shards: Sequence[Shard], id_column: str | None) -> pa.ChunkedArray:
    """The ids of all rows; without a column of ids, "name of the file:row of the file"."""
    if id_column is None:
        parts = [pa.array([f"{one.name}:{row}" for row in range(one.rows)], pa.large_string()) for one in shards]
        return pa.chunked_array(parts, pa.large_string())
    columns = [pq.read_table(one.path, columns=[id_column], partitioning=None)[id_column] for one in shards]
    if not all(pa.types.is_integer(one.type) for one in columns):
        kind = pa.large_string()
    else:
        kind = pa.uint64() if any(pa.types.is_uint64(one.type) for one in columns) else pa.int64()
    return pa.chunked_array([chunk for one in columns for chunk in one.cast(kind).chunks], kind)


def id_order(shards: Sequence[Shard], id_column: str | None) -> np.ndarray:
    """The rows of all shards by ascending id; without a column of ids, as they come.

    Raises:
        ValueError: An id is missing or repeats.
    """
    if id_column is None:
        return np.arange(sum(one.rows for one in shards))
    ids = read_ids(shards, id_column)
    order = pc.sort_indices(ids)
    in_order = ids.take(order)
    if ids.null_count:
        raise ValueError(f"Column {id_column!r} must hold an id for every row; {ids.null_count} are missing.")
    same = pc.equal(in_order.slice(1), in_order.slice(0, max(len(ids) - 1, 0)))
    if pc.any(same).as_py():
        repeated = in_order[pc.index(same, True).as_py()]
        raise ValueError(f"Column {id_column!r} must hold different ids; {repeated} repeats.")
    return order.to_numpy().astype(np.int64)


def write_kept(shard: Shard, target: Path, kept: np.ndarray, advance: Callable[[int], object]) -> None:
    """Write the rows that are kept, bool (rows,), with all their columns and the schema of the shard."""
    file = _opened(Path(shard.path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as temporary, pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd") as writer:
        start = 0
        for batch in file.iter_batches(_ROWS_AT_A_TIME * 8):
            chosen = pa.array(kept[start : start + len(batch)])
            table = pa.Table.from_batches([batch]).filter(chosen)
            if len(table):  # a row group without rows is more than some readers take
                writer.write_table(table)
            start += len(batch)
            advance(len(batch))


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} can't be read as a parquet file ({error}).") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
