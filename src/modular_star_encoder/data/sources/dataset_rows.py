"""Read rows, in order, from parquet, JSON Lines and CSV files, from folders of such files, and from Hub datasets."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import check_json_values, files_below, similar_files, user_path

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from pyarrow import parquet

_ROWS_PER_TABLE = 1024
_ROWS_PER_BATCH = 256
_PARQUET, _JSON_LINES, _CSV = (".parquet",), (".jsonl", ".jsonl.gz", ".ndjson"), (".csv", ".csv.gz", ".tsv")
SUFFIXES = (*_CSV, *_JSON_LINES, *_PARQUET)
_ALLOWED = f"Name a file ({', '.join(SUFFIXES)}), a folder of such files, or a Hub dataset owner/name."
_MAX_FIELD = 10_000_000  # characters of a field of a CSV file; more mean that a quotation mark is not closed
_MAX_LINE, _MAX_LINE_VALUES = 2**24, 2**20  # characters of a line; values of a line of JSON
_MAX_ROWS, _MAX_CHARACTERS, _MAX_RATIO = 2**18, 2**25, 100  # see `_check_size`
_MAX_COLUMNS, _MAX_ROW_GROUPS, _MIN_GROUP_ROWS = 1000, 1000, 100  # see `open_parquet`
_MAX_BATCH_BYTES = 2**28  # of rows that are decoded at a time; a row may be larger
_ROWS_WITH_NAMES = 100  # rows of JSON Lines that are read for the names of the columns
_SPLITS = ("train", "validation", "test")
_NO_ROWS = "dropped.jsonl"  # report of near-deduplication on the rows that it dropped; in a folder of parquet files
_HUB_OPTIONS = ("config", "revision", "data_dir")
_NOT_FOUND = "no file or Hub dataset has this name, or the dataset is gated (accept its terms, run `hf auth login`)."

# A file, a list of files, a folder, or the name of a dataset of the Hub.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a JSON Lines or CSV file that can't be read as a row: the reason, and the text of the line."""

    reason: str
    text: str

    def __str__(self) -> str:
        return self.reason


Row = dict[str, Any] | BadLine
Rows = Iterable[tuple[str, Row]]  # pairs (place, row) with a place such as `data.jsonl, line 3`


def open_rows(
    source: Source,
    *,
    columns: Sequence[str],
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_dir: str | None = None,
    batch_size: int = _ROWS_PER_BATCH,
) -> Iterable[dict[str, Any]]:
    """Return an iterable, which can be read repeatedly, of the rows of parquet files or of a Hub dataset.

    Only `columns` are read, or all columns if `columns` is empty. `config`, `split`, `revision` and `data_dir` are
    arguments of `datasets.load_dataset`, for the Hub only. `batch_size` is the number of rows to decode at a time.
    """
    files, shown = _files(source, _PARQUET), _shown(source)
    if isinstance(source, str | os.PathLike):
        check_source(source)
    local = bool(files) and not any("://" in file for file in files)
    rows: Any = None
    try:
        if local:
            known = _common_names(files)
        else:
            rows = _streamed(source, files, config, split=split, revision=revision, data_dir=data_dir)
            known = rows.column_names or list(next(iter(rows), {}))
    except UserError:
        raise
    except Exception as error:  # the Hub, the network and the formats raise many kinds of errors
        there = files and all(map(os.path.isfile, files))
        is_local = there or (isinstance(source, str | os.PathLike) and os.path.exists(source))
        advice = "is it damaged, or not parquet?" if is_local else _NOT_FOUND
        message = f"The dataset {shown!r} cannot be read ({type(error).__name__}): {advice}"
        raise UserError("data.source.unreadable", message) from error
    if missing := [name for name in columns if name not in known]:
        message = f"The dataset {shown!r} has no column {', '.join(map(repr, missing))}; it has {', '.join(known)}."
        raise UserError("data.source.column", message)
    # A name may occur twice: a hard negative may share the language column of another code.
    chosen = list(dict.fromkeys(columns or known))

    def read() -> Iterator[dict[str, Any]]:
        if local:
            return (row for file in files for row in parquet_rows(file, chosen, batch_size))
        table = rows.select_columns(chosen).with_format("arrow")
        # `iter`, unlike `__iter__`, does not divide rows among the workers of a DataLoader.
        return (row for one in table.iter(batch_size=batch_size) for row in one.to_pylist())

    return _Repeatable(partial(_undamaged, shown, read, is_remote=not local))


def _streamed(source: Source, urls: Sequence[str], config: str | None, **options: Any) -> datasets.IterableDataset:
    """Return a stream of rows of the parquet files at `urls` or, if `urls` is empty, of the Hub dataset `source`."""
    import datasets

    if not urls:
        return datasets.load_dataset(str(source), config, streaming=True, **options)
    # Without a fixed size, a batch is as large as the first row group, which may have no rows.
    options = {"split": "rows", "streaming": True, "batch_size": _ROWS_PER_TABLE}
    rows = datasets.load_dataset("parquet", data_files={"rows": urls}, **options)
    # Row groups instead of files: pyarrow reads ahead of a slow consumer, up to a whole file.
    return rows.reshard() if hasattr(rows, "reshard") else rows


@dataclass(frozen=True, slots=True)
class _Repeatable:
    """An iterable that can be read repeatedly: each iteration calls `read`."""

    read: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.read()


class _RowsError(OSError):
    """Raised if a file of rows exceeds a limit or can't be decoded; the message says which limit or line."""


def open_parquet(file: str | os.PathLike[str]) -> parquet.ParquetFile:
    """Open a parquet file; OSError if it is not a regular file, or has too many columns, row groups or values."""
    from pyarrow import parquet

    if os.path.exists(file) and not os.path.isfile(file):
        raise _RowsError("it is not a regular file")
    opened = parquet.ParquetFile(file)
    data, names = opened.metadata, opened.schema_arrow.names
    if data.num_columns > _MAX_COLUMNS:
        raise _RowsError(f"it has {data.num_columns:,} columns; at most {_MAX_COLUMNS:,} are allowed")
    if data.num_row_groups > _MAX_ROW_GROUPS + data.num_rows // _MIN_GROUP_ROWS:
        raise _RowsError(f"it has {data.num_row_groups:,} row groups, too many for {data.num_rows:,} rows")
    if repeated := [name for name, number in Counter(names).items() if number > 1]:
        raise _RowsError(f"it has two columns named {repeated[0]!r}")
    chunks = [[group.column(one).num_values for one in range(data.num_columns)] for group in _groups(data)]
    values = max([data.num_rows, *map(sum, zip(*chunks, strict=True))])
    _check_size(file, values, sum(group.total_byte_size for group in _groups(data)))
    return opened


def _groups(data: parquet.FileMetaData) -> list[parquet.RowGroupMetaData]:
    return [data.row_group(number) for number in range(data.num_row_groups)]


def parquet_batches(
    file: str | os.PathLike[str], columns: Sequence[str] | None = None, most_rows: int = _ROWS_PER_TABLE
) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches of at most `most_rows` rows of a parquet file; OSError if the rows unpack to too many bytes."""
    import pyarrow
    from pyarrow import parquet

    opened = open_parquet(file)
    leaves = [opened.schema.column(number) for number in range(len(opened.schema))]
    lists = [one.path for one in leaves if one.max_repetition_level and one.physical_type == "BYTE_ARRAY"]
    indices = parquet.ParquetFile(file, read_dictionary=lists) if lists else None
    # A dictionary may hold a text as long as the column chunk; every row may have this text, and lists many times.
    largest, size = 1, 0
    for number, group in enumerate(_groups(opened.metadata)):
        chunks = [group.column(one) for one in range(group.num_columns)]
        read = [one for one in chunks if columns is None or one.path_in_schema.startswith(tuple(columns))]
        names = [one.path_in_schema for one in read if one.path_in_schema in lists]
        table = indices.read_row_group(number, names) if indices and names else pyarrow.table({})
        in_lists = sum(_decoded_bytes(part) for column in table.columns for part in column.chunks)
        largest, size = max(largest, in_lists + sum(one.total_uncompressed_size for one in read)), size + in_lists
        _check_size(file, 0, size)
    rows = min(most_rows, max(1, _MAX_BATCH_BYTES // largest))
    size = 0
    for batch in opened.iter_batches(rows, columns=None if columns is None else list(columns)):
        for column in batch.columns:
            size += (column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column).nbytes
        _check_size(file, 0, size)
        yield batch


def _decoded_bytes(column: pyarrow.Array) -> int:
    """Return the decoded size, in bytes, of the dictionary-encoded texts in a column or in its lists."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        return compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    inner = column.flatten() if types.is_nested(column.type) and not types.is_map(column.type) else []
    inner = [column.keys, column.items] if types.is_map(column.type) else inner
    return sum(map(_decoded_bytes, inner if isinstance(inner, list) else [inner]))


def parquet_rows(
    file: str | os.PathLike[str], columns: Sequence[str] | None = None, most_rows: int = _ROWS_PER_BATCH
) -> Iterator[dict[str, Any]]:
    """Yield a parquet file's rows one by one; for arguments and errors see `parquet_batches`."""
    for batch in parquet_batches(file, columns, most_rows):
        try:
            rows = batch.to_pylist()
        except MemoryError:
            raise
        except Exception as error:  # for example for a date after the year 9999, or an unknown time zone
            raise _RowsError(f"it has a value that can't be read ({error})") from error
        yield from rows


def _undamaged(name: str, read: Callable[[], Iterator[Any]], *, is_remote: bool = False) -> Iterator[Any]:
    """Yield the rows, or pairs (place such as `a.csv, line 3`, row), of `read()`; UserError if the data is damaged."""
    place = ""
    try:
        for number, item in enumerate(read(), 1):
            place = f" beyond {item[0] if isinstance(item, tuple) else f'row {number}'}"
            yield item
    except Exception as error:
        # pyarrow is slow to import, so its errors (ValueErrors and others) are recognised by their module's name.
        known = is_remote or type(error).__module__.startswith("pyarrow")
        if not known and not isinstance(error, OSError | EOFError | UnicodeError | zlib.error | csv.Error):
            raise
        message = f"The data set {name} can't be read{place}: {' '.join(str(error).split())}"
        raise UserError("data.source.damaged", message) from error


def open_dataset_rows(source: Source, columns: Sequence[str], *, split: str = "train", **options: Any) -> Rows:
    """Return an iterable, which can be read repeatedly, of the pairs (place, row) of a dataset, in order.

    A place is for example `data.jsonl, line 3`. A row is a `BadLine` if its line can't be read. Rows of JSON Lines and
    CSV have all columns, not only `columns`. If a folder has files whose names begin with train, validation or test,
    only files whose names begin with `split` are read. For `options` see `open_rows`.
    """
    files, name = _files(source, SUFFIXES, split), _shown(source)
    if unknown := sorted(set(options) - set(_HUB_OPTIONS)):
        message = f"Unknown options for {name!r}: {', '.join(unknown)}. Available: split, {', '.join(_HUB_OPTIONS)}."
        raise UserError("data.source.options", message)
    for kinds, read in ((_JSON_LINES, _json_lines), (_CSV, _csv_rows)):
        if files and all(file.endswith(kinds) for file in files):
            for file in files:
                check_source(file)
            return _Repeatable(partial(_undamaged, name, partial(read, files)))
    rows = open_rows(files or source, columns=columns, split=split, **options)
    return _Repeatable(partial(_undamaged, name, lambda: ((f"{name}, row {n}", row) for n, row in enumerate(rows, 1))))


def check_source(source: str | os.PathLike[str]) -> None:
    """Raise UserError unless `source` is a URL, folder or file of rows, or looks like a Hub id `owner/name`."""
    name, path = os.fspath(source), user_path(source)
    is_file = name.endswith(SUFFIXES)
    if "://" in name or path.is_dir() or (path.is_file() and is_file):
        return
    if is_file or path.exists() or path.parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        fault = "is a file of an unknown kind" if path.exists() else f"does not exist{similar_files(path)}"
        raise UserError("data.source.no_files", f"{name} {fault}. {_ALLOWED}")


def column_names(source: Source, **options: Any) -> list[str]:
    """Return a dataset's column names (for JSON Lines, of the first 100 rows); UserError if it has no names."""
    files = _files(source, SUFFIXES, options.get("split", "train"))
    are_local = bool(files) and all(map(os.path.isfile, files))
    rows: Rows
    if are_local and files[0].endswith(_CSV):
        rows = _undamaged(files[0], partial(_csv_names, files[0]))
    else:
        rows = open_dataset_rows(source, [], **options)
        if are_local and files[0].endswith(_PARQUET):  # unused columns may have values that can't be read
            return _common_names(files)
    read = list(islice(rows, _ROWS_WITH_NAMES))
    if names := list(dict.fromkeys(name for _, row in read if isinstance(row, dict) for name in row)):
        return names
    fault = f"{read[0][0]}: {read[0][1]}" if read else "it is empty"
    message = f"{_shown(source)} has no row with named columns ({fault})."
    advice = "The first line of a CSV file names the columns; each line of a JSON Lines file is {NAME: VALUE, …}."
    raise UserError("data.source.empty", f"{message} {advice}")


def _common_names(files: Sequence[str]) -> list[str]:
    """Return the names of the columns that all parquet `files` have; UserError if a file can't be read."""
    schemas: list[list[str]] = []
    for file in files:
        try:
            schemas.append(open_parquet(file).schema_arrow.names)
        except _RowsError as error:
            raise UserError("data.source.damaged", f"{file} can't be read: {error}.") from error
    return [name for name in schemas[0] if all(name in names for names in schemas)]


def open_texts(source: Source, column: str, **options: Any) -> Iterator[str]:
    """Yield the texts in one column of a dataset (see `open_dataset_rows`); UserError if a row has no text."""
    for place, row in open_dataset_rows(source, [column], **options):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise UserError("data.row", f"{place} must have a text in column {column!r}.")
        yield row[column]


def not_unicode(text: str) -> str | None:
    """Return why `text` can't be encoded in UTF-8 (lone surrogates, which JSON can hold); None if it can."""
    return "halves of characters (lone surrogates)" if re.search(r"[\ud800-\udfff]", text) else None


def _shown(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else ", ".join(map(str, source))


def _files(source: Any, suffixes: tuple[str, ...], split: str | None = None) -> list[str]:
    """Return the files that `source` names or, if `source` is a folder, its files of `split`; [] for a Hub dataset."""
    names = source if isinstance(source, list | tuple) else [source]
    if not names or not all(isinstance(one, str | os.PathLike) and os.fspath(one) for one in names):
        raise UserError("data.source.no_files", f"{source!r:.80} names no data. {_ALLOWED}")
    if names is source:
        return [os.path.expanduser(os.fspath(file)) for file in source]
    name = os.path.expanduser(os.fspath(source))
    if not os.path.isdir(name):
        return [name] if name.endswith(suffixes) else []
    found = [file for file in files_below(name) if file.name.endswith(suffixes)]
    if any(file.suffix == ".parquet" for file in found):
        found = [file for file in found if file.name != _NO_ROWS]
    splits = {one: [file for file in found if file.name.startswith((f"{one}-", f"{one}."))] for one in _SPLITS}
    if split is not None and any(splits.values()) and not (found := splits.get(split, [])):
        there = ", ".join(one for one, files in splits.items() if files)
        raise UserError("data.source.split", f"{name!r} has no split {split!r}; its splits are: {there}.")
    kinds = [kind[0] for kind in (_PARQUET, _JSON_LINES, _CSV) if any(file.name.endswith(kind) for file in found)]
    if len(kinds) != 1:
        several, none = " and ".join(kinds), f"no {', '.join(suffixes)} file: name other data"
        what = f"{several} files: name the files to read" if found else none
        raise UserError("data.source.no_files", f"{name!r} holds {what}.")
    return [str(file) for file in found]


def _text_lines(file: str) -> Iterator[str]:
    """Yield the lines of a text file, plain or gzip; OSError if lines are too long or too many, or CSV is not UTF-8.

    CSV is checked because spreadsheets write it in many encodings. In JSON Lines, � replaces a damaged byte.
    """
    characters = 0
    opener: Any = gzip.open if file.endswith(".gz") else open
    # The decoder reads ahead: an error of its own would not say in which line the damaged byte is.
    errors = "surrogateescape" if file.endswith(_CSV) else "replace"
    with opener(file, "rt", encoding="utf-8-sig", errors=errors, newline="") as text:
        for number in count(1):
            line = text.readline(_MAX_LINE)
            characters += len(line)
            if len(line) == _MAX_LINE:
                raise _RowsError(f"line {number} has {_MAX_LINE:,} characters or more")
            if errors != "replace" and not_unicode(line):
                raise _RowsError(f"line {number} is not in UTF-8; save the file as CSV in UTF-8")
            _check_size(file, number, characters)
            if not line:
                return
            yield line


def _check_size(file: str | os.PathLike[str], rows: int, characters: int) -> None:
    """Raise OSError if the number of `rows` or of unpacked `characters` is too large for the size of `file`."""
    if rows <= _MAX_ROWS and characters <= _MAX_CHARACTERS:
        return
    size = os.path.getsize(file)
    most_rows = _MAX_ROWS + (size // 8 if os.fspath(file).endswith(".gz") else size)
    if rows > most_rows or characters > _MAX_CHARACTERS + _MAX_RATIO * size:
        what = f"{rows:,} rows or values" if rows > most_rows else f"{characters:,} characters"
        raise _RowsError(f"{what} are too many for a file of {size:,} bytes")


def _csv_header(lines: Iterator[str]) -> tuple[list[str], str]:
    """Return (names of the columns, delimiter: `,`, `;` or tab) of a CSV file, read from the first of its `lines`."""
    header = next(lines, "")
    delimiter = max(",;\t", key=header.count)
    if header.count(delimiter) >= _MAX_COLUMNS:
        raise OSError(f"the first line names more than {_MAX_COLUMNS:,} columns")
    names = next(csv.reader([header], delimiter=delimiter), [])
    if twice := [name for name, number in Counter(names).items() if name and number > 1]:
        raise OSError(f"the first line names the column {twice[0]} twice")
    return names, delimiter


def _csv_names(file: str) -> Iterator[tuple[str, Row]]:
    if names := _csv_header(_text_lines(file))[0]:
        yield f"{file}, line 1", dict.fromkeys(names)


def _csv_rows(files: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield (place such as `a.csv, line 3`, row) for each row of CSV files; a file's first line names the columns."""
    csv.field_size_limit(_MAX_FIELD)
    for file in files:
        lines = _text_lines(file)
        names, delimiter = _csv_header(lines)
        reader = csv.reader(lines, delimiter=delimiter)
        end = 1
        for values in reader:
            begin, end = end + 1, reader.line_num + 1
            place = f"{file}, line {begin}"
            if len(values) == len(names):
                yield place, dict(zip(names, values, strict=True))
            elif values:
                hint = "; is a quotation mark not closed?" if end > begin else ""
                yield place, BadLine(f"not {len(names)} fields{hint}", delimiter.join(values))


def _json_lines(files: Sequence[str]) -> Iterator[tuple[str, Row]]:
    for file in files:
        for number, line in enumerate(_text_lines(file), 1):
            if not line.strip():
                continue
            row, fault = None, ""
            try:
                check_json_values(line, _MAX_LINE_VALUES)
                fault = "not JSON"  # also if brackets are nested too deeply
                row, fault = json.loads(line), "not a JSON object"
            except (ValueError, RecursionError) as error:
                fault = fault or str(error)
            yield f"{file}, line {number}", row if isinstance(row, dict) else BadLine(fault, line.strip())
