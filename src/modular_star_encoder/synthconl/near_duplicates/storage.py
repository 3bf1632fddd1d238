"""Files of a work folder: flat little-endian arrays, read memory-mapped, and files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modular_star_encoder.synthconl.near_duplicates.candidates import SearchColumn, TextColumn
from modular_star_encoder.synthconl.near_duplicates.fingerprints import Banding, fingerprint


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the file or folder made there takes the place of `path` if no error occurs.

    The name is always the same, so that what a killed process has left goes when its work is done again.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: It isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder and start again.") from error


def write_array(path: Path, values: np.ndarray) -> None:
    """Write one array."""
    np.save(path, values, allow_pickle=False)


def read_array(path: Path, mapped: bool = False) -> np.ndarray:
    """Read what `write_array` wrote, or map it into memory."""
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def flat_array(path: Path, dtype: str, columns: int | None = None) -> np.ndarray:
    """Map a file of nothing but numbers: (entries,), or (rows, columns)."""
    shape = (-1,) if columns is None else (-1, columns)
    # An empty file cannot be mapped. Slices of an ordinary array over the map cost less than those of numpy's class.
    values = np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)
    return values.reshape(shape)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_BOUND, _WORD = "<i8", "<u8"


def write_texts(
    folder: Path, batches: Iterable[Sequence[Sequence[str | None]]], columns: int, banding: Banding
) -> None:
    """Write a new folder; `batches` yields, for some rows, the texts of each column."""
    folder.mkdir()
    with ExitStack() as stack:
        outputs = [
            {name: stack.enter_context((folder / f"{column}.{name}").open("wb")) for name in ColumnFiles.NAMES}
            for column in range(columns)
        ]
        ends = [0] * columns
        for files in outputs:
            files["bounds"].write(np.zeros(1, _BOUND).tobytes())
        for batch in batches:
            for column, texts in enumerate(batch):
                prints = fingerprint(texts, banding)
                content = [(text or "").encode("utf-8", "surrogatepass") for text in texts]
                bounds = ends[column] + np.cumsum([len(one) for one in content], dtype=_BOUND)
                ends[column] = int(bounds[-1]) if len(bounds) else ends[column]
                outputs[column]["text"].writelines(content)
                outputs[column]["bounds"].write(bounds.tobytes())
                outputs[column]["digests"].write(prints.digests.astype(_WORD).tobytes())
                outputs[column]["keys"].write(prints.keys.astype(_WORD).tobytes())


@dataclass(frozen=True, slots=True)
class ColumnFiles:
    """One column of one folder, memory-mapped: see the module."""

    text: np.ndarray
    bounds: np.ndarray
    digests: np.ndarray
    keys: np.ndarray

    NAMES = ("text", "bounds", "digests", "keys")

    @classmethod
    def opened(cls, folder: Path, column: int, banding: Banding) -> "ColumnFiles":
        """Map the files."""
        return cls(
            flat_array(folder / f"{column}.text", "u1"),
            flat_array(folder / f"{column}.bounds", _BOUND),
            flat_array(folder / f"{column}.digests", _WORD, 2),
            flat_array(folder / f"{column}.keys", _WORD, banding.bands),
        )

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, row: int) -> str:
        start, stop = self.bounds[row : row + 2]
        return self.text[start:stop].tobytes().decode("utf-8", "surrogatepass")


def stored_column(shards: Sequence[ColumnFiles], rows: np.ndarray) -> SearchColumn:
    """What is searched of a column: its different rows, numbered through all shards."""
    starts = np.cumsum([0, *map(len, shards)])

    def lookup(numbers: np.ndarray) -> list[str]:
        chosen = rows[numbers]
        shard = np.searchsorted(starts, chosen, side="right") - 1
        places = (chosen - starts[shard]).tolist()
        return [shards[one][place] for one, place in zip(shard.tolist(), places, strict=True)]

    digests = np.concatenate([one.digests for one in shards])[rows]
    lengths = np.concatenate([np.diff(one.bounds) for one in shards])[rows]
    return SearchColumn([one.keys for one in shards], rows, TextColumn(lookup, digests, lengths))


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
