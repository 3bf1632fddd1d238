"""Rows of any dataset, one after the other: parquet and JSON Lines files, folders of them, datasets of the Hub."""

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow

from modular_star_encoder.data.sources.source_files import (
    FileFilters,
    SourceFile,
    SourceReader,
    check_languages,
    is_closed,
    language_named,
    language_of,
)

_SOURCE_ROWS_PER_BATCH = 16
_ROWS_PER_TABLE = 1024
_MANY_PIECES = 10  # a share is then at most a tenth larger than another


@dataclass(frozen=True, slots=True, kw_only=True)
class RowColumns:
    """The names of the columns of a dataset with one file a row.

    `language` None means that the suffix of the path tells the language; `license` may hold a string or a list.
    """

    repository: str
    path: str
    text: str
    language: str | None = None
    license: str | None = None

    def names(self) -> list[str]:
        """The columns to read."""
        named = (self.repository, self.path, self.text, self.language, self.license)
        return [name for name in named if name is not None]


THE_STACK_COLUMNS = RowColumns(
    repository="max_stars_repo_name",
    path="max_stars_repo_path",
    text="content",
    language="lang",
    license="max_stars_repo_licenses",
)
"""`bigcode/the-stack` and `bigcode/the-stack-dedup` (version 1)."""

STARCODERDATA_COLUMNS = RowColumns(repository="max_stars_repo_name", path="max_stars_repo_path", text="content")
"""`bigcode/starcoderdata`."""

GITHUB_CODE_COLUMNS = RowColumns(
    repository="repo_name", path="path", text="code", language="language", license="license"
)
"""`codeparrot/github-code` and `codeparrot/github-code-clean`."""


def open_rows(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    columns: Sequence[str],
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_dir: str | None = None,
) -> datasets.IterableDataset:
    """Open a dataset for streaming, with some of its columns.

    Args:
        source: A parquet file or URL, a list of them, a folder of them, or the name of a dataset of the Hub.
        columns: The columns to read.
        config: Name of the dataset's configuration; Hub only, as are the following.
        split: Name of the split.
        revision: Branch, tag or commit.
        data_dir: Folder of the dataset to read alone, such as that of one language.

    Raises:
        ValueError: If there is no such dataset, it is not accessible, or it lacks a column.
    """
    shown = ", ".join(map(str, source)) if isinstance(source, list | tuple) else os.fspath(source)  # type: ignore[arg-type]
    files = _parquet_files(source)
    try:
        if files:
            # Without a size of its own, a batch is as large as the first row group, which may have no rows.
            options = {"split": "rows", "streaming": True, "batch_size": _ROWS_PER_TABLE}
            rows = datasets.load_dataset("parquet", data_files={"rows": files}, **options)
            # Row groups in place of files: pyarrow reads ahead of a slow consumer, up to the whole of what it has.
            rows = rows.reshard() if hasattr(rows, "reshard") else rows
        else:
            rows = datasets.load_dataset(
                str(source), config, split=split, revision=revision, data_dir=data_dir, streaming=True
            )
        known = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # the Hub, the network and the formats raise many kinds
        reason = f"The dataset {shown!r} cannot be read ({type(error).__name__}): "
        if files and all(map(os.path.isfile, files)):
            reason += "is it damaged, or no parquet?"
        else:
            reason += "no such files or name on the Hub, or it is gated: accept its terms there and log in with "
            reason += "`hf auth login`."
        raise ValueError(reason) from error
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(
            f"The dataset {shown!r} has no column {', '.join(map(repr, missing))}; it has {', '.join(known)}."
        )
    # A name may stand there twice: a hard negative has the language of another code.
    return rows.select_columns(list(dict.fromkeys(columns)))


def _parquet_files(source: Any) -> list[str]:
    """Return the parquet files that `source` names, sorted inside a folder; none if it is a name of the Hub."""
    if isinstance(source, list | tuple):
        return [os.fspath(file) for file in source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = [str(file) for file in sorted(folder.rglob("*.parquet"))]
        if not files:
            raise ValueError(f"{os.fspath(source)!r} holds no parquet file.")
        return files
    return [str(source)] if str(source).endswith(".parquet") else []


class DatasetReader(SourceReader):
    """What the readers of datasets share: the units are the rows of a dataset opened by `open_rows`.

    A dataset comes in pieces: the row groups of parquet files, the data files of a dataset of the Hub. If they can be
    shared out evenly, a shard reads its own only; otherwise it reads all and decodes its share of the rows. About one
    piece is held in memory at a time.
    """

    def __init__(
        self, rows: datasets.IterableDataset, languages: Iterable[str] | None, filters: FileFilters | None
    ) -> None:
        super().__init__()
        self._rows = rows
        self._languages = check_languages(languages)
        self._filters = filters or FileFilters()

    def shard(self, index: int, count: int) -> "DatasetReader":
        """Return a reader of every `count`-th row, or of the rows of every `count`-th piece of the dataset.

        Raises:
            ValueError: If `index` is not from 0 to `count` − 1.
        """
        reader = super().shard(index, count)
        pieces = self._rows.num_shards
        even = pieces % count == 0 or pieces >= _MANY_PIECES * count
        if (self._start, self._step) == (0, 1) and even:
            reader._rows = self._rows.shard(count, index, contiguous=False)
            reader._start, reader._step = 0, 1
        return reader

    def _chosen_rows(self) -> Iterator[dict[str, Any]]:
        # Whole tables are skipped without decoding them. `iter`, unlike `__iter__`, does not divide the data among
        # the workers of a DataLoader by itself: `shard` alone decides.
        rows = self._rows.skip(self._start).with_format("arrow")
        next_row = 0
        for table in rows.iter(batch_size=_SOURCE_ROWS_PER_BATCH):
            while next_row < len(table):
                yield table.slice(next_row, 1).to_pylist()[0]
                next_row += self._step
            next_row -= len(table)

    def _reason(self, path: PurePath, language: str | None) -> str | None:
        """Return why the file at `path` of a repository is left out before its text is looked at, or None."""
        if language not in self._languages:
            return "another language"
        if is_closed(path):
            return "hidden or closed folder"
        return self._filters.reason_by_path(path, language or "")


class RowReader(DatasetReader):
    """Reads a dataset with one file a row."""

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: RowColumns,
        *,
        languages: Iterable[str] | None = None,
        filters: FileFilters | None = None,
    ) -> None:
        """See `row_repositories`."""
        super().__init__(rows, languages, filters)
        self._columns = columns

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        columns = self._columns
        for row in self._chosen_rows():
            path = PurePath((row[columns.path] or "").lstrip("/"))
            language = language_named(row[columns.language]) if columns.language else language_of(path)
            text = (row[columns.text] or "").removeprefix("\ufeff")
            reason = self._reason(path, language) or self._filters.reason_by_text(text)
            if reason:
                skipped[reason] += 1
                continue
            license_name = joined_licenses(row[columns.license]) if columns.license else None
            yield SourceFile(row[columns.repository] or "", path.as_posix(), language or "", text, license_name)


def joined_licenses(value: str | Sequence[str] | None) -> str | None:
    """Return the names of licences, one or several, as one string; None if there is none."""
    return value or None if isinstance(value, str) else ", ".join(value or ()) or None


def row_repositories(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: RowColumns,
    *,
    languages: Iterable[str] | None = None,
    filters: FileFilters | None = None,
    **options: Any,
) -> RowReader:
    """Return a reader of a dataset with one file a row; its units are the rows.

    Args:
        source: Parquet files or the name of a dataset of the Hub; see `open_rows`.
        columns: Names of its columns, such as `THE_STACK_COLUMNS`.
        languages: The languages to read; None for all of `LANGUAGES`.
        filters: Which files are left out; by default, `FileFilters()`.
        options: Further arguments of `open_rows`.

    Raises:
        ValueError: If the dataset cannot be opened, lacks a column, or a language is unknown.
    """
    check_languages(languages)
    rows = open_rows(source, columns=columns.names(), **options)
    return RowReader(rows, columns, languages=languages, filters=filters)


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
