"""Rows of any dataset, one after the other: parquet and JSON Lines files, folders of them, datasets of the Hub."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from modular_star_encoder.data.row_sources import open_rows

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")
_SPLITS = ("train", "validation", "test")
_ROWS_PER_BATCH = 256
_EXAMPLE_LENGTH = 200
_NO_ROWS = "dropped.jsonl"  # what near-deduplication says of the rows that it left out of the parquet files beside it
_HUB_OPTIONS = ("config", "revision", "data_dir")


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of JSON Lines that is no row.

    Attributes:
        reason: What is wrong with it.
        text: The line.
    """

    reason: str
    text: str

    def __str__(self) -> str:
        return self.reason


def row_example(place: str, row: Any) -> str:
    """Return where a row is and how it, a `BadLine` or any part of a row begins, for messages and reports."""
    shown = row.text if isinstance(row, BadLine) else json.dumps(row, ensure_ascii=False, default=str)
    return f"{place}: {shown[:_EXAMPLE_LENGTH]}".encode(errors="backslashreplace").decode()


def not_unicode(text: str) -> str | None:
    """Return why a text can't be written or tokenized, or None: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "halves of characters (lone surrogates)"
    return None


def open_dataset_rows(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: Sequence[str],
    *,
    split: str = "train",
    **options: Any,
) -> Iterable[tuple[str, dict[str, Any] | BadLine]]:
    """Open a dataset for reading as a stream, again and again in the same order.

    Args:
        source: A parquet or JSON Lines file, a list of them, a folder of them, or the name of a dataset of the Hub.
        columns: The columns to read. A row of JSON Lines may lack some, and have others.
        split: The split to read. Of a folder, the files whose names begin with it (`train-00000-of-00004.parquet`); all
            files if no name begins with one of train, validation and test. Files that are named are read whole.
        options: `config`, `revision` and `data_dir` of a dataset of the Hub; see `open_rows`.

    Returns:
        Pairs of where a row is, for messages, and the row; in place of a row that is no JSON object, a `BadLine`.

    Raises:
        ValueError: If the dataset cannot be read, has no such split, or lacks a column, or there is no such option;
            while reading, if a file is damaged.
    """
    name = ", ".join(map(str, source)) if isinstance(source, list | tuple) else os.fspath(source)
    if unknown := sorted(set(options) - set(_HUB_OPTIONS)):
        raise ValueError(
            f"Reading {name!r} has no option {', '.join(unknown)}; there are split, {', '.join(_HUB_OPTIONS)}."
        )
    files = _files(source, split)
    if files and all(file.endswith(_JSON_LINES) for file in files):
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"There is no file {file}.")
        return _JsonLines(files)
    rows = open_rows(files or source, columns=columns, **({} if files else {"split": split}), **options)
    return _DatasetRows(rows, name)


def open_texts(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], column: str, **options: Any
) -> Iterator[str]:
    """Yield the texts of one column of a dataset.

    Args:
        source: See `open_dataset_rows`.
        column: The column.
        options: Further arguments of `open_dataset_rows`.

    Raises:
        ValueError: If the dataset cannot be read, or a row has no text there.
    """
    for place, row in open_dataset_rows(source, [column], **options):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise ValueError(f"{place} has no text in column {column!r}.")
        yield row[column]


def _files(source: Any, split: str) -> list[str]:
    """The files that `source` names; none if it is the name of a dataset of the Hub."""
    if isinstance(source, list | tuple):
        return [os.path.expanduser(os.fspath(file)) for file in source]
    path = Path(source).expanduser()
    if not path.is_dir():
        return [str(path)] if path.name.endswith((".parquet", *_JSON_LINES)) else []
    found = [file for file in sorted(path.rglob("*")) if file.name.endswith((".parquet", *_JSON_LINES))]
    if any(file.suffix == ".parquet" for file in found):
        found = [file for file in found if file.name != _NO_ROWS]
    splits = {name: [file for file in found if file.name.startswith((f"{name}-", f"{name}."))] for name in _SPLITS}
    if any(splits.values()):
        if not splits.get(split):
            there = ", ".join(name for name, files in splits.items() if files)
            raise ValueError(f"{os.fspath(source)!r} has no split {split!r}; it has {there}.")
        found = splits[split]
    if not found or len({file.suffix == ".parquet" for file in found}) > 1:
        what = "both parquet and JSON Lines files: name those to read" if found else "no parquet or JSON Lines file"
        raise ValueError(f"{os.fspath(source)!r} holds {what}.")
    return [str(file) for file in found]


class _JsonLines:
    """Rows of JSON Lines files, one line at a time; a line that is no JSON object is a `BadLine`."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for file in self._files:
            opener = gzip.open if file.endswith(".gz") else open
            try:
                with opener(file, "rt", encoding="utf-8-sig", errors="replace") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield f"{file}, line {number}", _json_object(line)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{file} is damaged: {error}.") from error


def _json_object(line: str) -> dict[str, Any] | BadLine:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # of brackets in brackets in brackets
        return BadLine("no JSON", line.strip())
    return row if isinstance(row, dict) else BadLine("no JSON object", line.strip())


class _DatasetRows:
    """Rows of a streamed dataset, a batch at a time."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows.with_format("arrow"), name

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        number = 0
        try:
            for table in self._rows.iter(batch_size=_ROWS_PER_BATCH):
                for row in table.to_pylist():
                    number += 1
                    yield f"{self._name}, row {number}", row
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self._name} can't be read on after row {number}: {error}") from error
