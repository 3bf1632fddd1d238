"""Documented functions: (description, code) rows out of source files, filtered by CodeSearchNet's rules.

The description is the first paragraph of what the author says of a function: its docstring in Python, elsewhere the
comment before it. The code is the function without any docstring: with its own, even BM25 finds it by the words of the
query.

Source of the rules: Husain et al., "CodeSearchNet Challenge", 2019 (arXiv 1909.09436), section 2.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import length_hint
from typing import Self

from tqdm.auto import tqdm

from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.grammars import SUPPORTED_LANGUAGES, UnparsableSourceError, is_cpp_header
from modular_star_encoder.data.sources.source_files import SourceFile, SourceReader
from modular_star_encoder.utils.crash_safe import crash_safe_map


@dataclass(frozen=True, slots=True)
class DocumentedFunction:
    """A function and what its author says about it.

    Attributes:
        repository: Name of its repository.
        path: Path of its file, with forward slashes.
        line: 1-based line of the file at which the function begins: that of its first decorator, if it has any; 0 if
            its origin does not tell.
        language: Lower-case name of the programming language.
        name: Dotted name inside the file, such as `"Stack.push"`.
        description: First paragraph of the documentation, in one line; empty for the undocumented that a search keeps.
        code: Decorators, signature and body, dedented, with `\\n` line ends and without documentation: docstrings are
            taken out, and comments stand before a function, not in it.
        source: The whole function as its file has it, docstrings, line ends and indentation included; comments before
            it are no part of it. SynthCoNL's column `func1_CSN` is this text.
        start_byte: Its first byte in the UTF-8 encoding of the file's text; None if its origin does not tell.
        end_byte: The byte after its last: `text.encode()[start_byte:end_byte].decode() == source`.
        license: What the origin of the file says of its licence, if it says anything.
    """

    repository: str
    path: str
    line: int
    language: str
    name: str
    description: str
    code: str
    source: str = ""
    start_byte: int | None = None
    end_byte: int | None = None
    license: str | None = None


def function_id(function: DocumentedFunction) -> str:
    """Return an identifier of `function`: 32 hexadecimal digits, the same on every machine and in every run.

    It is the beginning of the SHA-256 of the repository, the path, the language, the place (line and first byte) and
    the source: a function that moves or changes becomes another one. Its name, description and licence do not count.
    """
    place = f"{function.line}:{'' if function.start_byte is None else function.start_byte}"
    # Lengths go before the parts, so that no two lists of parts make the same text.
    parts = (function.repository, function.path, function.language, place, function.source or function.code)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in encoded))
    return digest.hexdigest()[:32]


def code_key(code: str) -> str:
    """Return `code` with every run of white space made one space: equal for functions that differ in layout only."""
    return " ".join(code.split())


def description_key(description: str) -> str:
    """Return the lower-cased letters and digits of `description`: equal for near-identical descriptions."""
    return "".join(filter(str.isalnum, description.lower()))


MIN_DESCRIPTION_WORDS = 3
MAX_DESCRIPTION_WORDS = 256
MIN_CODE_LINES = 3

_CONSTRUCTORS = {
    "python": {"__init__", "__new__", "__del__"},
    "javascript": {"constructor"},
    "php": {"__construct", "__destruct"},
    "ruby": {"initialize", "initialize_copy"},
}
_NAMED_LIKE_THEIR_CLASS = {"java", "cpp"}
_SPECIAL_METHODS = {
    "java": {"toString", "hashCode", "equals", "clone", "finalize", "notify", "notifyAll"},
    "go": {"String", "GoString", "Error", "init", "main"},
    "php": {
        *("__call", "__callStatic", "__get", "__set", "__isset", "__unset", "__sleep", "__wakeup", "__serialize"),
        *("__unserialize", "__toString", "__invoke", "__set_state", "__clone", "__debugInfo"),
    },
    "javascript": {"toString", "toLocaleString", "valueOf"},
    "ruby": {"to_s", "to_str", "to_text", "inspect", "display", "dup", "clone", "hash", "eql?", "equal?", "between?"},
    "c": {"main"},
    "cpp": {"main"},
}


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


def is_no_constructor(function: DocumentedFunction) -> bool:
    """Whether the function does not construct or destroy an object."""
    outer, _, name = function.name.rpartition(".")
    if name in _CONSTRUCTORS.get(function.language, ()):
        return False
    return function.language not in _NAMED_LIKE_THEIR_CLASS or name.lstrip("~") != outer.rpartition(".")[2]


def is_no_special_method(function: DocumentedFunction) -> bool:
    """Whether the name is none that the language itself gives a meaning: `__str__`, `toString`, `==`, `main`."""
    name = _own_name(function)
    if function.language == "python" and name.startswith("__") and name.endswith("__"):
        return False
    if function.language == "cpp" and name.startswith("operator") and not name[8:9].isidentifier():
        return False
    if function.language == "ruby" and not any(map(str.isalnum, name)):
        return False
    return name not in _SPECIAL_METHODS.get(function.language, ())


def is_no_test(function: DocumentedFunction) -> bool:
    """Whether the function's own name does not contain "test", in any case."""
    return "test" not in _own_name(function).lower()


def _own_name(function: DocumentedFunction) -> str:
    return function.name.rpartition(".")[2]


FILTERS: dict[str, Callable[[DocumentedFunction], bool]] = {
    "description not of 3 to 256 words": is_well_described,
    "description mostly not ASCII": is_described_in_ascii,
    "code of fewer than 3 lines": is_long_enough,
    "constructor": is_no_constructor,
    "special method": is_no_special_method,
    "name contains test": is_no_test,
}
"""In the order in which they are applied: what is dropped, and the test that keeps the rest."""


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
    yield from crash_safe_map(_extract_chunk, files, processes=processes, chunk_size=_FILES_PER_CHUNK, crashed=_crashed)


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


_SNIPPET_FILES_PER_CHUNK = 64
_PROCESSES = 2

_SnippetChunk = tuple[list[SourceFile], Counter[str]]


class FunctionFiles(SourceReader):
    """Yields every function of a reader's files, documented or not, as a file whose path ends in `#L{line}`.

    A function inside another one is part of that and no text of its own. Units are those of the reader. `skipped`
    counts the files that the reader leaves out, those that do not parse, and those that kill the parser.
    """

    def __init__(self, files: SourceReader) -> None:
        super().__init__()
        self._files = files
        self.repositories = files.repositories

    def skip(self, units: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.skip(units))

    def shard(self, index: int, count: int) -> Self:
        """See `SourceReader`."""
        return type(self)(self._files.shard(index, count))

    def _read(self, skipped: Counter[str]) -> Iterator[SourceFile]:
        chunks = crash_safe_map(
            _functions,
            self._files,
            processes=_PROCESSES,
            chunk_size=_SNIPPET_FILES_PER_CHUNK,
            crashed=_crashed_snippets,
        )
        for functions, counts in chunks:
            skipped.update(counts)
            yield from functions
        skipped.update(self._files.skipped)


def _functions(files: list[SourceFile]) -> _SnippetChunk:
    found: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for file in files:
        if file.language not in SUPPORTED_LANGUAGES:
            skipped["unsupported language"] += 1
            continue
        counts: Counter[str] = Counter()
        end = 0
        for one in extract_functions(file, counts, documented_only=False):
            if one.start_byte >= end:
                end = one.end_byte
                path = f"{one.path}#L{one.line}"
                found.append(SourceFile(one.repository, path, one.language, one.source, one.license))
        skipped["does not parse"] += counts["files that do not parse"]
    return found, +skipped


def _crashed_snippets(_: SourceFile) -> _SnippetChunk:
    return [], Counter({"crashes the parser": 1})
