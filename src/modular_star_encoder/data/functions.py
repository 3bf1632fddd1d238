"""Documented functions: (description, code) rows out of source files, filtered by CodeSearchNet's rules.

The description is the first paragraph of what the author says of a function: its docstring in Python, elsewhere the
comment before it. The code is the function without any docstring: with its own, even BM25 finds it by the words of the
query.

Source of the rules: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import length_hint

from tqdm.auto import tqdm

from modular_star_encoder.data.c_family import is_cpp_header
from modular_star_encoder.data.documented_function import DocumentedFunction, code_key, description_key, function_id
from modular_star_encoder.data.function_filters import FILTERS
from modular_star_encoder.data.function_finder import find_functions
from modular_star_encoder.data.grammars import SUPPORTED_LANGUAGES, UnparsableSourceError
from modular_star_encoder.data.source_files import SourceFile
from modular_star_encoder.data.surviving_pool import map_in_processes

__all__ = [
    "FILTERS",
    "SUPPORTED_LANGUAGES",
    "DocumentedFunction",
    "FunctionCollection",
    "code_key",
    "collect_functions",
    "description_key",
    "extract_functions",
    "filtered_functions",
    "function_id",
]

_FILES_PER_CHUNK = 64

_Chunk = tuple[list[DocumentedFunction], Counter[str]]


@dataclass(frozen=True, slots=True)
class FunctionCollection:
    """The functions that passed every filter, in the order of their files, and how many were dropped by which."""

    functions: list[DocumentedFunction]
    counts: Counter[str] = field(default_factory=Counter)


def extract_functions(
    file: SourceFile, counts: Counter[str] | None = None, documented_only: bool = True
) -> list[DocumentedFunction]:
    """Return the documented functions of `file`, in the order of the text, methods and nested functions included.

    No filter is applied, but functions without a body, or with nothing but a docstring in it, are left out, and so are
    those with a syntax error. A file that does not parse yields no function. A `.h` that is read as C and
    is C++ yields functions in C++.

    Args:
        file: The source file.
        counts: When given, it counts `"files that do not parse"` (no text, far too hard to parse, or a syntax error and
            no function without one), `"files with a syntax error"` of which some functions were read, and what
            `find_functions` counts.
        documented_only: Whether to leave out functions without a description; if kept, it is empty.

    Raises:
        ValueError: If the language of the file is not one of `SUPPORTED_LANGUAGES`.
    """
    is_cpp = file.language == "c" and file.path.endswith(".h") and is_cpp_header(file.text)
    language = "cpp" if is_cpp else file.language
    try:
        found = find_functions(file.text, language, documented_only=documented_only, counts=counts)
    except UnparsableSourceError:
        if counts is not None:
            counts["files that do not parse"] += 1
        return []
    return [
        DocumentedFunction(
            repository=file.repository,
            path=file.path,
            line=one.line,
            language=language,
            name=one.name,
            description=one.description,
            code=one.code,
            source=one.source,
            start_byte=one.start_byte,
            end_byte=one.end_byte,
            license=file.license,
        )
        for one in found
    ]


def collect_functions(files: Iterable[SourceFile], processes: int = 2, progress: bool = True) -> FunctionCollection:
    """Extract, filter and de-duplicate the documented functions of `files`.

    Of functions whose code differs in white space only, the first is kept. The result does not depend on `processes`.

    Args:
        files: Source files; those in unsupported languages are counted and skipped.
        processes: Number of worker processes; with 0 or 1 the work is done in this process.
        progress: Whether to show a progress bar.

    Returns:
        The functions, in the order of `files`, and counts: `"files"`, `"documented functions"`, one count for each
        reason to drop a function, those of `extract_functions`, and `"functions kept"`. With several processes, a file
        that kills its process is counted as `"files that crash the parser"`.
    """
    counts: Counter[str] = Counter()
    kept: list[DocumentedFunction] = []
    seen: set[str] = set()
    total = length_hint(files) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, chunk_counts in filtered_functions(files, processes):
            counts += chunk_counts
            for function in functions:
                key = code_key(function.code)
                if key in seen:
                    counts["dropped: same code as an earlier function"] += 1
                else:
                    seen.add(key)
                    kept.append(function)
            bar.update(chunk_counts["files"])
    counts["functions kept"] = len(kept)
    return FunctionCollection(kept, counts)


def filtered_functions(
    files: Iterable[SourceFile], processes: int = 2
) -> Iterator[tuple[list[DocumentedFunction], Counter[str]]]:
    """Yield the documented functions that pass `FILTERS`, and counts, of some files after the others, in order.

    For corpora whose functions do not fit into memory; `collect_functions` says more. Equal functions are not dropped.
    """
    yield from map_in_processes(
        _extract_chunk, files, processes=processes, chunk_size=_FILES_PER_CHUNK, crashed=_crashed
    )


def _extract_chunk(files: list[SourceFile]) -> _Chunk:
    counts: Counter[str] = Counter(files=len(files))
    kept: list[DocumentedFunction] = []
    for file in files:
        if file.language not in SUPPORTED_LANGUAGES:
            counts["files in an unsupported language"] += 1
            continue
        for function in extract_functions(file, counts):
            counts["documented functions"] += 1
            reason = next((name for name, keeps in FILTERS.items() if not keeps(function)), None)
            if reason:
                counts[f"dropped: {reason}"] += 1
            else:
                kept.append(function)
    return kept, counts


def _crashed(_: SourceFile) -> _Chunk:
    return [], Counter({"files": 1, "files that crash the parser": 1})
