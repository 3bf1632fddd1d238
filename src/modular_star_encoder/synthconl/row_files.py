"""Rows in numbered parquet files of a folder, written and read one file at a time, so that any number of rows fits."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from modular_star_encoder.synthconl.completions import Completion, batches

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


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)

_SECONDS_BETWEEN_SYNCS = 1.0


class CompletionFiles:
    """The completions of a folder of rows, file by file; several files may be open at once.

    Use it as a context manager, so that journals are closed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder, which exists."""
        self._folder = Path(folder)
        self._open: dict[str, _OpenFile] = {}
        self._file_of: dict[str, str] = {}

    def __enter__(self) -> "CompletionFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.journal.close()

    def is_complete(self, name: str) -> bool:
        """Whether there is a completion for every row of the file `name`."""
        return (self._folder / name).is_file()

    def open(self, name: str, ids: Sequence[str]) -> set[str]:
        """Open the file `name` for the rows with these ids, and return those that have no completion yet.

        Raises:
            ValueError: If its journal is damaged, or is of other rows.
        """
        if self.is_complete(name):
            self._journal_path(name).unlink(missing_ok=True)
            return set()
        path = self._journal_path(name)
        answered = _read_journal(path)
        strangers = answered.keys() - set(ids)
        if strangers:
            raise ValueError(
                f"{path} holds an answer to {min(strangers)}, which is no row of {name}: name another folder."
            )
        self._open[name] = _OpenFile(tuple(ids), answered, path.open("ab"))
        missing = set(ids) - answered.keys()
        self._file_of |= dict.fromkeys(missing, name)
        if not missing:
            self._finish(name)
        return missing

    def add(self, completions: Iterable[Completion]) -> None:
        """Keep completions of rows that are open and have none yet.

        Raises:
            ValueError: If a completion is of no such row.
        """
        for completion in completions:
            name = self._file_of.pop(completion.id, None)
            if name is None:
                raise ValueError(
                    f"The back end answered {completion.id!r}, which it was not asked, or asked once only."
                )
            file = self._open[name]
            file.append(completion)
            if len(file.answered) == len(file.ids):
                self._finish(name)

    def _finish(self, name: str) -> None:
        file = self._open.pop(name)
        rows = [asdict(file.answered[row_id]) for row_id in file.ids]
        write_parquet(self._folder / name, [pa.Table.from_pylist(rows, SCHEMA)], SCHEMA)
        file.journal.close()
        self._journal_path(name).unlink()

    def _journal_path(self, name: str) -> Path:
        return self._folder / f"{name}.journal"


class _OpenFile:
    """The rows of a file, their completions so far, and the journal that they go to."""

    def __init__(self, ids: tuple[str, ...], answered: dict[str, Completion], journal: BinaryIO) -> None:
        self.ids, self.answered, self.journal = ids, answered, journal
        self._synced = time.monotonic()

    def append(self, completion: Completion) -> None:
        """Write a completion through to the system, and at least once a second to the disk."""
        completion = _without_halves(completion)
        self.answered[completion.id] = completion
        self.journal.write(json.dumps(asdict(completion)).encode() + b"\n")
        self.journal.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(self.journal.fileno())
            self._synced = time.monotonic()


def _without_halves(completion: Completion) -> Completion:
    """The completion with question marks for lone surrogates, which JSON can escape and parquet can't hold."""
    texts = {name: getattr(completion, name) for name in ("text", "finish_reason", "error")}
    return replace(completion, **{name: text.encode(errors="replace").decode() for name, text in texts.items()})


def _read_journal(path: Path) -> dict[str, Completion]:
    """Return the completions of a journal by id, after cutting off a last line that was not written to its end.

    Raises:
        ValueError: If another line is damaged.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    answered = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            completion = _without_halves(Completion(**json.loads(line)))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged in line {number}: delete that line to have its row asked again."
            ) from None
        answered[completion.id] = completion
    return answered
