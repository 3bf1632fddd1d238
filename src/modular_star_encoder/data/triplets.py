"""Rows of SynthCoNL: a description, the function that it describes, and that function in another language.

Read from what its authors publish on the Hub (`modularStarEncoder/SynthCoNL`, `…-neardedup`), from what
`mose dataset build` writes, or from any parquet or JSON Lines files with such columns.
"""

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_star_encoder.data.row_sources import open_rows
from modular_star_encoder.data.source_files import LANGUAGES, language_named

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")
_SPLITS = ("train", "validation", "test")
_ROWS_PER_BATCH = 256
_EXAMPLE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Triplet:
    """One row.

    Attributes:
        description: What the function does, in prose.
        code: The function as its author wrote it.
        language: Its language, one of `LANGUAGES`.
        other_code: The same function in another language.
        other_language: That language, one of `LANGUAGES`.
        repository: Name of the repository of `code`; empty if the row does not say.
    """

    description: str
    code: str
    language: str
    other_code: str
    other_language: str
    repository: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TripletColumns:
    """The names of the columns of a dataset of triplets; by default those of SynthCoNL as published."""

    description: str = "func_documentation_string"
    code: str = "func1_CSN"
    language: str = "language1_CSN"
    other_code: str = "func2"
    other_language: str = "language2"
    repository: str = "repository_name"

    def names(self) -> list[str]:
        """The columns to read."""
        return [getattr(self, name) for name in self.__slots__]


SYNTHCONL_COLUMNS = TripletColumns()


class BadRowError(ValueError):
    """A row that is no triplet, where none may be skipped."""


class TripletReader:
    """Iterates over the triplets of a dataset, as a stream, in a fixed order, again and again.

    Attributes:
        skipped: Number of rows left out by reason, of the last iteration.
        examples: The first such row by reason: where it is, and how it begins.
    """

    def __init__(self, rows: Iterable[tuple[str, Any]], columns: TripletColumns, strict: bool) -> None:
        """`rows` yields (where a row is, the row); see `open_triplets`."""
        self._rows, self._columns, self._strict = rows, columns, strict
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def __iter__(self) -> Iterator[Triplet]:
        # Each iteration has counters of its own; one that was abandoned cannot add to those of the next.
        self.skipped, self.examples = skipped, examples = Counter(), {}
        for place, row in self._rows:
            reason = row if isinstance(row, str) else _fault(row, self._columns)
            if reason is None:
                yield _triplet(row, self._columns)
                continue
            example = f"{place}: {json.dumps(row, ensure_ascii=False, default=str)[:_EXAMPLE_LENGTH]}"
            if self._strict:
                raise BadRowError(f"A row is no triplet ({reason}): {example}")
            skipped[reason] += 1
            examples.setdefault(reason, example)


def open_triplets(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    columns: TripletColumns = SYNTHCONL_COLUMNS,
    strict: bool = False,
    **options: Any,
) -> TripletReader:
    """Open a dataset of triplets.

    Args:
        source: A parquet or JSON Lines file, a list of them, a folder of them, or the name of a dataset of the Hub.
        split: The split to read. Of a folder, the files whose names begin with it (`train-00000-of-00004.parquet`); all
            files if no name begins with one of train, validation and test. Files that are named are read whole.
        columns: The names of its columns.
        strict: Whether a row that is no triplet is an error; otherwise it is skipped and counted. A triplet has a
            description, two codes that are not blank, and two of our languages, in any spelling (`C++` is `cpp`).
        options: `config`, `revision` and `data_dir` of a dataset of the Hub; see `open_rows`.

    Raises:
        ValueError: If the dataset cannot be read, has no such split, or lacks a column.
    """
    files = _files(source, split)
    if files and all(file.endswith(_JSON_LINES) for file in files):
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"There is no file {file}.")
        return TripletReader(_JsonLines(files), columns, strict)
    rows = open_rows(files or source, columns=columns.names(), **({} if files else {"split": split}), **options)
    shown = source if isinstance(source, str | os.PathLike) else ", ".join(map(str, source))
    return TripletReader(_DatasetRows(rows, os.fspath(shown)), columns, strict)


def _files(source: Any, split: str) -> list[str]:
    """The files that `source` names; none if it is the name of a dataset of the Hub."""
    if isinstance(source, list | tuple):
        return [os.fspath(file) for file in source]
    path = Path(source).expanduser()
    if not path.is_dir():
        return [str(path)] if path.name.endswith((".parquet", *_JSON_LINES)) else []
    found = [file for file in sorted(path.rglob("*")) if file.name.endswith((".parquet", *_JSON_LINES))]
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
    """Rows of JSON Lines files, one line at a time; a line that is no JSON object is the reason why."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for file in self._files:
            opener = gzip.open if file.endswith(".gz") else open
            try:
                with opener(file, "rt", encoding="utf-8", errors="replace") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield f"{file}, line {number}", _json_object(line)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{file} is damaged: {error}.") from error


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError:
        return "no JSON"
    return row if isinstance(row, dict) else "no JSON object"


class _DatasetRows:
    """Rows of a streamed dataset, a batch at a time."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows.with_format("arrow"), name

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        number = 0
        for table in self._rows.iter(batch_size=_ROWS_PER_BATCH):
            for row in table.to_pylist():
                number += 1
                yield f"{self._name}, row {number}", row


def _fault(row: Mapping[str, Any], columns: TripletColumns) -> str | None:
    """Why a row is no triplet; None if it is one."""
    for name in columns.names():
        if name not in row:
            return f"no column {name}"
    for name in (columns.description, columns.code, columns.other_code):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"empty {name}"
    for name in (columns.language, columns.other_language):
        if not isinstance(row[name], str) or language_named(row[name]) not in LANGUAGES:
            return f"unknown {name}"
    return None


def _triplet(row: Mapping[str, Any], columns: TripletColumns) -> Triplet:
    return Triplet(
        row[columns.description],
        row[columns.code],
        language_named(row[columns.language]) or "",
        row[columns.other_code],
        language_named(row[columns.other_language]) or "",
        row[columns.repository] or "",
    )
