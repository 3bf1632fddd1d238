"""The first stage: documented functions with ids, out of source files or of CodeSearchNet's rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from modular_star_encoder.data.corpora import open_corpus
from modular_star_encoder.data.dataset_rows import open_dataset_rows
from modular_star_encoder.data.functions import code_key, extract_functions, function_id, stream_functions
from modular_star_encoder.data.source_files import SourceFile, language_named

CODESEARCHNET = "codesearchnet"

_CODESEARCHNET_COLUMNS = (
    "repository_name",
    "func_path_in_repository",
    "func_code_url",
    "language",
    "func_code_string",
    "func_documentation_string",
)

Row = dict[str, str | None]


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

    Of functions whose code differs in white space only, the first is kept. Memory holds a digest of each.

    Args:
        corpora: Settings of `open_corpus`; or `codesearchnet`, a source of `open_dataset_rows` with CodeSearchNet's
            columns, and further arguments of that. CodeSearchNet's rows are taken as published, without its filters;
            docstrings are taken out of the code, where Python's still have them.
        languages: The languages of the functions.
        max_characters: Longest function, in characters.
        counts: Counts what is read, kept, and dropped by reason.
        processes: See `stream_functions`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a corpus can't be opened.
    """
    seen: set[bytes] = set()
    for corpus in corpora:
        if CODESEARCHNET in corpus:
            rows = _codesearchnet_rows(corpus, languages, counts)
        else:
            rows = _file_rows(corpus, languages, counts, processes, progress)
        for row in rows:
            reason = _reason(row, max_characters, seen)
            counts[f"dropped: {reason}" if reason else "functions kept"] += 1
            if reason is None:
                yield row


def _file_rows(
    corpus: Mapping[str, Any], languages: Sequence[str], counts: Counter[str], processes: int, progress: bool
) -> Iterator[Row]:
    reader = open_corpus({"languages": list(languages), **corpus})
    for function in stream_functions(reader, counts, processes=processes, progress=progress):
        yield {
            "id": function_id(function),
            "repository_name": function.repository,
            "func_path_in_repository": function.path,
            "func_code_url": None,
            "language1_CSN": function.language,
            "func1_CSN": function.code,
            "func_documentation_string": function.description,
            "license": function.license,
        }
    for reason, count in reader.skipped.items():
        counts[f"files left out: {reason}"] += count


def _codesearchnet_rows(corpus: Mapping[str, Any], languages: Sequence[str], counts: Counter[str]) -> Iterator[Row]:
    options = dict(corpus)
    for _, row in open_dataset_rows(options.pop(CODESEARCHNET), _CODESEARCHNET_COLUMNS, **options):
        counts["rows of CodeSearchNet"] += 1
        texts = [row.get(name) for name in _CODESEARCHNET_COLUMNS] if isinstance(row, dict) else []
        language = language_named(texts[3]) if texts and all(isinstance(text, str) for text in texts) else None
        if language not in languages:
            counts["dropped: another language" if language else "dropped: not a row of CodeSearchNet"] += 1
            continue
        repository, path, url, _, code, description = map(str, texts)
        code = _without_docstring(code) if language == "python" else code
        if code is None:
            counts["dropped: does not parse"] += 1
            continue
        yield {
            "id": blake2b("\0".join((repository, path, url, code)).encode(), digest_size=16).hexdigest(),
            "repository_name": repository,
            "func_path_in_repository": path,
            "func_code_url": url,
            "language1_CSN": language,
            "func1_CSN": code,
            "func_documentation_string": description.strip(),
            "license": None,
        }


def _without_docstring(code: str) -> str | None:
    """A Python function without its documentation, with which it would be found by the words of the query; or None."""
    found = extract_functions(SourceFile("", "function.py", "python", code))
    return found[0].code if found else None


def _reason(row: Row, max_characters: int, seen: set[bytes]) -> str | None:
    """Why a row is dropped; None if it is kept."""
    code, description = row["func1_CSN"] or "", row["func_documentation_string"] or ""
    if not code.strip() or not description.strip():
        return "empty"
    if len(code) > max_characters:
        return f"more than {max_characters:,} characters"
    try:
        key = blake2b(code_key(code).encode(), digest_size=16).digest()
        description.encode()
    except UnicodeEncodeError:
        return "characters that no file can hold"
    if key in seen:
        return "same code as an earlier function"
    seen.add(key)
    return None
