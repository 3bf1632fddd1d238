"""Read and check the files of benchmarks; errors name the file, the line, and what was expected there."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from modular_star_encoder.data.sources.dataset_rows import not_unicode
from modular_star_encoder.utils.errors import UserError

Fields = Mapping[str, type | tuple[type, ...]]  # {name of a required field of a row: type or types of its value}
MAX_LINE_BYTES, MAX_RATIO = 2**27, 100  # a gzip file may unpack to `MAX_LINE_BYTES` and `MAX_RATIO` times its size
_NAMES = {str: "a string", list: "a list", int: "a whole number", dict: "an object", float: "a number"}


def refuse(path: Path, line: int | None, expected: str, found: str = "") -> NoReturn:
    """Raise a UserError that says in which file and line (or row) what was expected, and what was found."""
    place = f"{path}, line {line}" if line is not None else f"{path}"
    message = f"{place}: expected {expected}{f', found {found}' if found else ''}."
    raise UserError("benchmark.file.unexpected", message)


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files, sorted by name, of the first pattern that matches any file; [] if no pattern matches."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    return []


def require_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Like `find_files`, but raise FileNotFoundError if no file matches; the message names the patterns."""
    if not (found := find_files(folder, patterns)):
        raise FileNotFoundError(f"{folder} lacks the files of the benchmark: expected {' or '.join(patterns)}.")
    return found


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without line break) of a text file, plain or compressed with gzip."""
    number = total = 0
    try:
        most = MAX_LINE_BYTES + path.stat().st_size * (MAX_RATIO if path.suffix == ".gz" else 1)
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
                total += len(line)
                if len(line) > MAX_LINE_BYTES or total > most:
                    refuse(path, number, f"a line of at most {MAX_LINE_BYTES:,} bytes in a file of at most {most:,}")
                yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode(encoding)
    except UnicodeDecodeError:
        refuse(path, number, f"text in {encoding}")
    except (EOFError, zlib.error):
        refuse(path, number + 1, "more lines", "the end of a truncated file")
    except gzip.BadGzipFile:
        refuse(path, number + 1, "a gzip file")


def read_jsonl(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, and check that each object has `fields` of the given types."""
    rows, expected = [], f"a JSON object with {_listed(fields)}"
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            refuse(path, number, expected, repr(line[:40]))
        _check_unicode(path, number, line, row)
        rows.append(_checked(path, number, row, fields))
    return rows or refuse(path, 1, expected, "an empty file")


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON value."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        refuse(path, getattr(error, "lineno", None), "one JSON value", getattr(error, "msg", str(error)))
    _check_unicode(path, None, text, value)
    return value


def check_rows(path: Path, rows: Any, fields: Fields) -> list[dict[str, Any]]:
    """Check that `rows` is a list of objects with `fields`, and return it; the error names the first wrong row."""
    if not isinstance(rows, list) or not rows:
        refuse(path, 1, f"a list of objects with {_listed(fields)}", "an empty list" if rows == [] else _kind(rows))
    return [_checked(path, number, row, fields) for number, row in enumerate(rows, start=1)]


def read_table(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file, or of a file with JSON lines if the suffix is not `.parquet`."""
    if path.suffix != ".parquet":
        return read_jsonl(path, fields)
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        refuse(path, None, "a Parquet file", " ".join(str(error).split())[:120])
    return check_rows(path, rows, fields)


def joined_tokens(path: Path, rows: Sequence[dict[str, Any]], *names: str) -> list[str]:
    """Join the tokens of each row with spaces; the tokens are in the first of the fields `names` that the row has."""
    texts = []
    for number, row in enumerate(rows, start=1):
        name = next((name for name in names if name in row), None)
        if name is None:
            refuse(path, number, f"the field {' or '.join(map(repr, names))}")
        tokens = row[name]
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            refuse(path, number, f"a list of strings as {name!r}")
        texts.append(" ".join(tokens))
    return texts


def check_size(path: Path, found: int, expected: int, what: str, *, allow_subset: bool) -> tuple[str, ...]:
    """Raise UserError if `found` is not `expected`; if it is smaller and `allow_subset`, return a note instead."""
    if found == expected:
        return ()
    if found > expected or not allow_subset:
        hint = "; allow_subset would accept fewer" if found < expected else ""
        refuse(path, None, f"{expected:,} {what}", f"{found:,}{hint}")
    return (f"{path.name}: {found:,} of {expected:,} {what}",)


def check_unique(path: Path, values: Sequence[Any], what: str) -> dict[Any, int]:
    """Return {value: its index in `values`}; raise UserError if a value occurs twice."""
    places: dict[Any, int] = {}
    for number, value in enumerate(values):
        if value in places:
            refuse(path, number + 1, f"another {what} than in line {places[value] + 1}", repr(value))
        places[value] = number
    return places


def _check_unicode(path: Path, line: int | None, text: str, value: Any) -> None:
    """Raise UserError if a value read from JSON holds half of a surrogate pair, which no tokenizer accepts."""
    if "\\ud" in text.lower() and (found := not_unicode(json.dumps(value, ensure_ascii=False))):
        refuse(path, line, "valid Unicode text", found)


def _checked(path: Path, number: int, row: Any, fields: Fields) -> dict[str, Any]:
    if not isinstance(row, dict):
        refuse(path, number, f"an object with {_listed(fields)}", _kind(row))
    for name, kinds in fields.items():
        if name not in row:
            refuse(path, number, f"the field {name!r}", _listed(row))
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            expected = " or ".join(_NAMES[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            refuse(path, number, f"{expected} as {name!r}", _kind(row[name]))
    return row


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "no field"


def _kind(value: Any) -> str:
    return "nothing" if value is None else _NAMES.get(type(value), type(value).__name__)
