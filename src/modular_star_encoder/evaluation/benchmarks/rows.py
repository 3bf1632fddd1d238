"""Read and check the files of benchmarks; errors name the file, the line and the fault."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Constraint

from modular_star_encoder.data.sources.dataset_rows import parquet_rows
from modular_star_encoder.utils import files
from modular_star_encoder.utils.errors import UserError

MAX_LINE_BYTES, MAX_RATIO = 2**26, 100  # a gzip file may unpack to MAX_LINE_BYTES + MAX_RATIO × its size in bytes
MAX_LINE_VALUES = 2**20  # values of a line of JSON; a file may have `MAX_JSON_VALUES` and one for each of its bytes

Filled = Annotated[str, Constraint(pattern=r"\S")]  # a text with more than white space
Tokens = Annotated[list[str], Constraint(min_length=1)]

Value = TypeVar("Value")


class FileRow(BaseModel):
    """A row of a benchmark's file. It must have the fields that the subclass declares, and may have more fields."""

    model_config = ConfigDict(strict=True)


def refuse(path: Path, line: int | None, expected: str, found: str = "") -> NoReturn:
    """Raise a UserError that names the file, the line (if not None), what is expected and what is found."""
    _report(path, line, f"expected {expected}{f', found {found}' if found else ''}")


def _report(path: Path, line: int | None, fault: str) -> NoReturn:
    raise UserError("benchmark.file.unexpected", f"{path}{'' if line is None else f', line {line}'}: {fault}.")


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Try glob patterns in turn; return the files of the first pattern that matches any, sorted by name, or []."""
    matches = (sorted(filter(Path.is_file, folder.glob(pattern))) for pattern in patterns)
    return next(filter(None, matches), [])


def require_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files that `find_files` finds; if it finds no file, raise FileNotFoundError with the patterns."""
    if not (found := find_files(folder, patterns)):
        raise FileNotFoundError(f"{folder} lacks the files of the benchmark: expected {' or '.join(patterns)}.")
    return found


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its line break) of a text file, which may be compressed with gzip."""
    number = total = 0
    if path.exists() and not path.is_file():  # a pipe never ends
        refuse(path, None, "a regular file")
    try:
        most = MAX_LINE_BYTES + path.stat().st_size * (MAX_RATIO if path.suffix == ".gz" else 1)
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
                total += len(line)
                if len(line) > MAX_LINE_BYTES or total > most:
                    refuse(path, number, f"a line of at most {MAX_LINE_BYTES:,} bytes in a file of at most {most:,}")
                yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        refuse(path, number, "text in utf-8")
    except (EOFError, zlib.error):
        refuse(path, number + 1, "more lines", "the end of a truncated file")
    except gzip.BadGzipFile:
        refuse(path, number + 1, "a gzip file")


def checked(path: Path, line: int | None, check: Callable[[Any], Value], data: Any) -> Value:
    """Return `check(data)`; if pydantic rejects the data, raise a UserError with file, line and first wrong field."""
    try:
        return check(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _report(path, line, ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))))


def read_jsonl(path: Path, kind: type[Value]) -> list[Value]:
    """Return the values in a file that has one JSON value per line; `kind` is their type, such as a `FileRow` class."""
    check = partial(TypeAdapter(kind).validate_json, strict=True)
    rows: list[Value] = []
    left = files.MAX_JSON_VALUES + path.stat().st_size
    for number, line in read_lines(path):
        try:
            left -= files.check_json_values(line, min(MAX_LINE_VALUES, left))
        except ValueError as error:
            refuse(path, number, "JSON", str(error))
        rows.append(checked(path, number, check, line))
    return rows or refuse(path, 1, "a JSON object", "an empty file")


def read_json(path: Path, kind: Any = Any) -> Any:
    """Return the JSON value in a file; UserError if it is not of the type `kind`."""
    try:
        value = files.read_json(path, finite=False)
    except ValueError as error:
        refuse(path, None, "JSON in UTF-8", str(error))
    return checked(path, None, partial(TypeAdapter(kind).validate_python, strict=True), value)


def read_table(path: Path, kind: type[Value]) -> list[Value]:
    """Return the rows of a Parquet file (suffix `.parquet`) or a JSON Lines file (any other suffix), of type `kind`."""
    if path.suffix != ".parquet":
        return read_jsonl(path, kind)
    import pyarrow

    check = TypeAdapter(kind).validate_python
    try:
        return [checked(path, number, check, row) for number, row in enumerate(parquet_rows(path), start=1)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        refuse(path, None, "a Parquet file", " ".join(str(error).split())[:120])


def check_size(path: Path, found: int, expected: int, what: str, *, allow_subset: bool) -> tuple[str, ...]:
    """Raise UserError unless a file has the expected number of rows; if `allow_subset`, return a note on fewer rows."""
    if found > expected or (found < expected and not allow_subset):
        hint = "; set `allow_subset` (--allow-subset) to accept fewer" if found < expected else ""
        refuse(path, None, f"{expected:,} {what}", f"{found:,}{hint}")
    return (f"{path.name}: {found:,} of {expected:,} {what}",) if found < expected else ()


def check_unique(path: Path, values: Sequence[Any], what: str) -> dict[Any, int]:
    """Return {value: index of the value in `values`}; raise UserError if a value occurs twice."""
    places: dict[Any, int] = {}
    for number, value in enumerate(values):
        if value in places:
            refuse(path, number + 1, f"another {what} than in line {places[value] + 1}", repr(value))
        places[value] = number
    return places
