"""The first stage: documented functions with ids, out of source files or of CodeSearchNet's rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from operator import length_hint
from typing import Any

from tqdm.auto import tqdm

from modular_star_encoder.data.functions import (
    DocumentedFunction,
    LeakingDocstringError,
    code_key,
    codesearchnet_function,
    filtered_functions,
    function_id,
    open_corpus,
)
from modular_star_encoder.data.languages.registry import language_named
from modular_star_encoder.data.sources import SourceReader
from modular_star_encoder.data.sources.dataset_rows import open_dataset_rows
from modular_star_encoder.utils.errors import UserError

CODESEARCHNET = "codesearchnet"

_CODESEARCHNET_COLUMNS = (
    "repository_name",
    "func_path_in_repository",
    "func_code_url",
    "language",
    "whole_func_string",
    "func_code_string",
    "func_documentation_string",
)

Row = dict[str, str | None]


def open_source(corpus: Mapping[str, Any], languages: Sequence[str]) -> SourceReader | Iterable[tuple[str, Any]]:
    """Open one corpus: a reader of files, or the rows of CodeSearchNet.

    Args:
        corpus: Settings of `open_corpus`; or `codesearchnet`, a source of `open_dataset_rows` with CodeSearchNet's
            columns, and further arguments of that.
        languages: The languages of the functions.

    Raises:
        UserError: It can't be opened.
    """
    if CODESEARCHNET in corpus:
        options = dict(corpus)
        return open_dataset_rows(options.pop(CODESEARCHNET), _CODESEARCHNET_COLUMNS, **options)
    # Headers of C++ are read as C.
    read = [*languages, "c"] if "cpp" in languages else languages
    return open_corpus({"languages": list(dict.fromkeys(read)), **corpus})


def function_rows(
    corpora: Sequence[Mapping[str, Any]],
    *,
    languages: Sequence[str],
    max_characters: int,
    counts: Counter[str],
    processes: int = 2,
    progress: bool = True,
) -> Iterator[Row]:
    """Yield the documented functions of some corpora, each once, with the columns of `FUNCTION_SCHEMA`.

    Of functions whose code differs in white space only, the first is kept. A digest of each stays in memory.

    Args:
        corpora: See `open_source`. CodeSearchNet's rows have passed its filters, and no others are applied.
        languages: The languages of the functions.
        max_characters: Longest function, in characters.
        counts: Receives the numbers of what is read, kept, and dropped by reason.
        processes: Number of worker processes.
        progress: Whether to show a progress bar.

    Raises:
        UserError: A corpus can't be opened, or `synthconl.codesearchnet`: a row is not one of CodeSearchNet.
    """
    seen: set[bytes] = set()
    for corpus in corpora:
        source = open_source(corpus, languages)
        if isinstance(source, SourceReader):
            rows = _file_rows(source, languages, counts, processes, progress)
        else:
            rows = _codesearchnet_rows(source, languages, counts)
        for row in rows:
            reason = _reason(row, max_characters, seen)
            counts[f"dropped: {reason}" if reason else "functions kept"] += 1
            if reason is None:
                yield row


def _file_rows(
    reader: SourceReader, languages: Sequence[str], counts: Counter[str], processes: int, progress: bool
) -> Iterator[Row]:
    total = length_hint(reader) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, some in filtered_functions(reader, processes):
            counts.update(some)
            for function in functions:
                if function.language in languages:
                    yield _row(function)
                else:
                    counts["dropped: another language"] += 1
            bar.update(some["files"])
    for reason, count in reader.skipped.items():
        counts[f"files left out: {reason}"] += count


def _codesearchnet_rows(
    rows: Iterable[tuple[str, Any]], languages: Sequence[str], counts: Counter[str]
) -> Iterator[Row]:
    for place, row in rows:
        counts["rows of CodeSearchNet"] += 1
        if not isinstance(row, dict):
            raise UserError("synthconl.codesearchnet", f"{place} is not a row of CodeSearchNet ({row}).")
        if language_named(row.get("language")) not in languages:
            counts["dropped: another language"] += 1
            continue
        try:
            yield _row(codesearchnet_function(row), row.get("func_code_url"))
        except LeakingDocstringError:
            counts["dropped: its docstring can't be taken out"] += 1


def _row(function: DocumentedFunction, url: str | None = None) -> Row:
    return {
        "id": function_id(function),
        "repository_name": function.repository,
        "func_path_in_repository": function.path,
        "func_code_url": url,
        "language1_CSN": function.language,
        "func1_CSN": function.code,
        "func_documentation_string": function.description,
        "license": function.license,
    }


def _reason(row: Row, max_characters: int, seen: set[bytes]) -> str | None:
    """Why a row is dropped; None if it is kept."""
    code, description = row["func1_CSN"] or "", row["func_documentation_string"] or ""
    if not code.strip() or not description.strip():
        return "without code or description"
    if len(code) > max_characters:
        return f"more than {max_characters:,} characters"
    try:
        key = blake2b(code_key(code).encode(), digest_size=16).digest()
        "".join(filter(None, row.values())).encode()
    except UnicodeEncodeError:
        return "characters that no file can hold"
    if key in seen:
        return "same code as an earlier function"
    seen.add(key)
    return None
