"""Documented functions: (description, code) rows out of source files, filtered by CodeSearchNet's rules.

The description is the first paragraph of the docstring. The code is the function without any docstring: with its own,
even BM25 finds it by the words of the query.

Source of the rules: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2.
"""

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from operator import length_hint

from tqdm.auto import tqdm

from modular_star_encoder.data import python_functions
from modular_star_encoder.data.source_files import SourceFile

MIN_DESCRIPTION_WORDS = 3
MAX_DESCRIPTION_WORDS = 256
MIN_CODE_LINES = 3

_FILES_PER_CHUNK = 64

_FINDERS: dict[str, Callable[[str, bool], list[python_functions.FoundFunction]]] = {
    "python": python_functions.find_functions,
}
SUPPORTED_LANGUAGES = tuple(_FINDERS)


@dataclass(frozen=True, slots=True)
class DocumentedFunction:
    """A function and what its author says about it.

    Attributes:
        repository: Name of its repository.
        path: Path of its file, with forward slashes.
        line: 1-based line of the file at which the function begins: that of its first decorator, if it has any.
        language: Lower-case name of the programming language.
        name: Dotted name inside the file, such as `"Stack.push"`.
        description: First paragraph of the docstring, in one line; empty where a search keeps undocumented functions.
        code: Decorators, signature and body, dedented, with `\\n` line ends and without docstrings.
    """

    repository: str
    path: str
    line: int
    language: str
    name: str
    description: str
    code: str


@dataclass(frozen=True, slots=True)
class FunctionCollection:
    """The functions that passed every filter, in the order of their files, and how many were dropped by which."""

    functions: list[DocumentedFunction]
    counts: Counter[str] = field(default_factory=Counter)


def extract_functions(
    file: SourceFile, counts: Counter[str] | None = None, documented_only: bool = True
) -> list[DocumentedFunction]:
    """Return the documented functions of `file`, in the order of the text, methods and nested functions included.

    No filter is applied, but functions whose body is nothing but a docstring are left out. A file that does not parse
    yields no function.

    Args:
        file: The source file.
        counts: When given, `"files that do not parse"` is counted in it.
        documented_only: Whether to leave out functions without a docstring; if kept, their description is empty.

    Raises:
        ValueError: If the language of the file is not one of `SUPPORTED_LANGUAGES`.
    """
    if file.language not in _FINDERS:
        raise ValueError(f"Language {file.language!r} is not supported; use one of {', '.join(SUPPORTED_LANGUAGES)}.")
    try:
        found = _FINDERS[file.language](file.text, documented_only)
    except python_functions.UnparsableSourceError:
        if counts is not None:
            counts["files that do not parse"] += 1
        return []
    return [
        DocumentedFunction(file.repository, file.path, one.line, file.language, one.name, one.description, one.code)
        for one in found
    ]


def is_well_described(function: DocumentedFunction) -> bool:
    """Whether the description has 3 to 256 words."""
    words = sum(any(map(str.isalnum, word)) for word in function.description.split())
    return MIN_DESCRIPTION_WORDS <= words <= MAX_DESCRIPTION_WORDS


def is_described_in_ascii(function: DocumentedFunction) -> bool:
    """Whether more than half of the letters of the description are ASCII: a coarse test of "written in English"."""
    letters = [character for character in function.description if character.isalpha()]
    return 2 * sum(map(str.isascii, letters)) > len(letters)


def is_long_enough(function: DocumentedFunction) -> bool:
    """Whether the code, without its docstring, has at least 3 lines that are not blank."""
    return sum(bool(line.strip()) for line in function.code.splitlines()) >= MIN_CODE_LINES


def is_no_special_method(function: DocumentedFunction) -> bool:
    """Whether the name is not one of Python's double-underscore names."""
    name = function.name.rpartition(".")[2]
    return not (name.startswith("__") and name.endswith("__"))


def is_no_test(function: DocumentedFunction) -> bool:
    """Whether the function's own name does not contain "test", in any case."""
    return "test" not in function.name.rpartition(".")[2].lower()


FILTERS: dict[str, Callable[[DocumentedFunction], bool]] = {
    "description not of 3 to 256 words": is_well_described,
    "description mostly not ASCII": is_described_in_ascii,
    "code of fewer than 3 lines": is_long_enough,
    "special method": is_no_special_method,
    "name contains test": is_no_test,
}
"""CodeSearchNet's rules, in the order in which they are applied: what is dropped, and the test that keeps the rest."""


def code_key(code: str) -> str:
    """Return `code` with every run of white space made one space: equal for functions that differ in layout only."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """Return the lower-cased letters and digits of `description`: equal for near-identical descriptions."""
    return "".join(filter(str.isalnum, description.lower()))


def collect_functions(files: Iterable[SourceFile], processes: int = 2, progress: bool = True) -> FunctionCollection:
    """Extract, filter and de-duplicate the documented functions of `files`.

    Of functions whose code differs in white space only, the first is kept. The result does not depend on `processes`.

    Args:
        files: Source files; those in unsupported languages are counted and skipped.
        processes: Number of worker processes; with 0 or 1 the work is done in this process.
        progress: Whether to show a progress bar.

    Returns:
        The functions, in the order of `files`, and counts: `"files"`, `"documented functions"`, one count for each
        reason to drop a function, and `"functions kept"`.
    """
    counts: Counter[str] = Counter()
    kept: list[DocumentedFunction] = []
    seen: set[str] = set()
    total = length_hint(files) or None
    with tqdm(desc="Extracting functions", total=total, unit=" files", disable=not progress) as bar:
        for functions, chunk_counts in _extracted_chunks(files, processes):
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


def _extracted_chunks(
    files: Iterable[SourceFile], processes: int
) -> Iterator[tuple[list[DocumentedFunction], Counter[str]]]:
    """Yield the filtered functions and counts of one chunk of files after the other, in order."""
    iterator = iter(files)
    chunks = iter(lambda: list(islice(iterator, _FILES_PER_CHUNK)), [])
    if processes <= 1:
        yield from map(_extract_chunk, chunks)
        return
    # The parent alone handles Ctrl-C; workers would each print a traceback of their own.
    executor = ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        waiting: deque[Future[tuple[list[DocumentedFunction], Counter[str]]]] = deque()
        for chunk in chunks:
            waiting.append(executor.submit(_extract_chunk, chunk))
            # A short queue, so that the texts of a large corpus are never all in memory.
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _extract_chunk(files: list[SourceFile]) -> tuple[list[DocumentedFunction], Counter[str]]:
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
